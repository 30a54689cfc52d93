"""Exact evaluation: every example of a split counted once, whatever the batch or the devices."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxcls import metrics, runlog
from flaxcls.data.dataset import Dataset, Split
from flaxcls.experiment import Experiment
from flaxcls.sharding import fetch, replicated
from flaxcls.step import compile_eval_step


class Evaluation(NamedTuple):
    """What evaluating a split gave.

    Attributes:
      record: the metrics, as `metrics.compute` returns them.
      confusion: int (C, C), rows the truth.
      first_bad_step: 0 where a loss was not finite, else -1.
      logits: float (N, C), or a tuple with those of the parents, where they were asked for.
    """

    record: dict[str, Any]
    confusion: np.ndarray
    first_bad_step: int
    logits: Any


class Evaluator:
    """Evaluates an experiment's variables; the step is compiled once for all splits and epochs."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        sharding = replicated(experiment.mesh)
        self._step = compile_eval_step(experiment.recipe, sharding)
        self._empty = jax.jit(experiment.empty_metrics, out_shardings=sharding)

    def __call__(
        self,
        variables: Any,
        split: str,
        *,
        keep_logits: bool = False,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Evaluation:
        """Evaluates one split.

        Args:
          variables: {"params", "batch_stats"}, on the devices.
          split: a key of the experiment's feeds.
          keep_logits: bring the logits to the host too.
          on_step: called with the number of batches done, for a progress bar.
        """
        feed = self._experiment.data.feeds[split]
        state = self._empty()
        outputs = []
        with feed.evaluate(self._experiment.eval_batch_size) as batches:
            for step, (_, batch) in enumerate(batches, start=1):
                state, logits = self._step(variables, state, batch, feed.resident)
                outputs.append(logits)
                if len(outputs) > 2:
                    # Not further ahead of the device than it takes to keep it busy.
                    jax.block_until_ready(outputs[-3])
                    if not keep_logits:
                        del outputs[0]
                on_step(step)
        host = fetch(state)
        logits = None
        if keep_logits:
            count = len(feed.split)
            logits = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *fetch(outputs))
        return Evaluation(
            metrics.compute(host), metrics.confusion(host), int(host.first_bad_step), logits
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities, float64 (N, C), of logits (N, C)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def write_predictions(folder: Path, name: str, split: Split, logits: Any, dataset: Dataset) -> None:
    """Writes `NAME.npz` and `NAME.csv`, one row an example in the split's order.

    The `.npz` holds index int32 (N,), label int32 (N,), logits float (N, C), probabilities float32
    (N, C) and class_names; of a hierarchical model also parent_label, parent_logits and
    parent_names. The `.csv` has index, file, truth, prediction and its probability, and the
    parent's truth and prediction. Names that are not UTF-8 are written as `runlog.encode` does.
    """
    class_names, parent_names = dataset.class_names, dataset.parent_names or ()
    parent_logits = None
    if isinstance(logits, tuple):
        logits, parent_logits = logits
    probabilities = softmax(logits)
    predictions = logits.argmax(axis=1)
    index = np.arange(len(logits), dtype=np.int32)
    arrays = {
        "index": index,
        "label": split.labels,
        "logits": logits,
        "probabilities": probabilities.astype(np.float32),
        "class_names": np.array(class_names),
    }
    header = ["index", "file", "truth", "prediction", "probability"]
    if parent_logits is not None:
        arrays |= {
            "parent_label": split.parents,
            "parent_logits": parent_logits,
            "parent_names": np.array(parent_names),
        }
        header += ["parent", "parent_prediction"]
    runlog.write_arrays(folder / f"{name}.npz", arrays)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    for i, (label, guess) in enumerate(zip(split.labels, predictions, strict=True)):
        file = split.names[i] if split.names is not None else ""
        row = [i, file, class_names[label], class_names[guess], f"{probabilities[i, guess]:.6f}"]
        if parent_logits is not None and split.parents is not None:
            row += [parent_names[split.parents[i]], parent_names[parent_logits[i].argmax()]]
        writer.writerow(row)
    runlog.write_bytes(folder / f"{name}.csv", runlog.encode(table.getvalue()))
