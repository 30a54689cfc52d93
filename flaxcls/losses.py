"""Losses: each gives one value and one weight an example; `total` reduces them.

To add a loss, write a function whose keyword arguments are its options and which returns
`(logits, labels) -> Loss`, and enter it in `LOSSES`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def cross_entropy(
    *, class_weights: Sequence[float] | np.ndarray | None = None, label_smoothing: float = 0.0
) -> LossFunction:
    """Softmax cross-entropy, in all cases equal to PyTorch's `cross_entropy` once reduced.

    For integer labels (N,), sum(value * weight) and sum(weight) are the numerator and denominator
    of PyTorch's weighted mean, smoothed as Szegedy et al. (2016), section 7:
    weight = w[y], value * weight = (1 - s) w[y] nll[y] + s / C sum_c w[c] nll[c].
    For soft labels (N, C), value = sum_c w[c] ((1 - s) y[c] + s / C) nll[c] and weight = 1.

    Args:
      class_weights: (C,), finite and not negative; None for ones.
      label_smoothing: s, in [0, 1).

    Returns:
      A function of logits (N, C) and labels int (N,) or float (N, C).

    Raises:
      InputError: an option is out of its range, or a class weight of 0 meets label smoothing
        (PyTorch then charges examples to a denominator that leaves them out); when the function
        is traced: the class weights are not one a class.
    """
    smoothing = float(label_smoothing)
    if not 0 <= smoothing < 1:
        raise InputError(f"loss.label_smoothing: {smoothing} is not in [0, 1); give 0.1, say")
    weights = None if class_weights is None else np.asarray(class_weights, np.float64)
    if weights is not None:
        _check_class_weights(weights, smoothing)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        num_classes = logits.shape[-1]
        if weights is not None and len(weights) != num_classes:
            raise InputError(
                f"loss.class_weights: {len(weights)} weights for {num_classes} classes; "
                "give one a class"
            )
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        nll = -jax.nn.log_softmax(logits.astype(dtype))
        class_weight = (
            jnp.ones(num_classes, dtype) if weights is None else jnp.asarray(weights, dtype)
        )
        if labels.ndim == 2:
            smooth = (1 - smoothing) * labels.astype(dtype) + smoothing / num_classes
            value = jnp.sum(class_weight * smooth * nll, axis=-1)
            return Loss(value, jnp.ones_like(value), {})
        weight = class_weight[labels]
        value = jnp.take_along_axis(nll, labels[:, None], axis=-1)[:, 0]
        if smoothing:
            uniform = jnp.mean(class_weight * nll, axis=-1) / weight
            value = (1 - smoothing) * value + smoothing * uniform
        return Loss(value, weight, {})

    return loss


def _check_class_weights(weights: np.ndarray, label_smoothing: float) -> None:
    if weights.ndim != 1 or not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise InputError(
            f"loss.class_weights: {weights.tolist()} must be finite numbers, one a class, "
            "none below 0"
        )
    if not np.any(weights > 0):
        raise InputError("loss.class_weights: all are 0, so that nothing is learnt; raise one")
    if label_smoothing and np.any(weights == 0):
        raise InputError(
            f"loss.class_weights: class {int(np.argmin(weights))} has weight 0, which label "
            "smoothing cannot use; give it a positive weight or set loss.label_smoothing to 0"
        )


LOSSES: dict[str, Callable[..., LossFunction]] = {"cross_entropy": cross_entropy}


def create_loss(name: str, **options: Any) -> LossFunction:
    """Returns the loss `name` of `LOSSES`, a function of logits and labels.

    Raises:
      InputError: the name or an option is unknown, or an option is out of its range.
    """
    if name not in LOSSES:
        raise InputError(f"loss.name: unknown {name!r}; {did_you_mean(name, LOSSES)}")
    known = list(inspect.signature(LOSSES[name]).parameters)
    for option in options:
        if option not in known:
            raise InputError(f"loss.{option}: not used by {name!r}; {did_you_mean(option, known)}")
    return LOSSES[name](**options)


CLASS_WEIGHTS = ("none", "balanced", "complement", "values")


def class_weights(
    kind: str, counts: Sequence[int] | np.ndarray, values: Sequence[float] = ()
) -> np.ndarray | None:
    """Returns the weights of the classes, float64 (C,), or None for equal ones.

    Args:
      kind: `none`; `balanced`, n / (C n_c), scikit-learn's; `complement`, 1 - n_c / n; `values`.
      counts: (C,), training examples of each class, n in all.
      values: the weights themselves, for `values`.

    Raises:
      InputError: the kind is unknown, `balanced` meets a class without examples, or the values
        are not one positive finite number a class.
    """
    if kind not in CLASS_WEIGHTS:
        raise InputError(
            f"loss.class_weights: unknown {kind!r}; {did_you_mean(kind, CLASS_WEIGHTS)}"
        )
    if kind != "values" and len(values):
        raise InputError(
            f"loss.class_weight_values: not used by {kind!r}; set loss.class_weights to 'values'"
        )
    examples = np.asarray(counts, np.float64)
    if kind == "none":
        return None
    if kind == "balanced":
        if np.any(examples == 0):
            raise InputError(
                f"loss.class_weights: 'balanced' divides by the count of class "
                f"{int(np.argmin(examples))}, which has no training example; use 'complement' or "
                "give the class images"
            )
        return examples.sum() / (len(examples) * examples)
    if kind == "complement":
        return 1 - examples / max(examples.sum(), 1)
    weights = np.asarray(values, np.float64)
    if weights.shape != examples.shape:
        raise InputError(
            f"loss.class_weight_values: {weights.size} numbers for {len(examples)} classes; "
            "give one a class"
        )
    if not np.all(np.isfinite(weights) & (weights > 0)):
        raise InputError(
            f"loss.class_weight_values: {weights.tolist()} must be finite and greater than 0"
        )
    return weights


def total(loss: Loss, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns sum(value * weight) and sum(weight) over the examples of the mask.

    Args:
      loss: of a batch.
      mask: bool (N,); what a row outside of it holds, NaN included, does not count.
    """
    weighted = jnp.where(mask, loss.value * loss.weight, 0)
    return jnp.sum(weighted), jnp.sum(jnp.where(mask, loss.weight, 0))
