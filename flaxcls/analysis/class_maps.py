"""The ways to draw where an image speaks for a class; `explain.Explainer` compiles one of them.

Each takes (variables, images float (N, S, S, C), classes int (N,), -1 for the predicted) last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.analysis.feature_maps import Cut, Path, PooledHead, Variables, apply, at, neutral, sown

# Occlusion: positions of the patch along a side, and its width in the distance between two.
GRID = 10
PATCH = 2.5


class Drawn(NamedTuple):
    """logits (N, K); raw (N, h, w); classes (N,); evidence, the map where positive means for."""

    logits: jax.Array
    raw: jax.Array
    classes: jax.Array
    evidence: jax.Array


def _chosen(classes: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.where(classes < 0, logits.argmax(-1), classes)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cam(
    cut: Cut, pooled: PooledHead, variables: Variables, images: jax.Array, classes: jax.Array
) -> Drawn:
    """The map weighted by the kernel of the layer that sees its mean (Zhou et al. 2016, eq. 2)."""
    features, rest = cut.trunk(variables, images)
    logits = cut.head(variables, images, features, rest)
    classes = _chosen(classes, logits)
    kernel = at(variables, pooled.path)["kernel"]
    raw = _weighted(features, kernel[:, classes].T)
    evidence = raw
    if pooled.is_factor:
        # Where the other factor is negative, so is what the class gains from this one.
        other = cut.head(neutral(variables, pooled.path), images, features, rest)
        sign = jnp.sign(jnp.take_along_axis(other, classes[:, None], 1))
        evidence = raw * sign[:, :, None]
    return Drawn(logits, raw, classes, evidence)


def gradient_map(
    cut: Cut,
    weigh: Callable[..., jax.Array],
    variables: Variables,
    images: jax.Array,
    classes: jax.Array,
) -> Drawn:
    """The map weighted by the gradients of the class's logit."""
    features, rest = cut.trunk(variables, images)
    logits, pull = jax.vjp(lambda f: cut.head(variables, images, f, rest), features)
    classes = _chosen(classes, logits)
    (gradient,) = pull(jax.nn.one_hot(classes, logits.shape[1], dtype=logits.dtype))
    weights = weigh(_at_least_float32(features), _at_least_float32(gradient))
    raw = _weighted(features, weights)
    return Drawn(logits, raw, classes, raw)


def mean_gradient(features: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM's weights (N, C) of maps (N, h, w, C) (Selvaraju et al. 2017, eq. 1)."""
    return gradient.mean((1, 2))


def second_order_weights(features: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM++'s weights (N, C) of maps (N, h, w, C) (Chattopadhay et al. 2018, eq. 10 and 19).

    Of exp(logit), whose higher derivatives are powers of the logit's gradient times exp(logit);
    this positive factor would scale the whole map and is left out. Only what is positive of the map
    is summed, as after a ReLU: otherwise the denominator could pass through 0.
    """
    total = jnp.maximum(features, 0.0).sum((1, 2), keepdims=True)
    positive = jnp.maximum(gradient, 0.0)
    # g^2 / (2 g^2 + A g^3), shortened by g^2.
    alpha = 1 / (2 + total * positive)
    return (alpha * positive).sum((1, 2))


def _weighted(features: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums the channels of (N, h, w, C) with weights (N, C), in at least float32."""
    features = _at_least_float32(features)
    return jnp.einsum("nhwc,nc->nhw", features, weights.astype(features.dtype), precision="highest")


def attention_leaves(found: list[tuple[Path, Any]]) -> list[Any]:
    """Sown weights of attention: maps (N, h, w), or (N, h, w, a, a, heads) of neighbourhoods."""
    named = [leaf for path, leaf in found if path[-1].startswith("attention")]
    return [leaf for leaf in named if leaf.ndim in (3, 6) and min(leaf.shape[1:3]) > 1]


def attention(
    model: nn.Module, variables: Variables, images: jax.Array, classes: jax.Array
) -> Drawn:
    """How much each place is looked at, in the mean of all maps of attention that the model has."""
    logits, intermediates = apply(model, variables, images)
    maps = [_looked_at(_at_least_float32(leaf)) for leaf in attention_leaves(sown(intermediates))]
    h, w = max(m.shape[1:] for m in maps)
    n = len(images)
    # Weights of sum 1 become densities of mean 1, so that maps of any size compare.
    enlarged = [
        jax.image.resize(m / m.mean((1, 2), keepdims=True), (n, h, w), "bilinear") for m in maps
    ]
    raw = sum(enlarged[1:], start=enlarged[0]) / len(maps)
    # Weights are never 0: heat begins at the least of them.
    return Drawn(logits, raw, _chosen(classes, logits), raw - raw.min((1, 2), keepdims=True))


def _looked_at(weights: jax.Array) -> jax.Array:
    """Sums, where the weights are of neighbourhoods, what each place gets from its neighbours."""
    if weights.ndim == 3:
        return weights
    n, h, w, rows, columns, _ = weights.shape
    weights = weights.mean(-1)
    total = jnp.zeros((n, h + rows - 1, w + columns - 1), weights.dtype)
    for i in range(rows):
        for j in range(columns):
            total = total.at[:, i : i + h, j : j + w].add(weights[..., i, j])
    top, left = rows // 2, columns // 2
    return total[:, top : top + h, left : left + w]


def occlusion(
    model: nn.Module, variables: Variables, images: jax.Array, classes: jax.Array
) -> Drawn:
    """How much hiding each place lowers the logarithm of the class's probability."""
    logits, _ = apply(model, variables, images)
    classes = _chosen(classes, logits)
    size = images.shape[1]
    grid = min(GRID, size)
    hidden = jnp.asarray(_patches(size, grid))

    def score(logits: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], 1)[:, 0]

    def occluded(place: jax.Array) -> jax.Array:
        rows, columns = hidden[place // grid], hidden[place % grid]
        patch = rows[:, None] & columns[None, :]
        # 0 is the mean of the training images.
        return score(apply(model, variables, jnp.where(patch[:, :, None], 0, images))[0])

    scores = jax.lax.map(occluded, jnp.arange(grid * grid))
    raw = (score(logits) - scores).T.reshape(-1, grid, grid)
    return Drawn(logits, raw, classes, raw)


def _patches(size: int, grid: int) -> np.ndarray:
    """Bool (grid, size), the pixels along a side that the patch at each place hides."""
    distance = size / grid
    centres = (np.arange(grid)[:, None] + 0.5) * distance
    half = max(PATCH * distance, 1.0) / 2
    return np.abs(np.arange(size) + 0.5 - centres) <= half
