"""Losses of the distance between logits and target: squared error and margins."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.losses import weights
from flaxcls.losses.loss import (
    Loss,
    LossFunction,
    check_choice,
    check_not_negative,
    distribution,
    single_logits,
)

ACTIVATIONS = ("none", "softmax")
MARGIN_POWERS = (1, 2)


def mse(
    *, activation: str = "none", class_weights: Sequence[float] | np.ndarray | None = None
) -> LossFunction:
    """Mean squared error, value = 1 / C sum_c (a[c] - y[c])^2, y soft labels or one-hot ones.

    Without class weights the mean over the batch is PyTorch's `mse_loss(a, y)`. On softmax
    outputs it is the score of Brier (1950), divided by C. A class weight weighs the example,
    weight = sum_c y[c] w[c].

    Args:
      activation: what a is: `none`, the logits, or `softmax` of them.
      class_weights: w (C,), finite and not negative; None for ones.

    Returns:
      A function of logits (N, C) and labels int (N,) or float (N, C).

    Raises:
      InputError: an option is out of its range; when the function is traced: the class weights
        are not one a class.
    """
    check_choice("activation", activation, ACTIVATIONS)
    given = weights.checked(class_weights)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        outputs = single_logits(logits, labels)
        num_classes = outputs.shape[-1]
        weight = weights.of_examples(given, labels, num_classes, outputs.dtype)
        if activation == "softmax":
            outputs = jax.nn.softmax(outputs)
        error = outputs - distribution(labels, num_classes, outputs.dtype)
        return Loss(jnp.mean(error**2, axis=-1), weight, {})

    return loss


def multi_margin(
    *,
    margin: float = 1.0,
    p: int = 1,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> LossFunction:
    """Multi-class hinge loss, in all cases equal to PyTorch's `multi_margin_loss` once reduced.

    Weston and Watkins (1999): for integer labels (N,),
    value = w[y] / C sum_{c != y} max(0, margin - logits[y] + logits[c])^p. The weight is 1: as in
    PyTorch the mean divides by N, not by the sum of the class weights.
    For soft labels (N, C), value = sum_k y[k] value(k), value(k) that of the label k; this compares
    all pairs of classes, in memory of (N, C, C).

    Args:
      margin: at least 0.
      p: 1 or 2.
      class_weights: w (C,), finite and not negative; None for ones.

    Returns:
      A function of logits (N, C) and labels int (N,) or float (N, C).

    Raises:
      InputError: an option is out of its range; when the function is traced: the class weights
        are not one a class.
    """
    check_not_negative("margin", margin)
    check_choice("p", p, MARGIN_POWERS)
    given = weights.checked(class_weights)

    def of_label(logits: jax.Array, label: jax.Array, class_weight: jax.Array) -> jax.Array:
        others = jnp.arange(logits.shape[-1]) != label[:, None]
        own = jnp.take_along_axis(logits, label[:, None], axis=-1)
        # relu, not maximum, which would pass on half the gradient where the margin is met exactly.
        hinge = jax.nn.relu(margin - own + logits)
        return class_weight[label] * jnp.mean(jnp.where(others, hinge**p, 0), axis=-1)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        logits = single_logits(logits, labels)
        n, num_classes = logits.shape
        class_weight = weights.of_classes(given, num_classes, logits.dtype)
        if labels.ndim == 1:
            value = of_label(logits, labels, class_weight)
        else:
            every = jnp.broadcast_to(jnp.arange(num_classes)[:, None], (num_classes, n))
            values = jax.vmap(of_label, (None, 0, None), out_axes=1)(logits, every, class_weight)
            value = jnp.sum(labels.astype(logits.dtype) * values, axis=-1)
        return Loss(value, jnp.ones_like(value), {})

    return loss
