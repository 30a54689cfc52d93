"""The predictions of a split as `evaluate` saved them, and which of them are worth a look."""

import csv
import dataclasses
import io
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np

from flaxcls.analysis.measures import confusion_matrix
from flaxcls.errors import InputError
from flaxcls.evaluate import softmax

MISTAKES = 24  # the most confident ones
HITS = 12  # the least confident ones
PAIRS = 12  # of classes that are confused most
OF_A_PAIR = 4  # images of each of its two classes


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of every example of a split.

    Attributes:
      name: of the files, `test` or `val-step16`.
      labels: int (N,).
      logits: float (N, C).
      class_names: C.
      files: N names; of the records of an array too, `digits/17`.
      parent_labels: int (N,) of a hierarchical model, else None.
      parent_logits: float (N, P) of a hierarchical model, else None.
      parent_names: P; () without.
    """

    name: str
    labels: np.ndarray
    logits: np.ndarray
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    parent_labels: np.ndarray | None = None
    parent_logits: np.ndarray | None = None
    parent_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def guesses(self) -> np.ndarray:
        """The predicted classes, int (N,)."""
        return self.logits.argmax(axis=1)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float64 (N, C); NaN where the logits were not finite."""
        with np.errstate(invalid="ignore"):
            return softmax(self.logits)

    @cached_property
    def confidence(self) -> np.ndarray:
        """The probability of the predicted class, float64 (N,)."""
        return np.take_along_axis(self.probabilities, self.guesses[:, None], axis=1)[:, 0]

    @cached_property
    def confusion(self) -> np.ndarray:
        """int (C, C), rows the truth."""
        return confusion_matrix(self.labels, self.guesses, len(self.class_names))


def read_predictions(folder: Path, name: str) -> Predictions:
    """Reads `predictions/NAME.npz` and the file names in `NAME.csv` of a run folder.

    Raises:
      InputError: there are none, or they are damaged.
    """
    path = folder / "predictions" / f"{name}.npz"
    arrays = read_arrays(path)
    try:
        labels, logits = arrays["label"], arrays["logits"]
        parent_logits = arrays.get("parent_logits")
        found = Predictions(
            name,
            labels.astype(np.int64),
            logits,
            tuple(arrays["class_names"].tolist()),
            _read_files(path.with_suffix(".csv"), len(labels)),
            None if parent_logits is None else arrays["parent_label"].astype(np.int64),
            parent_logits,
            tuple(arrays["parent_names"].tolist()) if "parent_names" in arrays else (),
        )
    except KeyError as error:
        raise InputError(f"'{path}' holds no {error}; evaluate the run again") from error
    if logits.shape != (len(labels), len(found.class_names)):
        raise InputError(
            f"'{path}' has logits of shape {logits.shape} for {len(labels)} labels and "
            f"{len(found.class_names)} classes; evaluate the run again"
        )
    return found


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an .npz whole; InputError where it is missing or damaged."""
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError as error:
        raise InputError(f"'{path}' is not there; evaluate the run first") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' cannot be read ({error}); evaluate the run again") from error


def _read_files(path: Path, count: int) -> tuple[str, ...]:
    """Names of the examples; of a table that is gone or of other examples, their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    names = [row.get("file") or "" for row in csv.DictReader(io.StringIO(text, newline=""))]
    return tuple(names) if len(names) == count else tuple(f"#{i}" for i in range(count))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two classes of which one is taken for the other.

    Attributes:
      truth: class of the images that are mistaken.
      guess: class that they are taken for.
      count: how many are.
      mistaken: positions of some of them, the most confident mistakes first.
      typical: positions of images that are of the other class, the surest first.
    """

    truth: int
    guess: int
    count: int
    mistaken: tuple[int, ...]
    typical: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The examples that a report shows, by their positions in the split.

    Attributes:
      mistakes: the most confident mistakes, the worst first.
      hits: the least confident right predictions, the least sure first.
      pairs: the classes that are confused most.
    """

    mistakes: tuple[int, ...]
    hits: tuple[int, ...]
    pairs: tuple[Pair, ...]

    def explained(self) -> np.ndarray:
        """Those whose heat maps are shown, int64 ascending."""
        return np.unique(np.array([*self.mistakes, *self.hits], np.int64))

    def all(self) -> np.ndarray:
        """Those whose images are shown, int64 ascending."""
        of_pairs = [i for pair in self.pairs for i in (*pair.mistaken, *pair.typical)]
        return np.unique(np.array([*self.mistakes, *self.hits, *of_pairs], np.int64))


def choose(predictions: Predictions) -> Shown:
    """Chooses what a report shows; the same predictions give the same choice."""
    # What is not finite has no probability, and comes last.
    confidence = np.nan_to_num(predictions.confidence, nan=0.0)
    right = predictions.guesses == predictions.labels
    wrong, hits = np.flatnonzero(~right), np.flatnonzero(right)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")]
    least = hits[np.argsort(confidence[hits], kind="stable")]
    pairs = []
    for truth, guess, count in confused_pairs(predictions.confusion)[:PAIRS]:
        of_truth = worst[predictions.labels[worst] == truth]
        of_guess = np.flatnonzero(predictions.labels == guess)
        # Right ones before wrong ones, and of both the surest first.
        order = np.lexsort((-confidence[of_guess], ~right[of_guess]))
        pairs.append(
            Pair(
                truth,
                guess,
                count,
                _positions(of_truth[predictions.guesses[of_truth] == guess][:OF_A_PAIR]),
                _positions(of_guess[order][:OF_A_PAIR]),
            )
        )
    return Shown(_positions(worst[:MISTAKES]), _positions(least[:HITS]), tuple(pairs))


def confused_pairs(confusion: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (truth, prediction, count) of every kind of mistake, the most frequent first.

    Among equally frequent ones, the larger share of its class comes first.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    counts = wrong[rows, columns]
    order = np.lexsort((-counts / confusion.sum(axis=1)[rows], -counts))
    return [(int(rows[i]), int(columns[i]), int(counts[i])) for i in order]


def _positions(array: np.ndarray) -> tuple[int, ...]:
    return tuple(array.tolist())
