"""The report of an evaluation, made from the files of a run folder alone: no model, no data.

`write_report("runs/a", "test")` makes `report.html` and `report.json` again from
`predictions/test.npz`, `.csv`, `.json` and `-images.npz`, and from what else the run folder holds.
"""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flaxcls import runlog
from flaxcls.analysis import html
from flaxcls.analysis.charts import Axis, Bars, Line, chart, matrix_png, matrix_strength
from flaxcls.analysis.explain import overlay
from flaxcls.analysis.pictures import Pictures, read_pictures
from flaxcls.analysis.predictions import Predictions, Shown, choose, read_predictions
from flaxcls.analysis.report_numbers import numbers
from flaxcls.errors import InputError
from flaxcls.history import SPLIT_TITLES, Record, find_record
from flaxcls.results import read_description

# A confusion matrix of more classes is a picture, without a number in each cell.
MOST_NUMBERED = 24
# Smaller images are enlarged without smoothing, and before a heat map is laid over them.
PIXELATED = 64

TITLES = {
    "accuracy": "accuracy",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "log_loss": "log loss",
    "parent_accuracy": "parent accuracy",
    "errors_within_parent": "mistakes within the parent",
}

T = TypeVar("T")


def report_path(folder: Path, name: str) -> Path:
    """Returns where the report of `predictions/NAME.npz` lies, `.html`.

    The run's own is `report.html`: that of the split `eval.split` of its config, or where that was
    never evaluated, of its test or validation split. Every other lies beside its predictions, as
    `predictions/NAME-report.html`.
    """
    keys = _read_object(folder / "config.json")
    chosen = (keys.get("eval", {}).get("split"), "test", "val")
    evaluated = (s for s in chosen if s and (folder / "predictions" / f"{s}.npz").exists())
    if name == next(evaluated, None):
        return folder / "report.html"
    return folder / "predictions" / f"{name}-report.html"


def write_report(folder: str | Path, name: str = "test") -> Path:
    """Writes the report of saved predictions, `.html` and beside it `.json`; only files are read.

    Args:
      folder: of the run.
      name: of its predictions: `test` for `predictions/test.npz`.

    Returns:
      The path of the page.

    Raises:
      InputError: there are no such predictions, or a file is damaged.
    """
    folder = Path(folder).expanduser()
    predictions = read_predictions(folder, name)
    if not len(predictions):
        raise InputError(f"'{folder}/predictions/{name}.npz' holds no example to report on")
    description = read_description(folder)
    notes: list[str] = []
    measured_path, log = folder / "predictions" / f"{name}.json", folder / "metrics.jsonl"
    measured: dict[str, Any] = _or_note(lambda: _read_object(measured_path), {}, notes)
    history: list[Record] = _or_note(lambda: runlog.read_metrics(log), [], notes)
    validation, why_not = _validation(folder, predictions, measured.get("step"), history)
    hierarchical = predictions.parent_logits is not None
    report = numbers(
        predictions,
        validation=validation,
        class_counts=description["class_counts"],
        class_parents=description.get("class_parents") or () if hierarchical else (),
        top_k_shown=_top_k(measured),
    )
    report |= {"step": measured.get("step"), "loss": measured.get("loss"), "run": folder.name}
    path = report_path(folder, name)
    runlog.write_json(path.with_suffix(".json"), report)
    html.write_page(
        path,
        "report.html",
        r=report,
        **_run_values(folder, name, measured, history, notes),
        **_picture_values(predictions, read_pictures(folder, predictions)),
        charts=_charts(report, history),
        matrix=_matrix(predictions.confusion, predictions.class_names),
        parent_matrix=_parent_matrix(report["hierarchy"]),
        by_accuracy=sorted(report["classes"], key=_hardness),
        titles=TITLES,
        temperature_note=why_not,
        notes=[*_notes(report), *notes],
    )
    return path


def _hardness(row: dict[str, Any]) -> tuple[bool, float, int]:
    """Sorts classes by accuracy, of equals the larger first; those without examples are last."""
    return row["accuracy"] is None, row["accuracy"] or 0.0, -row["support"]


def _read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} of one that is not there: training leaves no metrics of a split,
    and has no summary before it ends."""
    found = runlog.read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"'{path}' holds no JSON object; restore or remove it")
    return found


def _or_note(read: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """What `read` gives, or where a file that a report can do without is damaged, a note."""
    try:
        return read()
    except InputError as error:
        notes.append(str(error))
        return otherwise


def _top_k(measured: dict[str, Any]) -> int:
    found = [key[4:] for key in measured if key.startswith("top_") and key[4:].isdecimal()]
    return int(found[0]) if found else 5


def _validation(
    folder: Path, predictions: Predictions, step: int | None, history: Sequence[Record]
) -> tuple[Predictions | None, str]:
    """The predictions that the temperature is fitted on, or None, and a sentence on it."""
    name = "val" + (f"-step{step}" if predictions.name.endswith(f"-step{step}") else "")
    if predictions.name == name:
        return predictions, (
            "The temperature was fitted on these same examples, so that what it gains here is more "
            "than it gains elsewhere."
        )
    path = folder / "predictions" / f"{name}.npz"
    if not path.exists():
        return None, (
            f"There are no predictions of the validation split ({path.name}) to fit a temperature "
            "on; --mode=evaluate --config.eval.split=val makes them where the run has that split."
        )
    validation = read_predictions(folder, name)
    if validation.class_names != predictions.class_names:
        return None, f"{path.name} is of other classes, so that no temperature was fitted."
    # Training leaves those of the best checkpoint, which may be an earlier one than was evaluated.
    records = [r for r in history if r["split"] == "val" and r["step"] == step]
    right = int((validation.guesses == validation.labels).sum())
    if records and records[-1].get("accuracy") != right / max(len(validation), 1):
        return None, (
            f"{path.name} is of another checkpoint than step {step}, so that no temperature was "
            "fitted; evaluate the validation split again."
        )
    return validation, f"The temperature was fitted on the {len(validation):,} validation examples."


def _notes(report: dict[str, Any]) -> list[str]:
    """What a reader has to know before the figures."""
    notes = []
    absent = [row["class"] for row in report["classes"] if not row["support"]]
    if absent:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        notes.append(
            f"{len(absent)} of {len(report['classes'])} classes have no examples here ({shown}); "
            "macro means are over the classes that occur in truth or prediction."
        )
    if left_out := report["calibration"]["left_out"]:
        notes.append(
            f"The logits of {left_out:,} of {report['examples']:,} examples are not finite: the "
            "model has diverged. They count as predictions of the first such class and have no "
            "probability."
        )
    return notes


def _data_name(data: dict[str, Any], name: str) -> str:
    """What was evaluated: of the run's own data their name and the split."""
    split, _, step = name.partition("-step")
    if split not in (*SPLIT_TITLES, "all"):
        return name  # which names other data
    own = data.get("name") or Path(data.get("path") or "").name or data.get("source") or "data"
    title = "all splits" if split == "all" else f"{SPLIT_TITLES[split]} split"
    return f"{own}, {title}" + (f", step {step}" if step else "")


def _run_values(
    folder: Path, name: str, measured: dict[str, Any], history: Sequence[Record], notes: list[str]
) -> dict[str, Any]:
    """What is said of the run: config, environment, summary."""
    keys = _read_object(folder / "config.json")
    stored: dict[str, Any] = _or_note(lambda: _read_object(folder / "environment.json"), {}, notes)
    summary: dict[str, Any] = _or_note(lambda: _read_object(folder / "summary.json"), {}, notes)
    sessions = stored.get("sessions")
    return {
        "model": keys.get("model", {}).get("name", "model"),
        "data_name": _data_name(keys.get("data", {}), name),
        "config_text": json.dumps(keys, indent=2, ensure_ascii=False),
        "config_rows": _config_rows(keys),
        "environment": _environment_rows(sessions[-1] if sessions else {}),
        "params": summary.get("params"),
        "epoch": next((r["epoch"] for r in history if r["step"] == measured.get("step")), None),
        "epochs": max((r["epoch"] for r in history), default=None),
    }


_CONFIG_ROWS = (
    ("model", "model.name"),
    ("weights from", "model.init_from"),
    ("data", "data.source"),
    ("data set", "data.name"),
    ("path", "data.path"),
    ("image size", "data.image_size"),
    ("channels", "data.channels"),
    ("loss", "loss.name"),
    ("optimizer", "optimizer.name"),
    ("learning rate", "optimizer.learning_rate"),
    ("weight decay", "optimizer.weight_decay"),
    ("schedule", "schedule.name"),
    ("batch size", "train.batch_size"),
    ("epochs", "train.epochs"),
    ("best by", "train.best_by"),
    ("precision", "precision"),
    ("seed", "seed"),
)


def _config_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for title, key in _CONFIG_ROWS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, ""):
            rows.append((title, str(value)))
    return rows


def _environment_rows(session: dict[str, Any]) -> list[tuple[str, str]]:
    git = session.get("git") or {}
    versions = session.get("versions") or {}
    rows = [
        ("trained", session.get("date")),
        ("command", session.get("command")),
        ("commit", f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git else ""),
        ("devices", ", ".join(session.get("devices") or ())),
        ("processes", session.get("processes")),
        ("processor", f"{session.get('cpu', '')}, {session.get('cpus', '?')} cores"),
        ("platform", session.get("platform")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(title, str(value)) for title, value in rows if value] if session else []


def _picture_values(predictions: Predictions, pictures: Pictures) -> dict[str, Any]:
    """Addresses of images and overlays, by position, and the examples of each pair."""
    shown: Shown = choose(predictions)
    side = max((max(image.shape[:2]) for image in pictures.images.values()), default=0)
    names = predictions.class_names
    return {
        "images": {i: html.thumbnail(image) for i, image in pictures.images.items()},
        "maps": {
            i: html.thumbnail(overlay(_enlarged(pictures.images[i]), heat / 255))
            for i, heat in pictures.heat.items()
            if i in pictures.images
        },
        "pixelated": side <= PIXELATED,
        "method": METHOD_TITLES.get(pictures.method, pictures.method),
        "pictures_note": pictures.note,
        "pairs": [
            {
                "truth": names[pair.truth],
                "prediction": names[pair.guess],
                "count": pair.count,
                "support": int(predictions.confusion[pair.truth].sum()),
                "mistaken": pair.mistaken,
                "typical": pair.typical,
            }
            for pair in shown.pairs
        ],
        "mistakes_shown": shown.mistakes,
        "hits_shown": shown.hits,
    }


METHOD_TITLES = {
    "cam": "class activation map (CAM)",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "attention": "the model's own attention",
    "occlusion": "occlusion sensitivity",
}


def _enlarged(image: np.ndarray) -> np.ndarray:
    """A small image with each pixel several times, so that a heat map on it is smooth."""
    side = max(image.shape[:2])
    times = -(-112 // side) if side <= PIXELATED else 1
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _matrix(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """A confusion matrix as the template draws it: rows of cells, or two pictures and the cells."""
    shares = matrix_strength(confusion, shares=True)
    values = {"names": names, "numbered": len(names) <= MOST_NUMBERED}
    if values["numbered"]:
        return values | {
            "counts": confusion.tolist(),
            "shares": shares.tolist(),
            "count_strength": np.sqrt(matrix_strength(confusion, shares=False)).tolist(),
            "share_strength": np.sqrt(shares).tolist(),
        }
    rows, columns = np.nonzero(confusion)
    return values | {
        "count_image": _png(matrix_png(confusion, shares=False)),
        "share_image": _png(matrix_png(confusion, shares=True)),
        "cells": {
            "names": names,
            "support": confusion.sum(axis=1).tolist(),
            "rows": rows.tolist(),
            "columns": columns.tolist(),
            "counts": confusion[rows, columns].tolist(),
        },
    }


def _parent_matrix(hierarchy: dict[str, Any] | None) -> dict[str, Any] | None:
    if hierarchy is None:
        return None
    names = [row["parent"] for row in hierarchy["parents"]]
    return _matrix(np.array(hierarchy["confusion_matrix"]), names)


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _charts(report: dict[str, Any], history: Sequence[Record]) -> dict[str, str]:
    """SVG by name; empty where there is nothing to draw."""
    drawn = dict.fromkeys(("calibration", "balance", "loss", "accuracy"), "")
    drawn["top_k"] = _top_k_chart(report["top_k"])
    if report["calibration"]["raw"]["bins"]:
        drawn["calibration"] = _calibration_chart(report["calibration"])
    rows = [row for row in report["classes"] if row["support"] and row["training_images"]]
    if len({row["training_images"] for row in rows}) > 1:
        drawn["balance"] = _balance_chart(rows)
    for metric in ("loss", "accuracy"):
        drawn[metric] = _curve_chart(history, metric, report["step"])
    return drawn


def _top_k_chart(shares: dict[str, float]) -> str:
    ks, values = [int(k) for k in shares], list(shares.values())
    titles = [f"top {k}: {html.percent(v)}" for k, v in zip(ks, values, strict=True)]
    line = Line("", ks, values, points=True, titles=titles)
    low = min(values) - 0.1 * (1 - min(values)) - 0.005
    return chart(
        [line],
        Axis("likeliest classes that count (k)", whole=True),
        Axis("", low=max(low, -0.005), high=1.002, percent=True),
        title="Top-k accuracy",
    )


def _calibration_chart(calibration: dict[str, Any]) -> str:
    raw = calibration["raw"]["bins"]
    lines = [
        Line("perfect", (0, 1), (0, 1), kind="faint", dashed=True),
        _reliability_line("as it is", raw, "accent", False),
    ]
    if calibration["scaled"]:
        scaled = calibration["scaled"]["bins"]
        lines.append(_reliability_line("scaled by temperature", scaled, "wrong", True))
    bars = Bars(
        [raw[0]["low"], *(one["high"] for one in raw)],
        [one["count"] for one in raw],
        [f"{one['low']:.0%} to {one['high']:.0%}: {one['count']:,} examples" for one in raw],
    )
    return chart(
        lines,
        Axis("probability of the prediction", 0, 1, percent=True),
        Axis("right", 0, 1.0, percent=True),
        title="Calibration curve",
        bars=bars,
    )


def _reliability_line(name: str, bins: Sequence[dict[str, Any]], kind: str, dashed: bool) -> Line:
    kept = [one for one in bins if one["count"]]
    return Line(
        name,
        [one["confidence"] for one in kept],
        [one["accuracy"] for one in kept],
        kind=kind,
        dashed=dashed,
        points=True,
        titles=[
            f"{one['count']:,} examples: mean probability {html.percent(one['confidence'])}, "
            f"right {html.percent(one['accuracy'])}"
            for one in kept
        ],
    )


def _balance_chart(rows: Sequence[dict[str, Any]]) -> str:
    points = Line(
        "",
        [row["training_images"] for row in rows],
        [row["accuracy"] for row in rows],
        points=True,
        joined=False,
        titles=[
            f"{row['class']}: {row['training_images']:,} training images, "
            f"{html.percent(row['accuracy'])}"
            for row in rows
        ],
    )
    low = min(row["accuracy"] for row in rows)
    return chart(
        [points],
        Axis("training images (logarithmic)", logarithmic=True),
        Axis("accuracy", low=max(low - 0.05, -0.03), high=1.02, percent=True),
        title="Training images of each class against its accuracy",
    )


def _curve_chart(history: Sequence[Record], metric: str, step: int | None) -> str:
    """Training and validation over the epochs, the evaluated checkpoint marked; or nothing."""
    lines = []
    for split, kind in (("train", "faint"), ("val", "accent")):
        records = [r for r in history if r["split"] == split and r.get(metric) is not None]
        if records:
            lines.append(
                Line(
                    SPLIT_TITLES[split],
                    [r["epoch"] for r in records],
                    [r[metric] for r in records],
                    kind=kind,
                    dashed=split == "train",
                )
            )
    if not lines:
        return ""
    epoch = next((r["epoch"] for r in history if r["step"] == step), None)
    split = "val" if len(lines) > 1 else lines[0].name
    marked = find_record(history, epoch, split) if epoch is not None else None
    if marked is not None and marked.get(metric) is not None:
        lines.append(
            Line("this checkpoint", [epoch or 0], [marked[metric]], kind="wrong", points=True,
                 joined=False)
        )  # fmt: skip
    values = [v for line in lines for v in line.y]
    # A loss that falls far is one flat line on a linear axis.
    logarithmic = metric == "loss" and 0 < 20 * min(values) < max(values)
    label = f"{metric} (logarithmic)" if logarithmic else metric
    y = Axis(label, percent=metric == "accuracy", logarithmic=logarithmic)
    return chart(lines, Axis("epoch", whole=True), y, title=f"{metric} by epoch")
