"""Weights of the classes: from the numbers of their examples, and as losses apply them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flaxcls.errors import InputError, did_you_mean

CLASS_WEIGHTS = ("none", "balanced", "complement", "effective_number", "values")


def class_weights(
    kind: str,
    counts: Sequence[int] | np.ndarray,
    values: Sequence[float] = (),
    beta: float | None = None,
) -> np.ndarray | None:
    """Returns the weights of the classes, float64 (C,), or None for equal ones.

    `effective_number` is the class-balanced weighting of Cui et al. (2019), equation 2:
    (1 - beta) / (1 - beta^n_c), scaled so that the weights sum to C.

    Args:
      kind: `none`; `balanced`, n / (C n_c), scikit-learn's; `complement`, 1 - n_c / n;
        `effective_number`; `values`.
      counts: (C,), training examples of each class, n in all.
      values: the weights themselves, for `values`.
      beta: in (0, 1), for `effective_number`: near 0 all weights are 1, near 1 those of `balanced`
        but for a factor.

    Raises:
      InputError: the kind is unknown, `balanced` or `effective_number` meet a class without
        examples, beta is out of its range, or the values are not one positive finite number a
        class.
    """
    if kind not in CLASS_WEIGHTS:
        raise InputError(
            f"loss.class_weights: unknown {kind!r}; {did_you_mean(kind, CLASS_WEIGHTS)}"
        )
    if kind != "values" and len(values):
        raise InputError(
            f"loss.class_weight_values: not used by {kind!r}; set loss.class_weights to 'values'"
        )
    if kind != "effective_number" and beta is not None:
        raise InputError(
            f"loss.beta: not used by {kind!r}; set loss.class_weights to 'effective_number'"
        )
    examples = np.asarray(counts, np.float64)
    if kind == "none":
        return None
    if kind == "complement":
        return 1 - examples / max(examples.sum(), 1)
    if kind == "values":
        return _given(values, len(examples))
    if np.any(examples == 0):
        raise InputError(
            f"loss.class_weights: {kind!r} divides by the count of class "
            f"{int(np.argmin(examples))}, which has no training example; use 'complement' or "
            "give the class images"
        )
    if kind == "balanced":
        return examples.sum() / (len(examples) * examples)
    if beta is None or not 0 < beta < 1:
        raise InputError(f"loss.beta: {beta} is not between 0 and 1; give 0.999, say")
    # 1 - beta**n would keep few digits where beta**n is near 1; the factor 1 - beta cancels.
    weights = -1 / np.expm1(examples * np.log1p(beta - 1))
    return weights * (len(weights) / weights.sum())


def _given(values: Sequence[float], num_classes: int) -> np.ndarray:
    weights = np.asarray(values, np.float64)
    if weights.shape != (num_classes,):
        raise InputError(
            f"loss.class_weight_values: {weights.size} numbers for {num_classes} classes; "
            "give one a class"
        )
    if not np.all(np.isfinite(weights) & (weights > 0)):
        raise InputError(
            f"loss.class_weight_values: {weights.tolist()} must be finite and greater than 0"
        )
    return weights


def checked(
    weights: Sequence[float] | np.ndarray | None, label_smoothing: float = 0.0
) -> np.ndarray | None:
    """Returns the class weights as float64 (C,).

    Raises:
      InputError: they are not finite, below 0 or all 0, or one is 0 and labels are smoothed.
    """
    if weights is None:
        return None
    weights = np.asarray(weights, np.float64)
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
    return weights


def of_classes(weights: np.ndarray | None, num_classes: int, dtype: DTypeLike) -> jax.Array:
    """Returns the class weights as an array (C,), ones for None.

    Raises:
      InputError: they are not one a class.
    """
    if weights is None:
        return jnp.ones(num_classes, dtype)
    if len(weights) != num_classes:
        raise InputError(
            f"loss.class_weights: {len(weights)} weights for {num_classes} classes; "
            "give one a class"
        )
    return jnp.asarray(weights, dtype)


def of_examples(
    weights: np.ndarray | None, labels: jax.Array, num_classes: int, dtype: DTypeLike
) -> jax.Array:
    """Returns the weight of each example (N,): that of its class, or the mean over soft labels.

    Raises:
      InputError: the class weights are not one a class.
    """
    if weights is None:
        return jnp.ones(len(labels), dtype)
    class_weight = of_classes(weights, num_classes, dtype)
    if labels.ndim == 1:
        return class_weight[labels]
    return jnp.sum(class_weight * labels.astype(dtype), axis=-1)
