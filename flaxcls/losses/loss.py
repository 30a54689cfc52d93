"""What a loss says about a batch, how that is reduced, and the checks that losses share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxcls.errors import InputError, did_you_mean


class Loss(NamedTuple):
    """What a loss says about each example of a batch.

    Attributes:
      value: (N,), at least float32.
      weight: (N,), same dtype; the batch's loss is sum(value * weight) / sum(weight).
      parts: (N,) each, by name; terms that `value` is made of, reduced with the same weights.
    """

    value: jax.Array
    weight: jax.Array
    parts: dict[str, jax.Array]


LossFunction = Callable[[Any, jax.Array], Loss]


def total(loss: Loss, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns sum(value * weight) and sum(weight) over the examples of the mask.

    Args:
      loss: of a batch.
      mask: bool (N,); what a row outside of it holds, NaN included, does not count.
    """
    weighted = jnp.where(mask, loss.value * loss.weight, 0)
    return jnp.sum(weighted), jnp.sum(jnp.where(mask, loss.weight, 0))


def single_logits(logits: Any, labels: jax.Array) -> jax.Array:
    """Returns logits (N, C) in at least float32.

    Raises:
      InputError: the logits or the labels are those of a child and its parent.
    """
    # Integer labels of two columns would otherwise pass as soft labels of two classes.
    if isinstance(logits, tuple) or (
        labels.ndim != 1 and not jnp.issubdtype(labels.dtype, jnp.floating)
    ):
        raise InputError(
            "loss.name: this loss takes one label an image, and the model or the data give a "
            "child and its parent; use 'hierarchical'"
        )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def distribution(labels: jax.Array, num_classes: int, dtype: DTypeLike) -> jax.Array:
    """Returns the labels, int (N,) or float (N, C), as (N, C): integer ones become one-hot."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return labels.astype(dtype)


def check_smoothing(label_smoothing: float) -> None:
    """Raises InputError unless the amount of label smoothing is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise InputError(f"loss.label_smoothing: {label_smoothing} is not in [0, 1); give 0.1, say")


def check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises InputError unless the value of `loss.{option}` is one of the choices."""
    if value not in choices:
        known = [str(choice) for choice in choices]
        raise InputError(f"loss.{option}: unknown {value!r}; {did_you_mean(str(value), known)}")


def check_not_negative(option: str, value: float) -> None:
    """Raises InputError unless the number of `loss.{option}` is finite and not below 0."""
    if not 0 <= value < float("inf"):
        raise InputError(f"loss.{option}: {value} must be finite and at least 0; give 1.0, say")
