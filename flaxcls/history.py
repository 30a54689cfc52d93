"""What the metric history of a run says: the best epoch, when to stop, a summary, a verdict.

A history is a list of records in the order in which they were measured, one an epoch and split:
`{"epoch": 3, "split": "val", "step": 120, "loss": 0.21, "accuracy": 0.93, ...}`; values that are
lists hold one number a class. Everything here is a pure function of that list, so that a resumed
run decides exactly as an uninterrupted one. A monitor names one number of it: `val/accuracy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from flaxcls.errors import InputError, did_you_mean

Record = dict[str, Any]

SPLITS = ("train", "val", "test")
SPLIT_TITLES = {"train": "train", "val": "validation", "test": "test"}

# What a record holds besides metrics: where and how fast they were measured.
_BOOKKEEPING = {
    "epoch",
    "split",
    "step",
    "learning_rate",
    "seconds",
    "images_per_second",
    "wait_share",
    "peak_memory_bytes",
    "compile_seconds",
    "elapsed_seconds",
}
_SCORES = ("accuracy", "top_", "precision", "recall", "f1", "errors_within_parent")


def metric_mode(monitor: str) -> Literal["min", "max"]:
    """ "max" for accuracies, top_k, precision, recall, F1 and errors_within_parent; else "min"."""
    metric = monitor.rsplit("/", 1)[-1]
    return "max" if any(score in metric for score in _SCORES) else "min"


def check_monitor(
    monitor: str, metrics: Iterable[str], splits: Sequence[str] = SPLITS
) -> tuple[str, str]:
    """Splits `val/accuracy` into ("val", "accuracy").

    Raises InputError with the nearest valid name where `monitor` is not one of `splits` followed by
    one of `metrics`.
    """
    split, _, metric = monitor.partition("/")
    names = sorted(set(metrics))
    if split in splits and metric in names:
        return split, metric
    valid = [f"{a}/{b}" for a in splits for b in names]
    remedy = did_you_mean(monitor, valid)
    raise InputError(f"no metric is called {monitor!r} (a monitor is split/metric); {remedy}")


def scalars(record: Record) -> dict[str, float]:
    """The metrics of a record that are one number, without step, times and learning rate."""
    return {
        name: _number(value)
        for name, value in record.items()
        if name not in _BOOKKEEPING and not isinstance(value, str | list | tuple | np.ndarray)
    }


def find_record(history: Sequence[Record], epoch: int, split: str) -> Record | None:
    """The record of an epoch and split, the last where there are several, or None."""
    for record in reversed(history):
        if record["epoch"] == epoch and record["split"] == split:
            return record
    return None


def best_record(history: Sequence[Record], monitor: str) -> Record | None:
    """The record with the best value of `monitor`; ties go to the lower loss, then to the first.

    None while the history has no finite value of it. Raises InputError for a metric that the
    records of that split do not have.
    """
    values = _monitored(history, monitor)
    sign = 1.0 if metric_mode(monitor) == "max" else -1.0
    best: Record | None = None
    best_rank = (-math.inf, -math.inf)
    for record, value in values:
        loss = _number(record["loss"])
        rank = (sign * value, -math.inf if math.isnan(loss) else -loss)
        if math.isfinite(value) and rank > best_rank:
            best, best_rank = record, rank
    return best


def should_stop(
    history: Sequence[Record], monitor: str, patience: int | None, min_delta: float = 0.0
) -> bool:
    """Whether early stopping ends the run after the last record.

    True once `patience` values of `monitor` in a row were not better by more than `min_delta`
    than the best before them (NaN never is); None or 0 never stops. The semantics are those of
    EarlyStopping in Keras and PyTorch Lightning.
    """
    if not patience:
        return False
    sign = 1.0 if metric_mode(monitor) == "max" else -1.0
    best, waited = -math.inf, 0
    for _, value in _monitored(history, monitor):
        if sign * value > best + abs(min_delta):
            best, waited = sign * value, 0
        else:
            waited += 1
    return waited >= patience


def summary(
    history: Sequence[Record],
    *,
    model: str,
    params: int,
    monitor: str,
    best: Record | None = None,
    test: Record | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """What `summary.json` holds: the numbers of the best epoch in full precision.

    `best` is the record of the checkpoint that was kept, by default the best by `monitor`.
    `test` is a record or the plain metrics of the best checkpoint on the test split; without it the
    history's own test record of that epoch is taken. `seconds` is the time of the whole run, by
    default the sum over the history. A split that was not measured is None. There are no paths
    and no dates in it, so that summaries of runs can be compared.
    """
    best = best or best_record(history, monitor)
    epochs = max((record["epoch"] for record in history), default=0)
    best_epoch = best["epoch"] if best else epochs
    val = find_record(history, best_epoch, "val")
    test = test if test is not None else find_record(history, best_epoch, "test")
    trained = [record for record in history if record["split"] == "train"]
    train_seconds = sum(_number(record.get("seconds")) for record in trained)
    images = sum(
        _number(record.get("seconds")) * _number(record.get("images_per_second"))
        for record in trained
    )
    if seconds is None:
        seconds = sum(float(record.get("seconds") or 0.0) for record in history)
    return {
        "model": model,
        "params": int(params),
        "best_epoch": int(best_epoch),
        "epochs": int(epochs),
        "seconds": float(seconds),
        "images_per_second": images / train_seconds if train_seconds > 0 else None,
        "val": scalars(val) if val else None,
        "test": scalars(test) if test else None,
    }


def verdict(history: Sequence[Record], *, can_go_on: bool = True) -> str:
    """One sentence: improving still, flat, overfitting or getting worse, with the figures.

    `can_go_on` is false where the schedule is laid out over the epochs of the run, which more
    epochs would be another run of.

    Judges the validation loss (the training loss where there is no validation), smoothed by a
    running median and held against its own noise. Overfitting means that it stands clearly above
    its minimum of at least three measurements ago while the training loss has fallen since.
    """
    train, val = _Curve(history, "train"), _Curve(history, "val")
    for curve in (train, val):
        if curve.diverged is not None:
            return (
                f"Diverged: the {curve.title} loss is not finite since epoch {curve.diverged}; "
                "lower the learning rate or clip the gradients."
            )
    judged = val if len(val.loss) else train
    if not len(judged.loss):
        return "No epoch has been measured yet, so there is nothing to judge."
    figures = "; ".join(curve.figures() for curve in (train, val) if len(curve.loss))
    perfect = _perfect(train, val)

    low = int(np.argmin(judged.smooth))
    epoch, start, end = judged.epochs[low], judged.smooth[low], judged.smooth[-1]
    rise = end - start
    if len(judged.loss) - 1 - low >= 3 and rise > max(0.05 * abs(start), 3 * judged.noise):
        rose = f"{judged.title} loss rose from {decimal(start)} to {decimal(end)}"
        before, after = train.at(epoch), train.at(judged.epochs[-1])
        if judged is val and after < before:
            fell = f"train loss fell from {decimal(before)} to {decimal(after)}"
            return (
                f"Overfitting since epoch {epoch}: {fell} while {rose} (accuracy: train "
                f"{percent(train.accuracy)}, validation {percent(val.accuracy)}){perfect}."
            )
        remedy = "a lower learning rate may help"
        return f"Getting worse since epoch {epoch}: {rose} ({figures}); {remedy}."
    if val.accuracy >= 1:
        return f"Nothing left to learn{perfect} ({figures})."
    if fall := judged.fall():
        remedy = "more epochs may help" if can_go_on else "a new run with more epochs may help"
        return (
            f"Improving still: {judged.title} loss falls by {decimal(fall)} an epoch ({figures})"
            f"{perfect or f'; {remedy}'}."
        )
    if len(judged.loss) < 4:
        measured = "one epoch" if len(judged.loss) == 1 else f"{len(judged.loss)} epochs"
        return f"Too early to see a trend after {measured}: {figures}{perfect}."
    higher = np.flatnonzero(judged.smooth > end + max(0.02 * abs(end), judged.noise))
    since = judged.epochs[higher[-1] + 1 if len(higher) else 0]
    return f"Flat since epoch {since}: {figures}{perfect}."


def decimal(value: float) -> str:
    """A loss with four decimals, or with its exponent where those would hide it."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def percent(share: float | None) -> str:
    """0.9621 as `96.21 %`; 100.00 % only where nothing is missing."""
    if share is None or math.isnan(share):
        return "n/a"
    return f"{100 * (share if share >= 1 else min(share, 0.9999)):.2f} %"


class _Curve:
    """Loss and accuracy of one split over the epochs, and the loss smoothed."""

    def __init__(self, history: Sequence[Record], split: str):
        records = [record for record in history if record["split"] == split]
        loss = np.array([_number(record["loss"]) for record in records])
        finite = np.isfinite(loss)
        self.title = SPLIT_TITLES[split]
        self.diverged: int | None = None
        if len(records) and not finite[-1]:
            good = np.flatnonzero(finite)
            self.diverged = records[good[-1] + 1 if len(good) else 0]["epoch"]
        self.epochs = np.array([record["epoch"] for record in records], int)[finite]
        self.loss = loss[finite]
        self.accuracy = _number(records[-1].get("accuracy")) if records else math.nan
        width = 3 if len(self.loss) < 15 else 5
        reach = width // 2
        self.smooth = np.array(
            [np.median(self.loss[max(0, i - reach) : i + reach + 1]) for i in range(len(self.loss))]
        )
        # A running median leaves a steady trend alone: what it takes away is noise. The factors
        # turn the mean of it into a standard deviation, for windows of 3 and 5 of normal noise.
        inside = np.abs(self.loss - self.smooth)[reach : len(self.loss) - reach]
        factor = 1.77 if width == 3 else 1.51
        self.noise = factor * float(inside.mean()) if len(inside) else 0.0

    def at(self, epoch: int) -> float:
        """The smoothed loss at the last measurement up to `epoch`."""
        before = np.flatnonzero(self.epochs <= epoch)
        return float(self.smooth[before[-1]]) if len(before) else math.nan

    def fall(self) -> float:
        """By how much an epoch the loss fell of late, 0 where that is noise or below 5 % in all.

        The slope of a straight line through the last third, 4 to 10 measurements.
        """
        span = min(max(len(self.loss) // 3, 4), 10, len(self.loss))
        if span < 2:
            return 0.0
        epochs, loss = self.epochs[-span:].astype(float), self.loss[-span:]
        epochs = epochs - epochs.mean()
        slope = float(epochs @ loss / (epochs @ epochs))
        rest = loss - loss.mean() - slope * epochs
        error = math.sqrt(float(rest @ rest) / max(span - 2, 1) / float(epochs @ epochs))
        # At 2 %, what a learning rate near 0 still changes was taken for a trend.
        clear = -slope * float(np.ptp(epochs)) > 0.05 * abs(loss.mean()) and -slope > 2.5 * error
        return -slope if clear else 0.0

    def figures(self) -> str:
        return f"{self.title} loss {decimal(self.loss[-1])}, accuracy {percent(self.accuracy)}"


def _perfect(train: _Curve, val: _Curve) -> str:
    if val.accuracy >= 1:
        return ", every validation image is classified correctly"
    if train.accuracy >= 1:
        return ", every training image is classified correctly"
    return ""


def _monitored(history: Sequence[Record], monitor: str) -> list[tuple[Record, float]]:
    """Every record of the monitor's split with its value."""
    split = monitor.partition("/")[0]
    records = [record for record in history if record["split"] == split]
    if not records and split in SPLITS:
        return []
    names = {name for record in (records or history) for name in scalars(record)}
    _, metric = check_monitor(monitor, names, (split,) if split in SPLITS else SPLITS)
    return [(record, _number(record.get(metric))) for record in records]


def _number(value: Any) -> float:
    """A missing value is NaN, which JSON has to write as null."""
    return math.nan if value is None else float(value)
