"""What saved predictions say, in numbers: scores with intervals, calibration, correlation.

Every function takes NumPy arrays and gives scikit-learn's numbers where scikit-learn has them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import metrics as sklearn_metrics

Z = 1.959963984540054  # of a normal distribution, 95 % lie within
DRAWS = 1000
BINS = 15
# Probabilities are kept this far from 0, as in scikit-learn's log_loss of float64.
_LEAST = np.finfo(np.float64).eps
_CELLS_AT_ONCE = 4_000_000  # 32 MB of counts


class Interval(NamedTuple):
    """Where 95 of 100 such samples would have the value."""

    low: float
    high: float


class Reliability(NamedTuple):
    """How often predictions of about the same probability are right, in B bins of equal width.

    Attributes:
      edges: (B + 1,), 0 to 1; a probability equal to an edge lies below it.
      examples: int (B,), how many.
      confidence: (B,), their mean probability; NaN without examples.
      accuracy: (B,), the share of them that is right; NaN without examples.
      ece: expected calibration error, the mean of |accuracy - confidence| over examples.
    """

    edges: np.ndarray
    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def wilson(hits: int, count: int) -> Interval:
    """Returns the score interval of a share (Wilson, JASA 22, 1927); 0..1 without examples."""
    if not count:
        return Interval(0.0, 1.0)
    share, z2 = hits / count, Z**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    # Exactly 0 and 1 at the ends, where rounding leaves 1e-17.
    return Interval(
        0.0 if hits == 0 else middle - half,
        1.0 if hits == count else middle + half,
    )


def scores(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Returns accuracy, and precision, recall and F1 as macro and weighted means.

    Macro means are over the classes that occur in truth or prediction, scikit-learn's default.
    """
    found = {"accuracy": float(sklearn_metrics.accuracy_score(truth, guess))}
    for average in ("macro", "weighted"):
        values = sklearn_metrics.precision_recall_fscore_support(
            truth, guess, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values[:3], strict=True):
            found[f"{name}_{average}"] = float(value)
    return found


def class_scores(truth: np.ndarray, guess: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Returns precision, recall, f1 (C,) and support int (C,); 0 where nothing can be said."""
    values = sklearn_metrics.precision_recall_fscore_support(
        truth, guess, labels=np.arange(classes), zero_division=0
    )
    return dict(zip(("precision", "recall", "f1", "support"), values, strict=True))


def confusion_matrix(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Returns int (C, C), rows the truth."""
    return sklearn_metrics.confusion_matrix(truth, guess, labels=np.arange(classes))


def bootstrap_scores(
    confusion: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Returns bootstrap intervals of what `scores` gives (Efron, Ann. Statist. 7, 1979).

    Examples drawn with replacement fill the cells of the confusion matrix as a multinomial does,
    whatever their number. The percentiles are moved by as much as the samples' mean misses the
    value: where classes have few examples, macro means of samples are lower by two points.

    Args:
      confusion: int (C, C), rows the truth, not all 0.
      draws: samples.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    total = int(counts.sum())
    found: dict[str, list[np.ndarray]] = {}
    at_once = max(1, _CELLS_AT_ONCE // len(counts))
    for start in range(0, draws, at_once):
        drawn = rng.multinomial(total, counts / total, size=min(at_once, draws - start))
        for name, values in _scores_of_cells(drawn, rows, columns, len(confusion)).items():
            found.setdefault(name, []).append(values)
    exact = _scores_of_cells(counts[None], rows, columns, len(confusion))
    return {
        name: Interval(*np.clip(_percentiles(np.concatenate(parts), exact[name][0]), 0, 1).tolist())
        for name, parts in found.items()
    }


def _scores_of_cells(
    drawn: np.ndarray, rows: np.ndarray, columns: np.ndarray, classes: int
) -> dict[str, np.ndarray]:
    """The scores (D,) of D confusion matrices, given as counts (D, K) of the same K cells."""
    total = drawn.sum(axis=1)
    support, predicted = (_summed(drawn, places, classes) for places in (rows, columns))
    right = np.flatnonzero(rows == columns)
    hits = np.zeros_like(support)
    hits[:, rows[right]] = drawn[:, right]
    occurs = support + predicted > 0
    per_class = {
        "precision": _ratios(hits, predicted),
        "recall": _ratios(hits, support),
        "f1": _ratios(2 * hits, support + predicted),
    }
    found = {"accuracy": hits.sum(axis=1) / total}
    for name, values in per_class.items():
        found[f"{name}_macro"] = (values * occurs).sum(axis=1) / occurs.sum(axis=1)
        found[f"{name}_weighted"] = (values * support).sum(axis=1) / total
    return found


def _summed(drawn: np.ndarray, places: np.ndarray, classes: int) -> np.ndarray:
    """Sums of columns (D, classes), each column of `drawn` added at its place."""
    order = np.argsort(places, kind="stable")
    present, starts = np.unique(places[order], return_index=True)
    sums = np.zeros((len(drawn), classes), drawn.dtype)
    sums[:, present] = np.add.reduceat(drawn[:, order], starts, axis=1)
    return sums


def bootstrap_mean(values: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Returns the bootstrap interval of the mean of values (N,), N > 0.

    Beyond 100,000 values, where the interval is narrow anyhow, fewer samples are drawn.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    draws = max(min(draws, 10**8 // count), 100)
    means = [values[rng.integers(0, count, count)].mean() for _ in range(draws)]
    return Interval(*_percentiles(np.array(means), values.mean()).tolist())


def _percentiles(drawn: np.ndarray, value: float) -> np.ndarray:
    """Where 95 % of samples lie about their mean, laid about the value: (2,)."""
    return value + np.quantile(drawn, [0.025, 0.975]) - drawn.mean()


def top_k_accuracy(logits: np.ndarray, truth: np.ndarray, most: int) -> np.ndarray:
    """Returns int (most,): of how many examples the label is among the 1, 2, ... largest logits.

    Equal logits rank by class, so that the first of them is the prediction, and NaN ranks ahead
    of all, as in `flaxcls.metrics`; scikit-learn ranks equal ones the other way round.
    """
    own = np.take_along_axis(logits, truth[:, None], axis=1)
    behind = (logits < own) | ((logits == own) & (np.arange(logits.shape[1]) >= truth[:, None]))
    rank = logits.shape[1] - behind.sum(axis=1)
    return np.cumsum(np.bincount(rank, minlength=most)[:most])


def losses(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns -log of the truth's probability (N,), whose mean is scikit-learn's log_loss."""
    own = np.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
    return -np.log(np.clip(own, _LEAST, 1))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Returns the calibration curve of predictions and its ECE (Guo et al., ICML 2017, eq. 3).

    Args:
      confidence: (N,), the probability of each prediction, finite.
      right: bool (N,).
      bins: B.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    gap = np.nansum(np.abs(accuracy - mean) * count)
    return Reliability(edges, count, mean, accuracy, float(gap / max(len(confidence), 1)))


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the T that makes the log loss of softmax(logits / T) least (Guo et al., 4.2).

    The loss is convex in 1/T, whose best value bisection finds. None where none is best: every
    example is right (T would be 0) or the logits say less than nothing (T would be infinite).

    Args:
      logits: (N, C), finite.
      truth: int (N,).
    """
    # The best T is that of the same logits in units of their spread.
    z = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    scale = float(np.abs(z).max(initial=0))
    if not scale:
        return None
    z = z / scale
    own = np.take_along_axis(z, truth[:, None], axis=1)[:, 0].mean()

    def slope(log_inverse: float) -> float:
        weights = np.exp(z * math.exp(log_inverse))
        return float(((weights * z).sum(axis=1) / weights.sum(axis=1)).mean() - own)

    low, high = math.log(1e-4), math.log(1e5)
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return scale * math.exp(-(low + high) / 2)


class Correlation(NamedTuple):
    """Spearman's rank correlation, with the interval of Fieller, Hartley & Pearson (1957)."""

    value: float
    low: float
    high: float


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Returns the rank correlation of pairs; None of fewer than 4, or where one side is constant.

    Spearman, Am. J. Psychol. 15 (1904); Biometrika 44 (1957), p. 470, for the interval.
    """
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    value = float(np.corrcoef(_ranks(np.asarray(x)), _ranks(np.asarray(y)))[0, 1])
    if abs(value) > 1 - 1e-12:
        return Correlation(round(value), round(value), round(value))
    middle, half = math.atanh(value), Z * math.sqrt(1.06 / (len(x) - 3))
    return Correlation(value, math.tanh(middle - half), math.tanh(middle + half))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _ratios(numerators: np.ndarray, denominators: np.ndarray) -> Any:
    return np.divide(
        numerators, denominators, out=np.zeros(numerators.shape), where=denominators != 0
    )
