"""The loss of two labels an image, a child class and its parent."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import InputError
from flaxcls.losses.entropy import KL_REDUCTIONS, cross_entropy, divergence
from flaxcls.losses.loss import Loss, LossFunction, check_choice, check_not_negative

HIERARCHICAL_PARTS = ("child", "parent", "kl")


def hierarchical(
    *,
    parents: Sequence[int] | np.ndarray = (),
    siblings: Sequence[Sequence[float]] | np.ndarray | None = None,
    child_weight: float = 1.0,
    parent_weight: float = 1.0,
    kl_weight: float = 1.0,
    kl_reduction: str = "batchmean",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> LossFunction:
    """Cross-entropy of the child and of the parent, and a pull of the child towards its siblings.

    value = child_weight CE(child) + parent_weight CE(parent) + kl_weight KL(t || softmax(child)),
    where t is the true parent's distribution over its children, 0 elsewhere, and uniform unless
    given; the divergence is that of `kl_divergence`. The parts `child`, `parent` and `kl` are the
    terms as they are, not multiplied by their weights, so that runs that weigh them differently
    compare.
    A class weight is that of the true child and weighs the whole example, all three terms: the
    part `child` is PyTorch's weighted mean, and the loss the weighted sum of the parts as logged.

    Args:
      parents: int (K,), the parent of each child class, in 0..P - 1, each at least once.
      siblings: (P, K), of each parent the distribution over the classes: no number below 0, the sum
        of a row 1, and 0 for classes of other parents; None for uniform ones.
      child_weight, parent_weight, kl_weight: at least 0, not all 0.
      kl_reduction: `batchmean`, the mean of the divergence over examples, or `mean`, over all N K
        terms.
      label_smoothing: of CE(child), in [0, 1).
      class_weights: (K,), finite and not negative; None for ones.

    Returns:
      A function of logits, a tuple of child (N, K) and parent (N, P), and labels int (N, 2) as
      (child, parent).

    Raises:
      InputError: an option is out of its range, or `parents` or `siblings` are not as above; when
        the function is traced: logits or labels are not those of a child and its parent, or K and P
        do not fit.
    """
    term_weights = {"child": child_weight, "parent": parent_weight, "kl": kl_weight}
    for name, weight in term_weights.items():
        check_not_negative(f"{name}_weight", weight)
    if not any(term_weights.values()):
        raise InputError(
            "loss.child_weight, loss.parent_weight and loss.kl_weight are all 0, so that nothing "
            "is learnt; raise one"
        )
    check_choice("kl_reduction", kl_reduction, KL_REDUCTIONS)
    of_child = cross_entropy(class_weights=class_weights, label_smoothing=label_smoothing)
    of_parent = cross_entropy()
    uniform = _sibling_distribution(parents)
    given = uniform if siblings is None else _checked_siblings(siblings, uniform)

    def loss(logits: Any, labels: jax.Array) -> Loss:
        _check_pair(logits, labels, given)
        child, parent = logits
        child = child.astype(jnp.promote_types(child.dtype, jnp.float32))
        target = jnp.asarray(given, child.dtype)[labels[:, 1]]
        child_loss = of_child(child, labels[:, 0])
        parts = {
            "child": child_loss.value,
            "parent": of_parent(parent, labels[:, 1]).value,
            "kl": divergence(target, child, kl_reduction),
        }
        terms = [weight * parts[name] for name, weight in term_weights.items()]
        return Loss(terms[0] + terms[1] + terms[2], child_loss.weight, parts)

    return loss


def _sibling_distribution(parents: Sequence[int] | np.ndarray) -> np.ndarray:
    """Float64 (P, K): of each parent, the uniform distribution over its children."""
    given = np.asarray(parents)
    if not given.size:
        raise InputError(
            "loss.name: 'hierarchical' needs the parent of each class, which these data do not "
            "have; use data with a child and a parent label an image, or another loss"
        )
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or given.min() < 0:
        raise InputError(
            f"the parents of the classes, {given.tolist()}, must be whole numbers from 0, one a "
            "class; correct the data"
        )
    children = np.bincount(given)
    if not children.all():
        raise InputError(
            f"the parents of the classes, {given.tolist()}, leave out parent "
            f"{int(np.argmin(children))}; number them from 0 without a gap"
        )
    return (given == np.arange(len(children))[:, None]) / children[:, None]


def _checked_siblings(
    siblings: Sequence[Sequence[float]] | np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Returns what was given as float64, or raises InputError."""
    given = np.asarray(siblings, np.float64)
    if given.shape != uniform.shape:
        raise InputError(
            f"loss.siblings: shape {given.shape} for {uniform.shape[0]} parents of "
            f"{uniform.shape[1]} classes; give a row a parent and a column a class"
        )
    # A sum of float32 numbers is 1 to about 1e-6.
    proper = np.all(given >= 0, axis=1) & (np.abs(given.sum(axis=1) - 1) < 1e-5)
    if not proper.all():
        row = int(np.argmin(proper))
        raise InputError(
            f"loss.siblings: row {row}, {given[row].tolist()}, is no distribution; give numbers of "
            "at least 0 whose sum is 1"
        )
    strange = np.argwhere((given > 0) & (uniform == 0))
    if len(strange):
        parent, child = strange[0].tolist()
        raise InputError(
            f"loss.siblings: row {parent} has {given[parent, child]} for class {child}, which is "
            "no child of that parent; give 0 there"
        )
    return given


def _check_pair(logits: Any, labels: jax.Array, siblings: np.ndarray) -> None:
    if not isinstance(logits, tuple) or len(logits) != 2:
        raise InputError(
            "loss.name: 'hierarchical' needs the logits of child and parent, and the model gives "
            "one set of logits; choose a hierarchical model or another loss"
        )
    if labels.ndim != 2 or labels.shape[-1] != 2 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"loss.name: 'hierarchical' needs integer labels (N, 2), child and parent, and these "
            f"are {labels.dtype.name} {labels.shape}; give both, without mixup or cutmix"
        )
    given = (logits[1].shape[-1], logits[0].shape[-1])
    if given != siblings.shape:
        raise InputError(
            f"loss.name: 'hierarchical' was told of {siblings.shape[1]} child and "
            f"{siblings.shape[0]} parent classes and the model has {given[1]} and {given[0]}; "
            "build both from the same data"
        )
