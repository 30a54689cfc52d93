"""Finished runs side by side: a table of their numbers and a figure of their curves.

Runs of one config that differ in the seed alone are one group, which has a mean and a standard
deviation. Nothing here touches a device, so that runs can be compared while others train.
"""

import csv
import glob
import io
import itertools
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flaxcls import config as config_module
from flaxcls import runlog
from flaxcls.analysis.plots import plot_side_by_side, save
from flaxcls.errors import InputError
from flaxcls.history import percent
from flaxcls.progress import duration, make_console, show
from flaxcls.results import read_description, read_summary

# Keys in which the runs of one group may differ: the seed, and what changes no result.
FREE = (*config_module.MAY_CHANGE, "seed", "eval", "data.prefetch")
NAMED = {"model": "model.name", "loss": "loss.name", "optimizer": "optimizer.name"}
ANY_WIDTH = 10_000
MOST_KEYS = 4  # columns of the printed table for keys that were varied

# What is compared, by its name in the CSV: a title, and where the summary has it.
MEASURES = {
    "best_epoch": ("best epoch", ("best_epoch",)),
    "val_accuracy": ("validation %", ("val", "accuracy")),
    "test_accuracy": ("test %", ("test", "accuracy")),
    "val_parent_accuracy": ("validation parent %", ("val", "parent_accuracy")),
    "test_parent_accuracy": ("test parent %", ("test", "parent_accuracy")),
    "seconds": ("time", ("seconds",)),
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      folder: of the run.
      name: its path from the folder that holds all runs compared.
      keys: its config by dotted key.
      summary: its `summary.json`.
      classes: the names of its classes and the number of training images in all; () where the
        classes are drawn with the seed.
    """

    folder: Path
    name: str
    keys: dict[str, Any]
    summary: dict[str, Any]
    classes: tuple[Any, ...] = ()

    def measured(self, measure: str) -> float:
        """One of `MEASURES`, NaN where the run does not have it."""
        value: Any = self.summary
        for key in MEASURES[measure][1]:
            value = (value or {}).get(key)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing that matters but the seed."""

    runs: tuple[Run, ...]

    @property
    def keys(self) -> dict[str, Any]:
        """The config of its first run."""
        return self.runs[0].keys

    def measured(self, measure: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of one of `MEASURES`; of one run that is NaN."""
        values = np.array([run.measured(measure) for run in self.runs])
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Column:
    """A column of the table that people read.

    Attributes:
      title: above it.
      cells: one a group.
      numeric: whether they stand to the right.
      constant: whether it may be left out where all cells are the same.
    """

    title: str
    cells: list[str]
    numeric: bool = False
    constant: bool = False


def compare_runs(patterns: str) -> list[Group]:
    """Compares the finished runs that match shell patterns, separated by commas.

    Prints a table, best validation accuracy first, and writes into the folder that holds the runs:
    `compare.md` (the table), `compare.csv` (a row a group), `compare_runs.csv` (a row a run) and
    `compare.png` (losses and accuracies over the epochs, a column a group).

    Returns:
      The groups, in the order of the table.

    Raises:
      InputError: no finished run matches, or the files of one are damaged.
    """
    folders, notes = find_runs(patterns)
    parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    groups = group_runs([read_run(folder, parent) for folder in folders])
    notes += _doubts(groups)
    keys = varied_keys(groups)
    columns = table_columns(groups, [key for key in keys if _is_choice(key, groups)][:MOST_KEYS])

    histories = [
        [
            (runlog.read_metrics(run.folder / "metrics.jsonl"), run.summary["best_epoch"])
            for run in group.runs
        ]
        for group in groups
    ]
    same_loss = len({group.keys["loss.name"] for group in groups}) == 1
    figure = plot_side_by_side(histories, _titles(groups, columns), shared_loss=same_loss)
    runlog.write_bytes(parent / "compare.md", runlog.encode(_markdown(columns, notes)))
    runlog.write_bytes(parent / "compare.csv", _csv(_group_rows(groups, keys)))
    runlog.write_bytes(parent / "compare_runs.csv", _csv(_run_rows(groups, keys)))
    save(figure, parent / "compare.png")

    _print(columns, notes)
    show(
        make_console(),
        "compare.md, compare.csv, compare_runs.csv and compare.png are in " + _shown(parent),
    )
    return groups


def find_runs(patterns: str) -> tuple[list[Path], list[str]]:
    """Returns the folders of finished runs, absolute, and notes on what else matches.

    Raises:
      InputError: there is none.
    """
    notes: list[str] = []
    whole = os.path.exists(os.path.expanduser(patterns))  # a comma may be part of a name
    split = [patterns] if whole else [p.strip() for p in patterns.split(",") if p.strip()]
    found: dict[str, str] = {}  # one run may match twice, or through a link
    for pattern in split:
        path = os.path.expanduser(pattern)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        folders = [match for match in matches if os.path.isdir(match)]
        if not folders:
            notes.append(f"no folder matches '{pattern}'")
        for folder in folders:
            found.setdefault(os.path.realpath(folder), folder)
    runs = [path for path in found.values() if os.path.isfile(os.path.join(path, "config.json"))]
    finished = [path for path in runs if os.path.isfile(os.path.join(path, "summary.json"))]
    if not finished:
        raise InputError(_nothing(patterns, runs, list(found.values())))
    if unfinished := [path for path in runs if path not in finished]:
        notes.append(f"left out, not finished: {_listed(unfinished)}")
    if others := [path for path in found.values() if path not in runs]:
        notes.append(f"ignored, no runs: {_listed(others)}")
    return [Path(os.path.abspath(path)) for path in finished], notes


def _nothing(patterns: str, runs: Sequence[str], folders: Sequence[str]) -> str:
    if runs:
        return (
            f"--workdir: no run that matches '{patterns}' is finished ({_listed(runs)}); run the "
            "command of one again, which goes on from where it was"
        )
    if folders:
        return (
            f"--workdir: no folder that matches '{patterns}' is that of a run ({_listed(folders)});"
            f" give the folders of runs, such as '{folders[0].rstrip('/')}/*'"
        )
    return f"--workdir: no folder matches '{patterns}'; give the folders of runs, such as 'runs/*'"


def read_run(folder: Path, parent: Path) -> Run:
    """Reads what is compared of a finished run.

    Raises:
      InputError: its config or its summary is damaged, or of another version.
    """
    config, _ = config_module.resolve(config_module.load(folder / "config.json"))
    name = os.path.relpath(folder, parent)
    classes: tuple[Any, ...] = ()
    if not config.data.num_classes_drawn and (folder / "preprocess.json").is_file():
        described = read_description(folder)
        classes = (*described["class_names"], sum(described["class_counts"]))
    return Run(folder, name, config_module.flatten(config), read_summary(folder), classes)


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Puts runs of one config but for `FREE` together; the best validation accuracy comes first.

    One config may have been run on other data: so the classes and the model's size count too.
    """
    members: dict[Any, list[Run]] = {}
    for run in runs:
        kept = tuple((key, value) for key, value in sorted(run.keys.items()) if not _is_free(key))
        members.setdefault((kept, run.summary["params"], run.classes), []).append(run)
    groups = [Group(tuple(sorted(some, key=_seed_and_name))) for some in members.values()]
    return sorted(groups, key=_worst_last)


def _seed_and_name(run: Run) -> tuple[int, str]:
    return run.keys["seed"], run.name


def _worst_last(group: Group) -> tuple[bool, float, str]:
    accuracy, _ = group.measured("val_accuracy")
    return math.isnan(accuracy), -accuracy if accuracy == accuracy else 0.0, group.runs[0].name


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _doubts(groups: Sequence[Group]) -> list[str]:
    """Notes on groups whose runs may be other than several seeds of one config."""
    notes = []
    for group in groups:
        for seed, some in itertools.groupby(group.runs, lambda run: run.keys["seed"]):
            if len(names := [run.name for run in some]) > 1:
                notes.append(f"of one config and one seed ({seed}), all count: {_listed(names)}")
        paths = {run.keys["data.path"]: run.name for run in group.runs}
        if len(paths) > 1:
            what = ", ".join(f"{name} ({path})" for path, name in paths.items())
            notes.append(f"taken for the same data at another data.path: {what}")
    return notes


def varied_keys(groups: Sequence[Group]) -> list[str]:
    """Returns the config keys that differ between groups, those with most values first.

    Model, loss and optimizer have columns of their own and are not among them.
    """
    different = {
        key: len({_text(group.keys[key]) for group in groups})
        for key in groups[0].keys
        if not _is_free(key) and key not in NAMED.values()
    }
    return sorted((key for key in different if different[key] > 1), key=lambda key: -different[key])


def _is_choice(key: str, groups: Sequence[Group]) -> bool:
    """Whether somebody varied a key, which may also come and go with the choice it belongs to."""
    values = {_text(group.keys[key]) for group in groups}
    return len(values - {""} if key in _BRANCH_KEYS else values) > 1


_BRANCH_KEYS = {
    f"{selector.partition('.')[0]}.{key}"
    for selector, branches in config_module.BRANCHES.items()
    for keys in branches.values()
    for key in keys
}


def table_columns(groups: Sequence[Group], keys: Sequence[str]) -> list[Column]:
    """Returns what people read, a cell a group; `keys` of the config get columns too."""
    columns = [
        Column("#", [str(place) for place in range(1, len(groups) + 1)], numeric=True),
        Column("run", [join_names([run.name for run in group.runs]) for group in groups]),
    ]
    for title, key in NAMED.items():
        columns.append(Column(title, [group.keys[key] for group in groups], constant=True))
    columns += [Column(key, [_rounded(group.keys[key]) for group in groups]) for key in keys]
    params = [f"{group.runs[0].summary['params']:,}" for group in groups]
    columns.append(Column("parameters", params, numeric=True))
    columns.append(Column("seeds", [str(len(group.runs)) for group in groups], numeric=True))
    for measure in _present(groups):
        cells = [_spread(measure, *group.measured(measure)) for group in groups]
        columns.append(Column(MEASURES[measure][0], cells, numeric=True))
    return columns


def _present(groups: Sequence[Group]) -> list[str]:
    """The measures that every run has, and those of parents where any run has them."""
    return [
        measure
        for measure in MEASURES
        if "parent" not in measure
        or any(not math.isnan(run.measured(measure)) for group in groups for run in group.runs)
    ]


def _spread(measure: str, mean: float, std: float) -> str:
    """`91.37`, or `91.37 ± 0.05` of several runs."""
    one: Callable[[float], str]
    if measure == "seconds":
        one, mean_text = duration, duration(mean)
    elif measure == "best_epoch":
        one, mean_text = "{:.1f}".format, f"{mean:.0f}" if math.isnan(std) else f"{mean:.1f}"
    else:
        one, mean_text = _hundredths, percent(mean).removesuffix(" %")
    return mean_text if math.isnan(std) else f"{mean_text} ± {one(std)}"


def _hundredths(share: float) -> str:
    return f"{100 * share:.2f}"


def join_names(names: Sequence[str]) -> str:
    """`lenet-s{0,1}` of lenet-s0 and lenet-s1, as a shell expands it."""
    if len(names) == 1:
        return names[0]
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = "".join(letters[0] for letters in shared)
    ends = [name[len(start) :] for name in names]
    return f"{start}{{{','.join(ends)}}}"


def _titles(groups: Sequence[Group], columns: Sequence[Column]) -> list[list[str]]:
    """What stands above each column of the figure: the model, what was varied, the result."""
    varied = [
        column
        for column in columns
        if column.title in ("loss", "optimizer", *groups[0].keys) and len(set(column.cells)) > 1
    ]
    titles = []
    for place, group in enumerate(groups):
        words = [
            # The space does not break, so that a line ends after a value.
            value if column.constant else f"{_last(column.title)}\N{NO-BREAK SPACE}{value}"
            for column in varied
            if (value := column.cells[place])
        ]
        result = _spread("val_accuracy", *group.measured("val_accuracy"))
        seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        titles.append(
            [
                f"{place + 1}  {group.keys['model.name']}",
                *textwrap.wrap(", ".join(words), 36, break_long_words=False),
                f"validation {result} %{seeds}",
            ]
        )
    return titles


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _markdown(columns: Sequence[Column], notes: Sequence[str]) -> str:
    rules = ["---:" if column.numeric else ":---" for column in columns]
    rows = [[column.title for column in columns], rules]
    rows += [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    caption = "Accuracies at the best epoch; with several seeds mean ± standard deviation (n - 1)."
    figure = "![Loss and accuracy over the epochs, a column for each row above](compare.png)"
    listed = [*(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join([*lines, "", caption, "", *listed, figure, ""])


def _escape(cell: str) -> str:
    for mark in "|*<":
        cell = cell.replace(mark, "\\" + mark)
    return cell


def _group_rows(groups: Sequence[Group], keys: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(groups, 1):
        row = {"group": number, **_described(group.runs[0], keys), "n": len(group.runs)}
        for measure in _present(groups):
            row[f"{measure}_mean"], row[f"{measure}_std"] = group.measured(measure)
        rows.append(row | {"runs": " ".join(run.name for run in group.runs)})
    return rows


def _run_rows(groups: Sequence[Group], keys: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(groups, 1):
        for run in group.runs:
            row = {"run": run.name, "group": number, "seed": run.keys["seed"]}
            row |= _described(run, keys)
            row |= {key: run.summary[key] for key in ("best_epoch", "epochs")}
            for split in ("val", "test"):
                scores = run.summary[split] or {}
                row |= {f"{split}_{name}": score for name, score in scores.items()}
            row |= {key: run.summary[key] for key in ("seconds", "images_per_second")}
            rows.append(row)
    return rows


def _described(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """What the run is, with the keys of the config that were varied."""
    named = {title: run.keys[key] for title, key in NAMED.items()}
    return named | {key: _text(run.keys[key]) for key in keys} | {"params": run.summary["params"]}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows under the names of all their values; a number in full precision, NaN and None empty."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    return runlog.encode(text.getvalue())


def _text(value: Any) -> str:
    """A value of the config; nothing where it does not apply or is left to the model."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def _rounded(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _text(value)


def _print(columns: Sequence[Column], notes: Sequence[str]) -> None:
    """Prints the table; where it is too wide for the terminal, what runs are and reached apart."""
    console = make_console()
    if not console.is_terminal:
        console.width = ANY_WIDTH  # a file has room: no cell is folded
    if not _fits(console, columns):
        same = [c for c in columns if c.constant and len(c.cells) > 1 and len(set(c.cells)) == 1]
        columns = [column for column in columns if column not in same]
        notes = [*(f"{column.title} {column.cells[0]} in all" for column in same), *notes]
    if not _fits(console, columns):
        number, *others = columns
        show(console, _table([number, *(column for column in others if not column.numeric)]))
        show(console, "")
        columns = [number, *(column for column in others if column.numeric)]
    show(console, _table(columns))
    for note in notes:
        show(console, note)


def _fits(console: Console, columns: Sequence[Column]) -> bool:
    options = console.options.update(max_width=ANY_WIDTH)
    return Measurement.get(console, options, _table(columns)).maximum <= console.width


def _table(columns: Sequence[Column]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.numeric else "left", overflow="fold"
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shown(folder: Path) -> str:
    """A folder as one types it here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)
