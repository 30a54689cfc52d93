"""What is computed again in the backward pass: less is kept, and nothing else changes."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from small_experiments import lenet

from flaxcls import models, ops
from flaxcls.errors import InputError
from flaxcls.experiment import for_training
from flaxcls.freezing import EVERYTHING, Selection, frozen_statistics
from flaxcls.rematerialisation import check, rematerialised
from flaxcls.step import train_step

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES = [
    ("resnet18", {}, ("trunk/stage*",)),
    ("vgg11", {"dropout": 0.5, "head_width": 64}, ("trunk", "classifier")),
]


def make(name, **options):
    model = models.create_model(name, 5, **options)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    return model, quick_jit(partial(model.init, train=False))(jax.random.key(0), images), images


def objective(model, images, patterns, selection=EVERYTHING):
    """A function of (parameters, statistics) to a sum of squares and the statistics after it."""

    def run(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        with rematerialised(patterns), frozen_statistics(selection):
            logits, updates = model.apply(
                variables,
                images,
                train=True,
                rngs={"dropout": jax.random.key(3)},
                mutable=["batch_stats"],
            )
        return (logits**2).sum(), updates

    return run


def kept_bytes(run, variables):
    """Bytes that the backward pass is handed, the variables themselves left out."""

    def backward(params, batch_stats):
        return jax.vjp(lambda p: run(p, batch_stats)[0], params)[1]

    shapes = jax.eval_shape(backward, variables["params"], variables["batch_stats"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def count_blocks(jaxpr):
    """What is computed again: `checkpoint` in a forward pass, `remat2` in a backward pass."""
    return len(re.findall(r"\b(?:checkpoint|remat2?)\[", str(jaxpr)))


@pytest.mark.parametrize(("name", "options", "patterns"), CASES)
def test_less_is_kept_and_nothing_else_changes(name, options, patterns):
    model, variables, images = make(name, **options)
    results, kept = [], []
    with ops.use_backend("flax"):
        for chosen in ((), patterns):
            run = objective(model, images, chosen)
            kept.append(kept_bytes(run, variables))
            gradient = quick_jit(jax.value_and_grad(run, has_aux=True))
            results.append(gradient(variables["params"], variables["batch_stats"]))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    assert kept[1] - weights < 0.6 * (kept[0] - weights)
    plain, again = map(jax.tree.leaves, results)
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(a).max()))


def test_every_module_that_matches_is_computed_again_once():
    model, variables, images = make("resnet18")

    def count(*patterns):
        run = objective(model, images, patterns)
        return count_blocks(jax.make_jaxpr(run)(variables["params"], variables["batch_stats"]))

    assert count() == 0
    assert count("trunk/stage1_block*") == 2
    # The blocks, and nothing within them again.
    assert count("trunk/stage*") == 8
    assert count("trunk", "trunk/stage*") == 1


def test_frozen_statistics_stay_frozen_where_they_are_computed_again():
    model, variables, images = make("resnet18")
    run = objective(model, images, ("trunk/stage*",), Selection(frozen=("trunk/*",)))
    _, updates = quick_jit(run)(variables["params"], variables["batch_stats"])
    after = jax.tree.leaves(updates["batch_stats"])
    for a, b in zip(after, jax.tree.leaves(variables["batch_stats"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pattern_that_matches_no_module_is_refused():
    params = {"trunk": {"stage1": {"conv": {"kernel": 0}}}, "head": {"kernel": 0}}
    check(params, ("trunk", "trunk/*", "head", "trunk/stage1/conv"))
    for pattern in ("trunk/stage2*", "trunk/stage1/conv/kernel", "Trunk"):
        with pytest.raises(InputError, match=r"train\.remat: no module matches.*'trunk/stage1'"):
            check(params, (pattern,))


def test_the_config_names_what_the_step_computes_again():
    experiment = for_training(lenet(train__remat=("trunk",)))
    shapes = map(jax.eval_shape, (experiment.create_state, experiment.empty_metrics))
    feed = experiment.data.feeds["train"]
    with feed.train(experiment.order, experiment.recipe.augmentation) as batches:
        _, batch = next(batches)
    step = partial(train_step, experiment.recipe)
    assert count_blocks(jax.make_jaxpr(step)(*shapes, batch, feed.resident)) == 1
    with pytest.raises(InputError, match=r"train\.remat: no module matches 'stem'"):
        for_training(lenet(train__remat=("stem",)))
