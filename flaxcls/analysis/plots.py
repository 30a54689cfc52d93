"""The pictures of runs: curves, class counts and the confusion matrix, as PNG files.

Figures are made without pyplot, so that nothing global is kept and any thread may draw. Colours
are those of Okabe and Ito (2008), which colour-blind people tell apart: blue is training,
vermilion validation, green test.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from flaxcls.history import SPLIT_TITLES, SPLITS, Record, best_record
from flaxcls.runlog import write_bytes

SPLIT_COLOURS = {"train": "#0072B2", "val": "#D55E00", "test": "#009E73"}
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9",
    "#D55E00", "#000000", "#8A8A8A", "#7F5A00", "#5D3A9B",
)  # fmt: skip
RIGHT, WRONG = "#08519C", "#C24A00"
DASHES = ("-", "--", "-.", ":")
MOST_COLUMNS = 6  # side by side


def plot_run(
    history: Sequence[Record],
    confusion: np.ndarray | None,
    class_names: Sequence[str],
    class_counts: Mapping[str, Sequence[int]],
    out_dir: str | os.PathLike[str],
    *,
    monitor: str = "val/accuracy",
    confusion_split: str = "test",
) -> list[Path]:
    """Writes every picture of a run into `out_dir` and returns their paths.

    `confusion` is int (C, C), rows the truth, of `confusion_split`; None leaves it out.
    `class_counts` is {"train": (C,) counts, ...}. The best epoch by `monitor` is marked.
    """
    figures: dict[str, Figure] = {}
    if history:
        best = best_record(history, monitor)
        epoch = best["epoch"] if best else None
        figures["loss"] = plot_loss(history, epoch)
        figures["accuracy"] = plot_accuracy(history, epoch)
        figures["precision_recall_f1"] = plot_precision_recall_f1(history, epoch)
        figures["class_accuracy"] = plot_class_accuracy(history, class_names, epoch)
        figures["curves"] = plot_curves(history, epoch)
    if class_counts:
        figures["class_counts"] = plot_class_counts(class_names, class_counts)
    if confusion is not None:
        figures["confusion"] = plot_confusion(confusion, class_names, confusion_split)
    return [save(figure, Path(out_dir) / f"{name}.png") for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, atomically."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; that is no news.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_png(buffer)
    write_bytes(path, buffer.getvalue())
    return path


def plot_loss(history: Sequence[Record], best_epoch: int | None) -> Figure:
    """Training loss against validation loss."""
    figure = _figure(7, 4.8)
    _draw_splits(figure.add_subplot(), history, "loss", best_epoch)
    return figure


def plot_accuracy(history: Sequence[Record], best_epoch: int | None) -> Figure:
    """Training accuracy against validation accuracy."""
    figure = _figure(7, 4.8)
    _draw_splits(figure.add_subplot(), history, "accuracy", best_epoch)
    return figure


def plot_precision_recall_f1(history: Sequence[Record], best_epoch: int | None) -> Figure:
    """Precision, recall and F1, averaged over classes and weighted by their size."""
    figure = _figure(10, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_scores(left, history, "macro", best_epoch)
    _draw_scores(right, history, "weighted", best_epoch)
    return figure


def plot_curves(history: Sequence[Record], best_epoch: int | None) -> Figure:
    """Loss, accuracy and precision/recall/F1 side by side."""
    figure = _figure(13, 4.6)
    axes = figure.subplots(1, 3)
    _draw_splits(axes[0], history, "loss", best_epoch)
    _draw_splits(axes[1], history, "accuracy", best_epoch)
    _draw_scores(axes[2], history, "macro", best_epoch)
    return figure


def plot_class_accuracy(
    history: Sequence[Record], class_names: Sequence[str], best_epoch: int | None, most: int = 10
) -> Figure:
    """Accuracy of each class over the epochs; beyond `most` classes the spread and the extremes."""
    split = _judged_split(history)
    epochs, values = _series(history, split, "class_accuracy")
    figure = _figure(8.5, 4.6)
    axes = figure.add_subplot()
    if values.ndim != 2:
        axes.set_title("Accuracy of each class was not measured", loc="left", weight="bold")
        return figure
    order = np.argsort(-np.nan_to_num(values[-1], nan=-1.0), kind="stable")
    if len(order) > most:
        _draw_spread(axes, epochs, values)
        order = np.concatenate([order[:3], order[-5:]])
    for place, i in enumerate(order):
        axes.plot(
            epochs,
            values[:, i],
            color=COLOURS[place % len(COLOURS)],
            linestyle=DASHES[place % len(DASHES)],
            marker=_marker(epochs),
            linewidth=2,
            label=f"{_percent(values[-1, i])}  {_short(class_names[i])}",
        )
    where = SPLIT_TITLES[split]
    _finish(axes, "Accuracy of each class", where, best_epoch, [(epochs, values)], True)
    title = "last epoch, best and worst" if values.shape[1] > most else "last epoch"
    _legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5), title=title, fontsize=9)
    return figure


def plot_class_counts(
    class_names: Sequence[str], counts: Mapping[str, Sequence[int]], most: int = 30
) -> Figure:
    """How many images each class has in each split; beyond `most` classes sorted, without names."""
    splits = [split for split in SPLITS if split in counts and len(counts[split])]
    table = np.array([counts[split] for split in splits], float)
    classes = table.shape[1]
    if classes <= most:
        return _plot_few_counts(class_names, splits, table)
    order = np.argsort(-table.sum(0), kind="stable")
    figure = _figure(10, 4.6)
    axes = figure.add_subplot()
    bottom = np.zeros(classes)
    for split, row in zip(splits, table[:, order], strict=True):
        axes.bar(
            np.arange(classes) + 1, row, 1.0, bottom, color=SPLIT_COLOURS[split],
            label=f"{SPLIT_TITLES[split]}  {row.sum():,.0f}",
        )  # fmt: skip
        bottom += row
    axes.set_xlim(0.5, classes + 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("class, largest first")
    axes.set_ylabel("images")
    axes.set_title(f"Images of {classes} classes", loc="left", weight="bold")
    names = [f"{bottom[i]:,.0f}  {_short(class_names[int(order[i])], 24)}" for i in range(classes)]
    text = "\n".join(["largest", *names[:5], "", "smallest", *names[-5:]])
    axes.text(1.02, 0.6, text, transform=axes.transAxes, va="top", fontsize=9)
    axes.legend(loc="lower left", bbox_to_anchor=(1.0, 0.7), frameon=False)
    return figure


def plot_confusion(
    confusion: np.ndarray, class_names: Sequence[str], split: str = "test"
) -> Figure:
    """Confusion matrix as counts and as shares of the true class, rows the truth.

    Numbers stand in the cells up to 20 classes; with more, the most frequent mistakes are listed.
    """
    confusion = np.asarray(confusion)
    classes = len(confusion)
    sums = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, sums, out=np.zeros(confusion.shape), where=sums > 0)
    numbered = classes <= 20
    side = min(max(3.6, 0.5 * classes + 1.6), 9.0) if numbered else 7.5
    names = 0.4 if classes <= 4 else 1.0
    figure = _figure(2 * side + (0.6 if numbered else 3.6), side + 0.3 + names)
    columns = (1, 1) if numbered else (1, 1, 0.4)
    axes = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
    _draw_matrix(axes[0], confusion, class_names, "counts", numbered)
    _draw_matrix(axes[1], share, class_names, "share of the true class", numbered)
    axes[0].set_ylabel("true")
    axes[1].set_yticks([])
    right, total = int(np.trace(confusion)), int(confusion.sum())
    figure.suptitle(
        f"Confusion matrix ({SPLIT_TITLES[split]}): {right:,} of {total:,} right"
        + (f" ({_percent(right / total)})" if total else ""),
        weight="bold",
    )
    if not numbered:
        axes[2].axis("off")
        text = _mistakes(confusion, share, class_names)
        axes[2].text(0, 1, text, va="top", fontsize=10, linespacing=1.25)
    return figure


def plot_side_by_side(
    groups: Sequence[Sequence[tuple[Sequence[Record], int]]],
    titles: Sequence[Sequence[str]],
    *,
    shared_loss: bool = True,
) -> Figure:
    """Losses above accuracies, a column for each group of runs, six columns side by side at most.

    Accuracies are on one scale, and losses too with `shared_loss`.

    Args:
      groups: of each run its history and best epoch, which is marked.
      titles: the lines above each column, the first in bold (24 characters fit, 36 in others).
      shared_loss: whether the losses of the groups mean the same.
    """
    bands = math.ceil(len(groups) / MOST_COLUMNS)
    across = math.ceil(len(groups) / bands)
    lines = max(map(len, titles))
    width = 2.5 if across > 3 else 3.4
    figure = _figure(width * across + 0.7, bands * (4.3 + 0.15 * lines) + 0.3)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(2 * bands, across, squeeze=False)
    curves = {metric: [_curves(group, metric) for group in groups] for metric in _COMPARED}
    for place, title in enumerate(titles):
        band, column = divmod(place, across)
        for row, metric in enumerate(_COMPARED):
            axes = grid[2 * band + row, column]
            _draw_runs(axes, curves[metric][place], [best for _, best in groups[place]])
            shared = shared_loss or metric != "loss"
            scaled = curves[metric] if shared else [curves[metric][place]]
            _scale(axes, [values for runs in scaled for _, _, values in runs], metric == "accuracy")
            axes.tick_params(labelsize=8, labelleft=column == 0 or not shared, labelbottom=row == 1)
            if column == 0:
                logarithmic = shared and axes.get_yscale() == "log"
                axes.set_ylabel(f"{metric}, logarithmic" if logarithmic else metric)
        axes.set_xlabel("epoch", fontsize=9)
        _write_titles(grid[2 * band, column], title, lines)
    for axes in grid[-2:, len(groups) - (bands - 1) * across :].flat:
        axes.axis("off")
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False
        )
    return figure


_COMPARED = ("loss", "accuracy")


def _curves(
    runs: Sequence[tuple[Sequence[Record], int]], metric: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Split, epochs and values of each curve of some runs: train and validation in turn."""
    return [
        (split, *_series(history, split, metric)) for history, _ in runs for split in SPLITS[:2]
    ]


def _draw_runs(
    axes: Axes, curves: Sequence[tuple[str, np.ndarray, np.ndarray]], best_epochs: Sequence[int]
) -> None:
    """The curves of the runs of one group, thinner where there are several."""
    thin = len(best_epochs) > 1
    for place, (split, epochs, values) in enumerate(curves):
        if not len(epochs):
            continue
        axes.plot(
            epochs, values, color=SPLIT_COLOURS[split], linestyle="-" if split == "train" else "--",
            linewidth=1.1 if thin else 1.8, alpha=0.8 if thin else 1.0, marker=_marker(epochs),
            markersize=4, label=SPLIT_TITLES[split],
        )  # fmt: skip
        best = epochs == best_epochs[place // 2]
        if split == "val" and best.any():
            axes.plot(
                epochs[best], values[best], "o", markersize=5 if thin else 7, linestyle="none",
                markerfacecolor="none", markeredgecolor=SPLIT_COLOURS[split], markeredgewidth=1.4,
                label="best epoch",
            )  # fmt: skip
    _frame(axes, [epochs for _, epochs, _ in curves])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))


def _write_titles(axes: Axes, lines: Sequence[str], most: int) -> None:
    """A bold line and smaller ones under it, above the axes; room is left for `most` lines."""
    axes.set_title(_short(lines[0], 24), loc="left", weight="bold", fontsize=10, pad=12 * most - 6)
    smaller = axes.annotate(
        "\n".join(_short(line, 36) for line in lines[1:]),
        (0, 1), (0, 12 * most - 9), xycoords="axes fraction", textcoords="offset points",
        va="top", fontsize=8, color="#555555", linespacing=1.25,
    )  # fmt: skip
    smaller.set_in_layout(False)  # a long line would make all columns narrow


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _series(history: Sequence[Record], split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (E,) and values (E,) or (E, C) of a metric, of the records that have it."""
    records = [
        record for record in history if record["split"] == split and record.get(metric) is not None
    ]
    epochs = np.array([record["epoch"] for record in records], int)
    return epochs, np.array([record[metric] for record in records], float)


def _judged_split(history: Sequence[Record]) -> str:
    measured = {record["split"] for record in history}
    return next((split for split in ("val", "train", "test") if split in measured), "val")


def _draw_splits(
    axes: Axes, history: Sequence[Record], metric: str, best_epoch: int | None
) -> None:
    percent = metric == "accuracy"
    curves = {split: _series(history, split, metric) for split in ("train", "val")}
    for split, (epochs, values) in curves.items():
        if not len(epochs):
            continue
        last = _percent(values[-1]) if percent else f"{values[-1]:.4f}"
        axes.plot(
            epochs, values, color=SPLIT_COLOURS[split], marker=_marker(epochs), linewidth=2,
            linestyle="-" if split == "train" else "--",
            label=f"{SPLIT_TITLES[split]}, last {last}",
        )  # fmt: skip
        if split == _judged_split(history) and best_epoch is not None and best_epoch in epochs:
            value = values[epochs == best_epoch][0]
            shown = _percent(value) if percent else f"{value:.4f}"
            axes.plot(
                best_epoch, value, "o", markersize=10, markerfacecolor="none", linestyle="none",
                markeredgecolor=SPLIT_COLOURS[split], markeredgewidth=2,
                label=f"best epoch {best_epoch}, {shown}",
            )  # fmt: skip
    _finish(axes, metric.capitalize(), "", best_epoch, curves.values(), percent)
    _legend(axes)


def _draw_scores(
    axes: Axes, history: Sequence[Record], average: str, best_epoch: int | None
) -> None:
    split = _judged_split(history)
    curves = {
        name: _series(history, split, f"{name}_{average}") for name in ("precision", "recall", "f1")
    }
    # The three often coincide, so the first are wide and the last is thin.
    for place, (name, (epochs, values)) in enumerate(curves.items()):
        if len(epochs):
            axes.plot(
                epochs, values, color=("#56B4E9", "#E69F00", "#000000")[place],
                linewidth=(6, 3, 1.2)[place], linestyle=("-", "-", "--")[place],
                marker=_marker(epochs), markersize=(11, 8, 4)[place],
                label=f"{'F1' if name == 'f1' else name}, last {_percent(values[-1])}",
            )  # fmt: skip
    how = "mean of classes" if average == "macro" else "weighted by class size"
    where = f"{SPLIT_TITLES[split]}, {how}"
    _finish(axes, "Precision, recall, F1", where, best_epoch, curves.values(), True)
    _legend(axes)


def _finish(
    axes: Axes,
    title: str,
    subtitle: str,
    best_epoch: int | None,
    curves: Iterable[tuple[np.ndarray, np.ndarray]],
    percent: bool,
) -> None:
    """Titles, grid, whole epochs, and a value axis that suits what `curves` hold."""
    axes.set_title(title, loc="left", weight="bold")
    axes.set_title(subtitle, loc="right", fontsize=9, color="#555555")
    axes.set_xlabel("epoch")
    curves = [(epochs, values) for epochs, values in curves if len(epochs)]
    _frame(axes, [epochs for epochs, _ in curves])
    if best_epoch is not None:
        axes.axvline(best_epoch, color="#999999", linewidth=1, linestyle=":", zorder=0)
    _scale(axes, [values for _, values in curves], percent)
    if axes.get_yscale() == "log":
        axes.set_title("logarithmic", loc="right", fontsize=9, color="#555555")


def _frame(axes: Axes, epochs: Iterable[np.ndarray]) -> None:
    """A grid, no frame, and an axis of whole epochs."""
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    every = np.concatenate([np.zeros(0, int), *epochs])
    if len(every):
        margin = max(0.5, 0.02 * float(np.ptp(every)))
        axes.set_xlim(every.min() - margin, every.max() + margin)


def _scale(axes: Axes, curves: Iterable[np.ndarray], percent: bool) -> None:
    """A value axis that suits what `curves` hold."""
    values = np.concatenate([np.zeros(0), *(curve.ravel() for curve in curves)])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if percent:
        span = high - low
        room = max(0.08 * span, 0.02 - span / 2)
        axes.set_ylim(max(low - room, -0.005), min(high + room, 1.0 + 0.02 * max(span, 0.1)))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    elif low > 0 and high > 20 * low:
        # On a linear axis the last epochs of a loss that falls so far are one flat line.
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _legend(axes: Axes, **options: Any) -> None:
    """A legend under the axes, where it hides no curve, an entry a row."""
    if axes.get_legend_handles_labels()[0]:
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "borderaxespad": 0}
        axes.legend(**{"frameon": False, **below, **options})


def _draw_spread(axes: Axes, epochs: np.ndarray, values: np.ndarray) -> None:
    low, lower, middle, upper, high = np.nanquantile(values, [0, 0.1, 0.5, 0.9, 1], axis=1)
    axes.fill_between(epochs, low, high, color="#EEEEEE", label="all classes")
    axes.fill_between(epochs, lower, upper, color="#CFCFCF", label="middle 80 %")
    axes.plot(epochs, middle, color="#555555", linewidth=3, label=f"{_percent(middle[-1])}  median")


def _plot_few_counts(
    class_names: Sequence[str], splits: Sequence[str], table: np.ndarray
) -> Figure:
    classes = table.shape[1]
    thickness = 0.8 / len(splits)
    figure = _figure(8, 1.4 + classes * (0.14 * len(splits) + (0.14 if classes <= 12 else 0.02)))
    axes = figure.add_subplot()
    for place, split in enumerate(splits):
        where = np.arange(classes) + (place - (len(splits) - 1) / 2) * thickness
        bars = axes.barh(
            where, table[place], thickness * 0.92, color=SPLIT_COLOURS[split],
            label=f"{SPLIT_TITLES[split]}  {table[place].sum():,.0f}",
        )  # fmt: skip
        axes.bar_label(
            bars,
            [f"{value:,.0f}" for value in table[place]],
            padding=3,
            fontsize=8 if classes <= 12 else 6,
        )
    axes.set_yticks(np.arange(classes), [_short(name) for name in class_names])
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Images of each class", loc="left", weight="bold")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _draw_matrix(
    axes: Axes, values: np.ndarray, class_names: Sequence[str], title: str, numbered: bool
) -> None:
    """Cells on the diagonal in blue, mistakes in vermilion, darker for more."""
    classes = len(values)
    scale = values / max(values.max(), 1e-12)
    if not numbered:
        # Cells of a few pixels: single mistakes among hundreds of classes have to show.
        faintest = 0.35 if classes > 60 else 0.15
        scale = np.where(values > 0, faintest + (1 - faintest) * scale**0.5, 0.0)
    right = np.eye(classes, dtype=bool)
    scale = np.where(right | (not numbered), scale, np.sqrt(scale))
    strength = scale[..., None]
    colour = np.where(right[..., None], to_rgb(RIGHT), to_rgb(WRONG))
    axes.imshow(1 - strength * (1 - colour), aspect="auto", interpolation="nearest")
    ticks = list(range(0, classes, math.ceil(classes / 30)))
    size = 9 if classes <= 10 else 8
    names = [_short(class_names[i], 18) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90 if classes > 4 else 0, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_title(title)
    if not numbered:
        return
    for i, j in np.ndindex(classes, classes):
        value = values[i, j]
        axes.text(
            j, i, f"{value:,}" if values.dtype.kind in "iu" else _cell(float(value)),
            ha="center", va="center", fontsize=10 if classes <= 10 else 7,
            color="#BBBBBB" if value == 0 else "white" if scale[i, j] > 0.6 else "black",
        )  # fmt: skip


def _mistakes(confusion: np.ndarray, share: np.ndarray, class_names: Sequence[str]) -> str:
    """The most frequent mistakes and the classes that are recognised least, as text."""
    wrong = confusion.astype(np.int64, copy=True)
    np.fill_diagonal(wrong, 0)
    rows = ["Most frequent mistakes (true \N{RIGHTWARDS ARROW} predicted)", ""]
    for flat in np.argsort(-wrong, axis=None, kind="stable")[:10]:
        i, j = divmod(int(flat), len(wrong))
        if wrong[i, j]:
            pair = " \N{RIGHTWARDS ARROW} ".join(_short(class_names[k], 20) for k in (i, j))
            rows.append(f"{wrong[i, j]:,}  ({100 * share[i, j]:.0f} %)  {pair}")
    present = np.flatnonzero(confusion.sum(1))
    rows += ["", "", "Classes recognised least", ""]
    for i in present[np.argsort(np.diag(share)[present], kind="stable")][:10].tolist():
        rows.append(f"{100 * share[i, i]:.0f} %  {_short(class_names[i])}")
    return "\n".join(rows)


def _cell(share: float) -> str:
    return "0" if share == 0 else f"{100 * share:.1f} %" if share < 1 else "100 %"


def _marker(epochs: np.ndarray) -> str:
    return "o" if len(epochs) <= 2 else ""


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.2f} %"


def _short(name: Any, most: int = 28) -> str:
    """A class name of at most `most` characters, in which matplotlib finds no formula.

    What is not UTF-8 becomes ?, since matplotlib draws nothing else.
    """
    text = " ".join(str(name).encode(errors="replace").decode().split())
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text.replace("$", r"\$")
