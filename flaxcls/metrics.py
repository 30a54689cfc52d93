"""Metrics: a state on the device that batches update, states merge, and the host reads at the end.

One confusion matrix of exact counts holds accuracy, precision, recall and F1 of every class.
"""

from collections.abc import Sequence
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import InputError
from flaxcls.losses import Loss


@flax.struct.dataclass
class RunningSum(clu.metrics.Metric):
    """A sum that keeps what rounding loses (Knuth, TAOCP vol. 2, 4.2.2, theorem B).

    Plain float32 drifts by 1e-4 relative over a million examples; this stays near 1e-7.

    Attributes:
      total: float (), float64 where JAX has it enabled, else float32.
      lost: like `total`; the exact sum is near total + lost.
    """

    total: jax.Array
    lost: jax.Array

    @classmethod
    def empty(cls) -> "RunningSum":
        return cls(jnp.zeros((), jnp.result_type(float)), jnp.zeros((), jnp.result_type(float)))

    def add(self, terms: jax.Array) -> "RunningSum":
        """Adds the sum of terms (N,)."""
        batch = jnp.sum(terms, dtype=self.total.dtype)
        return self.merge(RunningSum(batch, jnp.zeros_like(batch)))

    def merge(self, other: "RunningSum") -> "RunningSum":
        total = self.total + other.total
        of_other = total - self.total  # what of `other.total` has arrived in `total`
        of_self = total - of_other
        lost = (self.total - of_self) + (other.total - of_other)
        return RunningSum(total, (self.lost + other.lost) + lost)

    def compute(self) -> float:
        """Returns the sum as float64; call it on host arrays."""
        return float(np.float64(self.total) + np.float64(self.lost))


@flax.struct.dataclass
class MetricState(clu.metrics.Metric):
    """What has been counted so far; `empty` makes one, `compute` and `confusion` read it.

    Attributes:
      confusion_matrix: int32 (C, C), rows the truth, columns the prediction.
      count: int32 (), examples seen, without masked ones.
      correct: int32 (), of them, those whose first largest logit is the label's.
      top_k_correct: int32 (), those whose label is among the k largest logits.
      loss: sum of value * weight.
      weight: sum of weight.
      parts: sums of part * weight.
      first_bad_step: int32 (), the first step with a loss that is not finite, -1 while none is.
      top_k: k; 0 where k is not smaller than C.
      parent_correct: int32 (), examples whose parent was predicted; None without parents.
      parents: of a hierarchical model, the parent of each class; () for others.
    """

    confusion_matrix: jax.Array
    count: jax.Array
    correct: jax.Array
    top_k_correct: jax.Array
    loss: RunningSum
    weight: RunningSum
    parts: dict[str, RunningSum]
    first_bad_step: jax.Array
    top_k: int = flax.struct.field(pytree_node=False)
    parent_correct: jax.Array | None = None
    parents: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def update(
        self, logits: Any, labels: jax.Array, loss: Loss, mask: jax.Array, step: jax.Array
    ) -> "MetricState":
        """Returns the state with a batch added.

        Args:
          logits: float (N, C), or a tuple of those and the parents', (N, P).
          labels: int (N,), or (N, 2) as (class, parent).
          loss: of the batch, with the parts that `empty` was told of.
          mask: bool (N,); what a row outside of it holds, NaN included, does not count.
          step: int (), the step that the batch belongs to.
        """
        if loss.parts.keys() != self.parts.keys():
            raise ValueError(
                f"the loss has the parts {sorted(loss.parts)}, the state {sorted(self.parts)}; "
                "give the loss's to `empty`"
            )
        parent_correct = self.parent_correct
        if parent_correct is not None:
            logits, parent_logits = logits
            labels, parent_labels = labels[:, 0], labels[:, 1]
            right = mask & (_argmax(parent_logits) == parent_labels)
            parent_correct = parent_correct + jnp.sum(right, dtype=jnp.int32)
        num_classes = logits.shape[-1]
        predictions = _argmax(logits)
        correct = mask & (predictions == labels)
        # A label out of range must not land in another class's cell: `confusion` misses it.
        counted = mask & (labels >= 0) & (labels < num_classes)
        cell = jnp.where(counted, labels * num_classes + predictions, num_classes**2)
        # A sort makes the partitioner gather N cells from the devices; without it, it adds up a
        # matrix from each (1000 classes: 4 MB a step instead of 4 N bytes).
        cells = self.confusion_matrix.reshape(-1).at[jnp.sort(cell)].add(1, mode="drop")
        weighted = jnp.where(mask, loss.value * loss.weight, 0)
        bad = (self.first_bad_step < 0) & ~jnp.all(jnp.isfinite(weighted))
        return self.replace(
            confusion_matrix=cells.reshape(num_classes, num_classes),
            count=self.count + jnp.sum(mask, dtype=jnp.int32),
            correct=self.correct + jnp.sum(correct, dtype=jnp.int32),
            top_k_correct=self.top_k_correct + self._count_top_k(logits, labels, mask),
            loss=self.loss.add(weighted),
            weight=self.weight.add(jnp.where(mask, loss.weight, 0)),
            parts={
                name: total.add(jnp.where(mask, loss.parts[name] * loss.weight, 0))
                for name, total in self.parts.items()
            },
            first_bad_step=jnp.where(bad, jnp.int32(step), self.first_bad_step),
            parent_correct=parent_correct,
        )

    def _count_top_k(self, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        if not self.top_k:
            return jnp.int32(0)
        # Counting the logits ahead of the label's needs no sort. Equal logits rank by class index,
        # as in argmax, so that the first of the top k is the prediction; NaN ranks ahead of all.
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        classes = jnp.arange(logits.shape[-1])
        behind = (logits < own) | ((logits == own) & (classes >= labels[:, None]))
        ahead = logits.shape[-1] - jnp.sum(behind, axis=-1)
        return jnp.sum(mask & (ahead < self.top_k), dtype=jnp.int32)

    def merge(self, other: "MetricState") -> "MetricState":
        """Returns the state of both sets of batches; the order does not matter."""
        first, second = self.first_bad_step, other.first_bad_step
        earlier = jnp.where(
            (first < 0) | (second < 0), jnp.maximum(first, second), jnp.minimum(first, second)
        )
        return self.replace(
            confusion_matrix=self.confusion_matrix + other.confusion_matrix,
            count=self.count + other.count,
            correct=self.correct + other.correct,
            top_k_correct=self.top_k_correct + other.top_k_correct,
            loss=self.loss.merge(other.loss),
            weight=self.weight.merge(other.weight),
            parts={name: total.merge(other.parts[name]) for name, total in self.parts.items()},
            first_bad_step=earlier,
            parent_correct=jax.tree.map(jnp.add, self.parent_correct, other.parent_correct),
        )

    def compute(self) -> dict[str, float | list[float]]:
        """Fetches the state and returns what the function `compute` does."""
        return compute(jax.device_get(self))


def empty(
    num_classes: int,
    top_k: int = 5,
    parts: tuple[str, ...] = (),
    parents: tuple[int, ...] = (),
) -> MetricState:
    """Returns a state that has seen nothing.

    Args:
      num_classes: C.
      top_k: k of the top-k accuracy, which is left out where k is not smaller than C.
      parts: names of the loss's parts.
      parents: of a hierarchical model, the parent of each class, (C,).
    """

    def zero() -> jax.Array:
        # Arrays of their own, since the step donates the state.
        return jnp.zeros((), jnp.int32)

    return MetricState(
        confusion_matrix=jnp.zeros((num_classes, num_classes), jnp.int32),
        count=zero(),
        correct=zero(),
        top_k_correct=zero(),
        loss=RunningSum.empty(),
        weight=RunningSum.empty(),
        parts={name: RunningSum.empty() for name in parts},
        first_bad_step=jnp.full((), -1, jnp.int32),
        top_k=top_k if top_k < num_classes else 0,
        parent_correct=zero() if parents else None,
        parents=parents,
    )


def confusion(host_state: MetricState) -> np.ndarray:
    """Returns the confusion matrix, int (C, C): rows the truth, columns the prediction.

    Raises:
      InputError: examples were counted whose label is no class.
    """
    matrix = np.asarray(host_state.confusion_matrix)
    missing = int(host_state.count) - int(matrix.sum(dtype=np.int64))
    if missing:
        raise InputError(
            f"labels: {missing} of {int(host_state.count)} examples have a label outside "
            f"0..{len(matrix) - 1}; correct the labels or the number of classes"
        )
    return matrix


def running(host_state: MetricState) -> tuple[float, float]:
    """Returns the loss and accuracy so far (NaN before any example), for a progress bar.

    Args:
      host_state: NumPy; `confusion_matrix` is not read and may be None, so as not to be fetched.
    """
    loss = _ratio(host_state.loss.compute(), host_state.weight.compute())
    return loss, _ratio(int(host_state.correct), int(host_state.count))


def compute(host_state: MetricState) -> dict[str, float | list[float]]:
    """Returns the metrics of a state that was fetched with `jax.device_get`, in float64.

    Precision, recall and F1 are scikit-learn's with `zero_division=0`: macro is the plain mean over
    the classes that occur in truth or prediction, as where scikit-learn is given no `labels`;
    weighted the mean by support. Without any example, these are 0, loss and accuracy NaN.

    Returns:
      `loss`, each part, `accuracy`, of a hierarchical model `parent_accuracy` and
      `errors_within_parent`, `top_{k}` where k is smaller than the number of classes,
      `{precision,recall,f1}_{macro,weighted}`, and lists with a number a class: `precision`,
      `recall`, `f1`, `support` (int), `class_accuracy` (the recall).

    Raises:
      InputError: examples were counted whose label is no class.
    """
    matrix = confusion(host_state).astype(np.int64)
    hits, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    per_class = {
        "precision": _ratios(hits, predicted),
        "recall": _ratios(hits, support),
        "f1": _ratios(2 * hits, support + predicted),
    }
    loss, accuracy = running(host_state)
    weight, count = host_state.weight.compute(), int(host_state.count)
    result: dict[str, float | list[float]] = {"loss": loss}
    for name, total in host_state.parts.items():
        result[name] = _ratio(total.compute(), weight)
    result["accuracy"] = accuracy
    if host_state.parent_correct is not None:
        result["parent_accuracy"] = _ratio(int(host_state.parent_correct), count)
        result["errors_within_parent"] = errors_within_parent(matrix, host_state.parents)
    if host_state.top_k:
        result[f"top_{host_state.top_k}"] = _ratio(int(host_state.top_k_correct), count)
    occurs = support + predicted > 0
    for name, values in per_class.items():
        result[f"{name}_macro"] = float(np.mean(values[occurs])) if count else 0.0
    for name, values in per_class.items():
        result[f"{name}_weighted"] = float(np.average(values, weights=support)) if count else 0.0
    result |= {name: values.tolist() for name, values in per_class.items()}
    result["support"] = support.tolist()
    result["class_accuracy"] = per_class["recall"].tolist()
    return result


def errors_within_parent(confusion_matrix: np.ndarray, parents: Sequence[int]) -> float:
    """Returns the share of errors that stay within the right parent; 1 where there is no error.

    Args:
      confusion_matrix: int (C, C), rows the truth.
      parents: the parent of each class, (C,).
    """
    siblings = np.equal.outer(np.asarray(parents), np.asarray(parents))
    hits = np.trace(confusion_matrix)
    errors = confusion_matrix.sum() - hits
    return float((confusion_matrix[siblings].sum() - hits) / errors) if errors else 1.0


def _argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis, int32, which XLA:CPU runs 2 to 4 times slower."""
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = (logits == jnp.max(logits, axis=-1, keepdims=True)) | jnp.isnan(logits)
    return jnp.min(jnp.where(largest, classes, logits.shape[-1] - 1), axis=-1)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return np.divide(
        numerators, denominators, out=np.zeros(len(numerators)), where=denominators != 0
    )
