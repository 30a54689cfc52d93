"""What was predicted, as `predictions.csv` and `predictions.json` hold it."""

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls import runlog
from flaxcls.analysis.explain import Box
from flaxcls.deploy.predictor import Prediction
from flaxcls.deploy.trained import TrainedModel

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a model says of one image.

    Attributes:
      classes: the likeliest first, k of them.
      probabilities: theirs.
      parent: the likeliest parent of a hierarchical model, else None.
      parent_probability: its own.
      inverted: whether light and dark were swapped.
      box: around what decided, (left, top, right, bottom) in parts of the image's width and height;
        None where it was not asked for, or there is none.
      overlay: the picture of it, a path within the folder of results, or None.
    """

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    parent: int | None
    parent_probability: float | None
    inverted: bool
    box: tuple[float, float, float, float] | None = None
    overlay: str | None = None


class Failure(NamedTuple):
    """A file or a camera that could not be read, and why."""

    file: str
    reason: str


class Clip(NamedTuple):
    """What a model says of a video.

    Attributes:
      file: its path, or the name of the camera.
      annotated: the copy with what the model says, a path within the folder of results.
      width: of its frames, pixels.
      height: the same.
      rate: frames a second.
      frames: what is said of each.
      seconds: when each was, from the beginning.
      note: what is to be said of it, such as that its end is missing, or "".
    """

    file: str
    annotated: str
    width: int
    height: int
    rate: float
    frames: list[Seen]
    seconds: list[float]
    note: str


def seen_of(prediction: Prediction, top_k: int, inverted: Sequence[bool]) -> list[Seen]:
    """Returns what a prediction of N images says of each."""
    classes, probabilities = prediction.top_k(top_k)
    found = []
    for i, swapped in enumerate(inverted):
        parent = parent_probability = None
        if prediction.parent_probabilities is not None:
            parents = prediction.parent_probabilities[i]
            parent = int(parents.argmax())
            parent_probability = float(parents[parent])
        found.append(
            Seen(
                tuple(classes[i].tolist()),
                tuple(probabilities[i].tolist()),
                parent,
                parent_probability,
                swapped,
            )
        )
    return found


def box_of(box: Box | None, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Returns a box in pixels as parts of the image's sides."""
    if box is None:
        return None
    return box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height


def write_records(
    folder: Path,
    trained: TrainedModel,
    photos: Sequence[tuple[str, Seen]],
    clips: Sequence[Clip],
    failures: Sequence[Failure],
    *,
    top_k: int,
    method: str | None,
) -> None:
    """Writes `predictions.csv`, a row an image or frame, and `predictions.json`, which says more.

    Names that are not UTF-8 are written as `runlog.encode` does.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = _columns(trained, top_k, with_frames=bool(clips))
    writer.writerow(columns)
    for file, seen in photos:
        writer.writerow(_row(columns, trained, seen, {"file": file}))
    for clip in clips:
        for number, (seen, second) in enumerate(zip(clip.frames, clip.seconds, strict=True)):
            place = {"file": clip.file, "frame": number, "seconds": f"{second:.3f}"}
            writer.writerow(_row(columns, trained, seen, place))
    for failure in failures:
        known = {"file": failure.file, "reason": failure.reason}
        writer.writerow([known.get(column, "") for column in columns])
    runlog.write_bytes(folder / "predictions.csv", runlog.encode(table.getvalue()))
    whole = {
        "format_version": FORMAT_VERSION,
        "run": os.path.abspath(trained.folder),
        "weights": trained.source,
        "class_names": trained.class_names,
        "parent_names": trained.parent_names,
        "explained_by": method,
        "images": [{"file": file, **_as_json(trained, seen)} for file, seen in photos],
        "videos": [_clip_as_json(trained, clip) for clip in clips],
        "unreadable": [failure._asdict() for failure in failures],
    }
    runlog.write_json(folder / "predictions.json", whole)


def _columns(trained: TrainedModel, top_k: int, *, with_frames: bool) -> list[str]:
    columns = ["file", *(["frame", "seconds"] if with_frames else [])]
    columns += ["prediction", "probability"]
    if trained.parent_names:
        columns += ["parent", "parent_probability"]
    for place in range(2, top_k + 1):
        columns += [f"prediction_{place}", f"probability_{place}"]
    return [*columns, "inverted", "left", "top", "right", "bottom", "overlay", "reason"]


def _row(
    columns: Sequence[str], trained: TrainedModel, seen: Seen, known: dict[str, Any]
) -> list[Any]:
    values = dict(known)
    for place, (label, probability) in enumerate(
        zip(seen.classes, seen.probabilities, strict=True), start=1
    ):
        end = "" if place == 1 else f"_{place}"
        values[f"prediction{end}"] = trained.class_names[label]
        values[f"probability{end}"] = f"{probability:.6f}"
    if seen.parent is not None:
        values["parent"] = trained.parent_names[seen.parent]
        values["parent_probability"] = f"{seen.parent_probability:.6f}"
    if seen.box is not None:
        sides = ("left", "top", "right", "bottom")
        values |= {side: f"{part:.4f}" for side, part in zip(sides, seen.box, strict=True)}
    values["inverted"] = "yes" if seen.inverted else "no"
    values["overlay"] = seen.overlay or ""
    return [values.get(column, "") for column in columns]


def _as_json(trained: TrainedModel, seen: Seen) -> dict[str, Any]:
    said: dict[str, Any] = {
        "top": [
            {"class": trained.class_names[label], "probability": probability}
            for label, probability in zip(seen.classes, seen.probabilities, strict=True)
        ],
        "inverted": seen.inverted,
    }
    if seen.parent is not None:
        said["parent"] = {
            "class": trained.parent_names[seen.parent],
            "probability": seen.parent_probability,
        }
    if seen.box is not None:
        said["box"] = seen.box
    if seen.overlay is not None:
        said["overlay"] = seen.overlay
    return said


def _clip_as_json(trained: TrainedModel, clip: Clip) -> dict[str, Any]:
    return {
        "file": clip.file,
        "annotated": clip.annotated,
        "width": clip.width,
        "height": clip.height,
        "frames_per_second": clip.rate,
        "note": clip.note,
        "frames": [
            {"seconds": second, **_as_json(trained, seen)}
            for seen, second in zip(clip.frames, clip.seconds, strict=True)
        ],
    }
