"""Frozen parameters stay, cost no gradient and no optimizer state; groups learn at their rate."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flaxcls import metrics, models, ops, step
from flaxcls.augment import Augmentation
from flaxcls.batch import Batch, Preprocess
from flaxcls.errors import InputError
from flaxcls.freezing import Selection, check, frozen_statistics, join, partition
from flaxcls.losses import create_loss
from flaxcls.optimizers import create_optimizer, create_schedule
from flaxcls.state import create_state

CLASSES = 4
# Compiling takes longer than all steps that a test takes; without LLVM's optimisation, half of it.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = partial(jax.jit, compiler_options=ops.compiler_options() | QUICK)
TRUNK = Selection(frozen=("trunk/*",))


def make_recipe(name="like_vgg", size=16, optimizer="adamw", **changes):
    schedule = create_schedule("constant", 1e-2, steps_per_epoch=5, epochs=10)
    return step.Recipe(
        model=models.create_model(name, CLASSES),
        loss=create_loss("cross_entropy"),
        optimizer=create_optimizer(optimizer, schedule, weight_decay=1e-2),
        schedule=schedule,
        preprocess=Preprocess(size, 1, (0.4,), (0.3,)),
        augmentation=Augmentation(),
        num_classes=CLASSES,
        seed=0,
        steps_per_epoch=5,
    )._replace(**changes)


def start(recipe):
    size = recipe.preprocess.size
    ema = recipe.ema_decay > 0
    make = partial(
        create_state,
        recipe.model,
        recipe.optimizer,
        (size, size, 1),
        seed=0,
        ema=ema,
        selection=recipe.selection,
    )
    return jax.jit(make)()


def batch(seed, size=16, n=16):
    rng = np.random.default_rng(seed)
    return Batch(
        image=rng.integers(0, 256, (n, size, size, 1), np.uint8),
        label=rng.integers(0, CLASSES, n).astype(np.int32),
        mask=np.ones(n, bool),
        index=np.arange(n, dtype=np.int32),
    )


def take_steps(recipe, count):
    """Returns the state before and after some steps, on the host."""
    state, counted = start(recipe), metrics.empty(CLASSES)
    before = jax.device_get(state)
    run = quick_jit(partial(step.train_step, recipe))
    for i in range(count):
        state, counted, _ = run(state, counted, batch(i))
    return before, jax.device_get(state)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4, "ema_decay": 0.9}])
def test_frozen_parameters_and_statistics_are_bitwise_unchanged_after_20_steps(changes):
    before, after = take_steps(make_recipe(selection=TRUNK, **changes), 20)
    jax.tree.map(np.testing.assert_array_equal, after.params["trunk"], before.params["trunk"])
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before.batch_stats)
    if changes:
        # Its average would be itself, and is not kept beside it.
        assert set(after.ema["params"]) == {"dense1", "head"}
        averaged = after.variables()["params"]
        jax.tree.map(np.testing.assert_array_equal, averaged["trunk"], before.params["trunk"])
        np.testing.assert_array_equal(averaged["head"]["bias"], after.ema["params"]["head"]["bias"])
    for layer in ("dense1", "head"):
        for leaf in ("kernel", "bias"):
            assert np.any(after.params[layer][leaf] != before.params[layer][leaf]), (layer, leaf)


def test_frozen_parameters_have_no_optimizer_state():
    def shapes(selection):
        state = jax.eval_shape(lambda: start(make_recipe(selection=selection)))
        return [leaf.shape for leaf in jax.tree.leaves(state.opt_state)], state.params

    whole, params = shapes(Selection())
    frozen, _ = shapes(TRUNK)
    trunk = [leaf.shape for leaf in jax.tree.leaves(params["trunk"])]
    # Two moments each.
    assert sorted(whole) == sorted([*frozen, *trunk, *trunk])


def test_a_frozen_trunk_has_no_backward_pass():
    def convolutions(selection):
        recipe = make_recipe(selection=selection)
        state = jax.eval_shape(lambda: start(recipe))
        with ops.use_backend("flax"):
            text = str(jax.make_jaxpr(partial(step.train_step, recipe))(
                state, metrics.empty(CLASSES), batch(0)))  # fmt: skip
        return len(re.findall(r"conv_general_dilated\[", text))

    # Each convolution, its kernel's gradient and, but for the first, its input's.
    assert convolutions(Selection()) == 4 + 4 + 3
    assert convolutions(TRUNK) == 4


def test_a_frozen_batch_norm_normalises_by_its_running_statistics():
    """One BatchNorm frozen: it sees mean 0 and variance 1, the others their batch."""
    selection = Selection(frozen=("trunk/norm2/*",))
    before, after = take_steps(make_recipe(selection=selection), 3)
    for layer in ("norm1", "norm2", "norm3", "norm4"):
        pairs = zip(*(jax.tree.leaves(s.batch_stats["trunk"][layer]) for s in (before, after)),
                    strict=True)  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in pairs) == (layer == "norm2")

    recipe = make_recipe(selection=Selection(frozen=("trunk/*",)))
    state = start(recipe)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 1))
    evaluated = recipe.model.apply(variables, images, train=False)
    examples = step.Examples(images, jnp.zeros(8, int), jnp.zeros(8, int), jnp.ones(8, bool))
    _, _, (logits, _, _) = step._forward(
        recipe, state.params, state.batch_stats, examples, jax.random.key(1)
    )
    np.testing.assert_allclose(logits, evaluated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_field", [True, False])
def test_a_frozen_batch_norm_of_flax_keeps_its_statistics_however_it_is_called(as_field):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            here, there = ({"use_running_average": not train}, {})[:: 1 if as_field else -1]
            return nn.BatchNorm(**here)(images, **there), nn.BatchNorm(**here)(images, **there)

    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 3)) + 1
    variables = Model().init(jax.random.key(1), images, train=False)
    with frozen_statistics(Selection(frozen=("BatchNorm_0/*",))):
        (kept, moved), new = Model().apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(kept, images, rtol=1e-4)
    assert abs(moved.mean()) < 1e-5
    assert not new["batch_stats"]["BatchNorm_0"]["mean"].any()
    assert new["batch_stats"]["BatchNorm_1"]["mean"].all()


def test_groups_learn_at_their_own_rate():
    """SGD's update is proportional to its rate; the first pattern that matches counts."""
    rates = (("trunk/conv1/*", 0.0), ("trunk/*", 0.25))
    options = {"optimizer": "sgd"}
    before, after = take_steps(make_recipe(**options, rates=rates), 1)
    _, plain = take_steps(make_recipe(**options), 1)

    def moved(state, path):
        return (
            flatten_dict(state.params, sep="/")[path] - flatten_dict(before.params, sep="/")[path]
        )

    for path in flatten_dict(before.params, sep="/"):
        factor = 0.0 if "conv1/" in path else 0.25 if path.startswith("trunk/") else 1.0
        np.testing.assert_allclose(
            moved(after, path), factor * moved(plain, path), rtol=1e-3, atol=1e-7, err_msg=path
        )


def test_patterns_choose_what_is_trained():
    params = {"trunk": {"conv1": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3, "bias": 4}}
    only_head = Selection(trainable=("head/*",))
    assert partition(params, only_head) == ({"head": params["head"]}, {"trunk": params["trunk"]})
    but_biases = Selection(frozen=("*",), trainable=("*/bias",))
    trained, frozen = partition(params, but_biases)
    assert trained == {"trunk": {"conv1": {"bias": 2}}, "head": {"bias": 4}}
    assert join(trained, frozen) == params
    assert partition(params, Selection()) == (params, {})


@pytest.mark.parametrize(
    ("selection", "rates", "message"),
    [
        (
            Selection(("trunc/*",)),
            (),
            "model.frozen: no parameter matches 'trunc/.*begin with head, ",
        ),
        (Selection((), ("haed",)), (), "model.trainable: no parameter matches 'haed'"),
        (Selection(), (("x", 0.1),), "optimizer.rate_factors: no parameter matches 'x'"),
        (Selection(("*",)), (), "model.frozen: nothing is left to train; freeze less"),
    ],
)
def test_patterns_without_effect_are_refused(selection, rates, message):
    params = {"trunk": {"kernel": 1}, "head": {"kernel": 3}}
    with pytest.raises(InputError, match=message):
        check(params, selection, rates)
