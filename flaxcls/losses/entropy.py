"""Losses of the log-probability: cross-entropy, focal loss and the Kullback-Leibler divergence."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from flaxcls.errors import InputError
from flaxcls.losses import weights
from flaxcls.losses.loss import (
    Loss,
    LossFunction,
    check_choice,
    check_not_negative,
    check_smoothing,
    distribution,
    single_logits,
)

FOCAL_FORMS = ("softmax", "sigmoid")
KL_REDUCTIONS = ("batchmean", "mean")


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
    check_smoothing(smoothing)
    given = weights.checked(class_weights, smoothing)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        nll = -jax.nn.log_softmax(single_logits(logits, labels))
        num_classes = nll.shape[-1]
        class_weight = weights.of_classes(given, num_classes, nll.dtype)
        if labels.ndim == 2:
            smooth = (1 - smoothing) * labels.astype(nll.dtype) + smoothing / num_classes
            value = jnp.sum(class_weight * smooth * nll, axis=-1)
            return Loss(value, jnp.ones_like(value), {})
        weight = class_weight[labels]
        value = jnp.take_along_axis(nll, labels[:, None], axis=-1)[:, 0]
        if smoothing:
            uniform = jnp.mean(class_weight * nll, axis=-1) / weight
            value = (1 - smoothing) * value + smoothing * uniform
        return Loss(value, weight, {})

    return loss


def focal(
    *,
    form: str = "softmax",
    alpha: Sequence[float] | np.ndarray = (),
    gamma: float = 2.0,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> LossFunction:
    """Focal loss, Lin et al. (2017), section 3: easy examples count less.

    With f(b) = (1 - exp(-b))^gamma b and integer labels, weight = w[y] and
    `softmax`: value = alpha[y] f(-log softmax(logits)[y]), that is
    alpha[y] (1 - p[y])^gamma (-log p[y]); without alpha and with gamma = 0 it is `cross_entropy`.
    `sigmoid`: value = sum_c alpha[c] f(bce[c]), bce[c] the binary cross-entropy of logit c with
    the target 1 for c = y and 0 for others. Lin et al. give the targets 0 the factor 1 - alpha;
    here alpha[c] belongs to the class, whatever the target.
    For soft labels (N, C), value = sum_k y[k] w[k] value(k), value(k) that of the label k, and
    weight = 1.

    Args:
      form: `softmax` or `sigmoid`.
      alpha: () for 1, one number for all classes, or one a class; finite and not negative.
      gamma: at least 0.
      class_weights: w (C,), finite and not negative; None for ones.

    Returns:
      A function of logits (N, C) and labels int (N,) or float (N, C).

    Raises:
      InputError: an option is out of its range; when the function is traced: alpha or the class
        weights are not one a class.
    """
    check_choice("form", form, FOCAL_FORMS)
    check_not_negative("gamma", gamma)
    factors = np.asarray(alpha if len(alpha) else (1.0,), np.float64)
    if not np.all(np.isfinite(factors) & (factors >= 0)) or not np.any(factors > 0):
        raise InputError(
            f"loss.alpha: {factors.tolist()} must be finite numbers, none below 0 and not all 0; "
            "give (0.25,), say"
        )
    given = weights.checked(class_weights)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        logits = single_logits(logits, labels)
        num_classes = logits.shape[-1]
        if len(factors) not in (1, num_classes):
            raise InputError(
                f"loss.alpha: {len(factors)} numbers for {num_classes} classes; give one in all, "
                "or one a class"
            )
        factor = jnp.asarray(factors, logits.dtype)
        class_weight = weights.of_classes(given, num_classes, logits.dtype)
        share = distribution(labels, num_classes, logits.dtype)
        if labels.ndim == 2:
            share = share * class_weight
        if form == "softmax":
            terms = share * _focused(-jax.nn.log_softmax(logits), gamma)
        else:
            others = jnp.sum(share, axis=-1, keepdims=True) - share
            present = _focused(jax.nn.softplus(-logits), gamma)
            absent = _focused(jax.nn.softplus(logits), gamma)
            terms = share * present + others * absent
        value = jnp.sum(factor * terms, axis=-1)
        weight = class_weight[labels] if labels.ndim == 1 else jnp.ones_like(value)
        return Loss(value, weight, {})

    return loss


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _focused(nll: jax.Array, gamma: float) -> jax.Array:
    """(1 - p)^gamma (-log p) of nll = -log p."""
    return (-jnp.expm1(-nll)) ** gamma * nll


@_focused.defjvp
def _focused_jvp(gamma: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    # Derived term by term, (1 - p)^(gamma - 1) is infinite at p = 1 for gamma < 1, and times 0 NaN.
    (nll,), (tangent,) = primals, tangents
    focus = (-jnp.expm1(-nll)) ** gamma
    positive = nll > 0
    ratio = jnp.where(positive, nll / jnp.expm1(jnp.where(positive, nll, 1)), 1)
    return focus * nll, focus * (1 + gamma * ratio) * tangent


def kl_divergence(
    *,
    kl_reduction: str = "batchmean",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> LossFunction:
    """KL(t || softmax(logits)) = sum_c t[c] (log t[c] - log softmax(logits)[c]), 0 log 0 = 0.

    Kullback and Leibler (1951), equation 2.4; PyTorch's `kl_div(log_softmax(logits), t)`. The
    target is t = (1 - s) y + s / C of soft labels y or of one-hot ones. A class weight weighs the
    example, weight = sum_c y[c] w[c], since a sum of weighted terms would be no divergence.

    Args:
      kl_reduction: `batchmean`, the mean over examples, or `mean`, over all N C terms.
      label_smoothing: s, in [0, 1).
      class_weights: w (C,), finite and not negative; None for ones.

    Returns:
      A function of logits (N, C) and labels int (N,) or float (N, C).

    Raises:
      InputError: an option is out of its range; when the function is traced: the class weights
        are not one a class.
    """
    smoothing = float(label_smoothing)
    check_smoothing(smoothing)
    check_choice("kl_reduction", kl_reduction, KL_REDUCTIONS)
    given = weights.checked(class_weights)

    def loss(logits: jax.Array, labels: jax.Array) -> Loss:
        logits = single_logits(logits, labels)
        num_classes = logits.shape[-1]
        weight = weights.of_examples(given, labels, num_classes, logits.dtype)
        target = distribution(labels, num_classes, logits.dtype)
        target = (1 - smoothing) * target + smoothing / num_classes
        return Loss(divergence(target, logits, kl_reduction), weight, {})

    return loss


def divergence(target: jax.Array, logits: jax.Array, kl_reduction: str) -> jax.Array:
    """Returns KL(target || softmax(logits)) of each row (N,), divided by C for `mean`."""
    terms = xlogy(target, target) - target * jax.nn.log_softmax(logits)
    reduce = jnp.mean if kl_reduction == "mean" else jnp.sum
    return reduce(terms, axis=-1)
