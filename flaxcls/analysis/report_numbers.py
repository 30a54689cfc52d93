"""What a report says of saved predictions, as numbers: the content of `report.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcls.analysis import measures
from flaxcls.analysis.measures import Interval
from flaxcls.analysis.predictions import Predictions, choose, confused_pairs
from flaxcls.evaluate import softmax
from flaxcls.history import percent
from flaxcls.metrics import errors_within_parent

FORMAT_VERSION = 1
MOST_PAIRS = 100
MOST_K = 10
WILSON, BOOTSTRAP = "Wilson", "bootstrap"


def headline(predictions: Predictions, top_k: int, parents: Sequence[int]) -> dict[str, Any]:
    """Returns each metric with its 95 % interval, and how that was found.

    Args:
      predictions: at least one.
      top_k: k, which is left out where it is not smaller than the number of classes.
      parents: of a hierarchical model, the parent of each class; () for others.
    """
    truth, guess, confusion = predictions.labels, predictions.guesses, predictions.confusion
    count = len(predictions)
    found = {"accuracy": _share(int(np.trace(confusion)), count)}
    if 1 < top_k < confusion.shape[0]:
        hits = measures.top_k_accuracy(predictions.logits, truth, top_k)[-1]
        found[f"top_{top_k}"] = _share(int(hits), count)
    intervals = measures.bootstrap_scores(confusion)
    for name, value in measures.scores(truth, guess).items():
        if name != "accuracy":
            found[name] = _measured(value, intervals[name], BOOTSTRAP)
    losses = measures.losses(predictions.probabilities, truth)
    found["log_loss"] = _measured(losses.mean(), measures.bootstrap_mean(losses), BOOTSTRAP)
    if predictions.parent_logits is not None and predictions.parent_labels is not None:
        right = predictions.parent_logits.argmax(axis=1) == predictions.parent_labels
        found["parent_accuracy"] = _share(int(right.sum()), count)
        errors = count - int(np.trace(confusion))
        share = errors_within_parent(confusion, parents)
        interval = measures.wilson(round(share * errors), errors)
        found["errors_within_parent"] = _measured(share, interval, WILSON)
    return found


def _share(hits: int, count: int) -> dict[str, Any]:
    return _measured(hits / count, measures.wilson(hits, count), WILSON)


def _measured(value: float, interval: Interval, how: str) -> dict[str, Any]:
    return {"value": float(value), "low": interval.low, "high": interval.high, "interval": how}


def classes(predictions: Predictions, class_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a row a class, in the model's order: scikit-learn's scores and the accuracy.

    `accuracy` (the recall), its interval and `taken_for` are None of a class without examples, the
    last also of one without mistakes.
    """
    confusion = predictions.confusion
    scores = measures.class_scores(
        predictions.labels, predictions.guesses, len(predictions.class_names)
    )
    rows = []
    for i, name in enumerate(predictions.class_names):
        support, hits = int(scores["support"][i]), int(confusion[i, i])
        low, high = measures.wilson(hits, support)
        wrong = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
        rows.append(
            {
                "class": name,
                "precision": float(scores["precision"][i]),
                "recall": float(scores["recall"][i]),
                "f1": float(scores["f1"][i]),
                "support": support,
                "predicted": int(confusion[:, i].sum()),
                "right": hits,
                "accuracy": hits / support if support else None,
                "low": low if support else None,
                "high": high if support else None,
                "training_images": int(class_counts[i]) if i < len(class_counts) else None,
                "taken_for": predictions.class_names[wrong.argmax()] if wrong.any() else None,
            }
        )
    return rows


def averages(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Returns the last lines of scikit-learn's classification report."""
    scores, count = measures.scores(predictions.labels, predictions.guesses), len(predictions)
    return {
        f"{average} avg": {
            **{name: scores[f"{name}_{average}"] for name in ("precision", "recall", "f1")},
            "support": count,
        }
        for average in ("macro", "weighted")
    }


def pairs(predictions: Predictions) -> list[dict[str, Any]]:
    """Returns the most frequent mistakes, `share` being that of the true class's examples."""
    support = predictions.confusion.sum(axis=1)
    return [
        {
            "truth": predictions.class_names[truth],
            "prediction": predictions.class_names[guess],
            "count": count,
            "share": count / int(support[truth]),
        }
        for truth, guess, count in confused_pairs(predictions.confusion)[:MOST_PAIRS]
    ]


def top_k(predictions: Predictions) -> dict[str, float]:
    """Returns the share of examples whose class is among the k likeliest, by k."""
    most = min(MOST_K, len(predictions.class_names))
    hits = measures.top_k_accuracy(predictions.logits, predictions.labels, most)
    return {str(k): int(hits[k - 1]) / len(predictions) for k in range(1, most + 1)}


def calibration(predictions: Predictions, validation: Predictions | None) -> dict[str, Any]:
    """Returns the calibration curve and ECE, before and after temperature scaling.

    Args:
      predictions: those that the curve is of; what is not finite is left out and counted.
      validation: of the same checkpoint, which the temperature is fitted on; None without.
    """
    finite = np.isfinite(predictions.logits).all(axis=1)
    logits, truth = predictions.logits[finite], predictions.labels[finite]
    found = {"left_out": int((~finite).sum()), "raw": _calibration(logits, truth, 1.0)}
    temperature = None
    if validation is not None:
        usable = np.isfinite(validation.logits).all(axis=1)
        temperature = measures.fit_temperature(validation.logits[usable], validation.labels[usable])
    return found | {
        "fitted_on": None if validation is None else validation.name,
        "temperature": temperature,
        "scaled": None if temperature is None else _calibration(logits, truth, temperature),
    }


def _calibration(logits: np.ndarray, truth: np.ndarray, temperature: float) -> dict[str, Any]:
    if not len(logits):
        return {"ece": None, "log_loss": None, "bins": []}
    probabilities = softmax(logits.astype(np.float64) / temperature)
    guess = logits.argmax(axis=1)
    confidence = np.take_along_axis(probabilities, guess[:, None], axis=1)[:, 0]
    curve = measures.reliability(confidence, guess == truth)
    return {
        "ece": curve.ece,
        "log_loss": float(measures.losses(probabilities, truth).mean()),
        "confidence": float(confidence.mean()),
        "bins": [
            {"low": low, "high": high, "count": count, "confidence": mean, "accuracy": accuracy}
            for low, high, count, mean, accuracy in zip(
                curve.edges[:-1].tolist(),
                curve.edges[1:].tolist(),
                curve.examples.tolist(),
                curve.confidence.tolist(),
                curve.accuracy.tolist(),
                strict=True,
            )
        ],
    }


def imbalance(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns whether classes with more training images are recognised better: a sentence, and
    Spearman's rank correlation with its interval, None where there is none.

    Args:
      rows: of `classes`.
    """
    known = [row for row in rows if row["support"] and row["training_images"] is not None]
    counts = [row["training_images"] for row in known]
    accuracies = [row["accuracy"] for row in known]
    found = measures.rank_correlation(counts, accuracies)
    empty = {"correlation": None, "low": None, "high": None}
    if found is None:
        return {"sentence": _no_correlation(counts, accuracies), **empty}
    figures = (
        f"Spearman's rank correlation of training images and accuracy is {found.value:.2f} (95 % "
        f"interval {found.low:.2f} to {found.high:.2f}) over {len(known)} classes"
    )
    if found.low > 0:
        says = "Imbalance hurts: classes with more training images are recognised better"
    elif found.high < 0:
        says = "Imbalance does not hurt: classes with more training images are recognised less well"
    else:
        says = "No effect of imbalance shows"
    return {"sentence": f"{says}; {figures}.", **found._asdict()}


def _no_correlation(counts: Sequence[int], accuracies: Sequence[float]) -> str:
    if not counts:
        return "How many training images the classes had is not known."
    if len(set(counts)) == 1 and len(counts) > 1:
        return (
            f"Every class has {counts[0]:,} training images, so that there is no imbalance that "
            "could hurt."
        )
    if len(counts) < 4:
        return f"{len(counts)} classes with examples are too few for a correlation."
    return (
        f"Every class is recognised equally well ({percent(accuracies[0])}), however many training "
        "images it has."
    )


def hierarchy(
    predictions: Predictions, class_parents: Sequence[int], rows: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Returns what a hierarchical model says of parents, and of classes within them; else None.

    Args:
      predictions: of classes and parents.
      class_parents: the parent of each class.
      rows: of `classes`.
    """
    if predictions.parent_logits is None or predictions.parent_labels is None:
        return None
    names, of_class = predictions.parent_names, np.asarray(class_parents)
    truth, guess = predictions.parent_labels, predictions.parent_logits.argmax(axis=1)
    scores = measures.class_scores(truth, guess, len(names))
    right = predictions.guesses == predictions.labels
    within = of_class[predictions.guesses] == truth
    parents = []
    for p, name in enumerate(names):
        here = truth == p
        errors = int((here & ~right).sum())
        parents.append(
            {
                "parent": name,
                "classes": [
                    row["class"] for row, of in zip(rows, of_class, strict=True) if of == p
                ],
                **{key: float(scores[key][p]) for key in ("precision", "recall", "f1")},
                "support": int(here.sum()),
                "class_accuracy": float(right[here].mean()) if here.any() else None,
                "errors": errors,
                "errors_within": int((here & ~right & within).sum()),
            }
        )
    return {
        "parents": parents,
        "confusion_matrix": measures.confusion_matrix(truth, guess, len(names)).tolist(),
        "agreement": float((of_class[predictions.guesses] == guess).mean()),
    }


def examples(predictions: Predictions, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Returns what is said of some examples: file, truth, prediction, and what comes next to it."""
    return [_example(predictions, i) for i in positions]


def _example(predictions: Predictions, i: int) -> dict[str, Any]:
    names, probabilities = predictions.class_names, predictions.probabilities[i]
    truth, guess = int(predictions.labels[i]), int(predictions.guesses[i])
    others = np.where(np.arange(len(names)) == guess, -np.inf, np.nan_to_num(predictions.logits[i]))
    second = int(others.argmax()) if len(names) > 1 else None
    return {
        "index": i,
        "file": predictions.files[i],
        "truth": names[truth],
        "prediction": names[guess],
        "runner_up": None if second is None else names[second],
        "probability": float(probabilities[guess]),
        "probability_of_truth": float(probabilities[truth]),
        "probability_of_runner_up": None if second is None else float(probabilities[second]),
    }


def numbers(
    predictions: Predictions,
    *,
    validation: Predictions | None,
    class_counts: Sequence[int],
    class_parents: Sequence[int],
    top_k_shown: int,
) -> dict[str, Any]:
    """Returns all that a report says of predictions, as `report.json` holds it.

    Args:
      predictions: at least one.
      validation: what the temperature is fitted on; None without.
      class_counts: training images of each class.
      class_parents: of a hierarchical model, the parent of each class; () for others.
      top_k_shown: k of the headline.
    """
    rows = classes(predictions, class_counts)
    shown = choose(predictions)
    return {
        "format_version": FORMAT_VERSION,
        "name": predictions.name,
        "examples": len(predictions),
        "class_names": predictions.class_names,
        "metrics": headline(predictions, top_k_shown, class_parents),
        "classes": rows,
        "averages": averages(predictions),
        "top_k": top_k(predictions),
        "confusion_matrix": predictions.confusion,
        "confused_pairs": pairs(predictions),
        "calibration": calibration(predictions, validation),
        "imbalance": imbalance(rows),
        "hierarchy": hierarchy(predictions, class_parents, rows),
        "mistakes": examples(predictions, shown.mistakes),
        "uncertain_hits": examples(predictions, shown.hits),
    }
