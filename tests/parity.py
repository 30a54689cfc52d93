"""What the parity tests share: random weights on both sides, logits, gradients, errors."""

from functools import partial

import jax
import numpy as np
import reference_torch as reference
import torch

from flaxcls import ops

# Half the time to compile, the same XLA operators.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = partial(jax.jit, compiler_options=ops.compiler_options() | QUICK)


def random_variables(model, images, dtype, seed=0):
    """Variables of the model with every leaf random, so that none can hide behind a 0 or 1."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        elif kind == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            values = rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape)
        else:
            values = rng.normal(0, 0.1, leaf.shape)
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().numpy().astype(np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def logits_of(model, variables, images, train):
    @quick_jit
    def run(variables, images):
        return model.apply(variables, images, train=train, mutable=["batch_stats"])

    return run(variables, images)


def assert_same_gradients(model, variables, twin, images, logits_of_output=lambda output: output):
    """All parameter gradients of the cross-entropy in training, both sides in float64, to 1e-8.

    `logits_of_output` picks what the loss is taken of where the output is more than logits.
    """
    logits = partial(logits_of_output)

    @quick_jit
    def gradients(params, stats):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            output, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
            log_probabilities = jax.nn.log_softmax(logits(output))
            classes = log_probabilities.shape[-1]
            labels = np.arange(len(images)) % classes
            return -log_probabilities[np.arange(len(images)), labels].mean()

        return jax.grad(loss)(params)

    ours = gradients(variables["params"], variables.get("batch_stats", {}))
    theirs = logits(twin.train()(nchw(images)))
    labels = torch.arange(len(images)) % theirs.shape[1]
    torch.nn.functional.cross_entropy(theirs, labels).backward()
    theirs = reference.gradients(twin, variables["params"])

    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(ours))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    # A bias in front of BatchNorm has no gradient but rounding: the floor is the tree's.
    errors = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest), ours, theirs
    )
    assert max(jax.tree.leaves(errors)) < 1e-8, errors
