"""`--mode=check_data`: what is wrong with a data set, before anything is trained on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flaxcls import runlog
from flaxcls.analysis import data_page
from flaxcls.analysis.data_findings import (
    FAIL,
    GOOD,
    NOTE,
    WARN,
    Finding,
    counted,
    exit_code,
    findings,
    imbalance,
    printable,
)
from flaxcls.analysis.data_survey import Survey, survey
from flaxcls.errors import InputError
from flaxcls.progress import class_count_table, duration, make_console, show

# What the terminal shows of each finding; the page and the JSON hold more. Of what fails by its
# name, files and classes, all are shown.
_SHOWN = 5
_BY_NAME = ("unreadable", "missing_classes")
# The JSON holds as many pairs of near duplicates.
_MOST_PAIRS = 10_000
_WORDS = {FAIL: "FAILS", WARN: "warning", NOTE: "note", GOOD: "ok"}
_STYLES = {FAIL: "bold red", WARN: "yellow", NOTE: "", GOOD: "green"}


def check_data(config: ConfigDict, folder: Path) -> int:
    """Looks at every image that a config names and says what is wrong with the data.

    Unreadable files, missing classes, duplicates within and across the splits that the config
    draws, conflicting labels, class counts, sizes: as a table on the terminal, as a page
    (`check_data.html`, with a contact sheet of each class) and as `check_data.json`, both in
    `folder`. Nothing is written where the data are.

    Returns:
      1 where files cannot be read, classes have no training images or exact duplicates lie in
      several splits; else 0.

    Raises:
      InputError: there are no data to check, the splits cannot be drawn, or the folder lies among
        the data.
    """
    check_outside(folder, config.data.path)
    began = time.monotonic()
    console = make_console()
    with _bar(console) as bar:
        seen = survey(config, lambda total: _counter(bar, total))
        bar.add_task("comparing images", total=None)
        found = findings(seen, config.data.image_size, config.data.channels)
    seconds = time.monotonic() - began
    code = exit_code(found)
    runlog.write_json(folder / "check_data.json", record(config, seen, found, seconds))
    data_page.write(folder / "check_data.html", config, seen, found)
    show(console, class_count_table([*map(printable, seen.class_names)], _shown_counts(seen)))
    show(console, "")
    show(console, findings_table(found))
    for finding in found:
        if finding.items and finding.level in (FAIL, WARN):
            show(console, _listing(finding))
    verdict = sum(finding.level == FAIL for finding in found)
    show(console, "")
    show(
        console,
        f"{counted(len(seen), 'image')} checked in {duration(seconds)}: "
        + (f"{counted(verdict, 'check')} failed" if code else "nothing that fails")
        + f"; see {folder / 'check_data.html'}",
    )
    return code


def check_outside(folder: Path, data: str | None) -> None:
    """Raises InputError where `folder` is the data's own or lies inside it."""
    if not data:
        return
    place, root = (Path(os.path.realpath(os.path.expanduser(p))) for p in (folder, data))
    if place.is_relative_to(root):
        where = "is" if place == root else "lies inside"
        raise InputError(
            f"--output: the folder '{folder}' {where} data.path '{data}', where its files would "
            "be taken for data; give another --output"
        )


def findings_table(found: Sequence[Finding]) -> Table:
    """One row for each thing that was looked for."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in found:
        word = Text(_WORDS[finding.level], style=_STYLES[finding.level])
        table.add_row(word, Text(finding.title), Text(printable(finding.sentence)))
    return table


def _listing(finding: Finding) -> str:
    shown = finding.items if finding.key in _BY_NAME else finding.items[:_SHOWN]
    lines = ["", f"{finding.title}:", *(f"  {printable(item)}" for item in shown)]
    if len(shown) < finding.count:
        lines.append(f"  ... {finding.count - len(shown):,} more, see check_data.json")
    return "\n".join(lines)


def _shown_counts(seen: Survey) -> dict[str, list[int]]:
    counts = {key: value.tolist() for key, value in seen.counts.items()}
    return counts or {"train": [0] * len(seen.class_names)}


def _bar(console: Console) -> Progress:
    """A live bar on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _counter(bar: Progress, total: int) -> Callable[[int], object]:
    task = bar.add_task("looking at images", total=total)
    return lambda count: bar.advance(task, count)


def record(
    config: ConfigDict, seen: Survey, found: Sequence[Finding], seconds: float
) -> dict[str, Any]:
    """Returns what `check_data.json` holds: all that was found, by name."""
    d = seen.duplicates
    return {
        "format_version": 1,
        "data": {"name": seen.name, "source": config.data.source, "path": config.data.path},
        "exit_code": exit_code(found),
        "images": len(seen),
        "seconds": round(seconds, 3),
        "findings": [
            {"key": f.key, "level": f.level, "count": f.count, "sentence": f.sentence}
            for f in found
        ],
        "classes": [
            {"name": name, **{key: int(counts[i]) for key, counts in seen.counts.items()}}
            for i, name in enumerate(seen.class_names)
        ],
        "imbalance": imbalance(seen),
        "unreadable": seen.faults,
        "missing_classes": seen.missing,
        "unmeasured_classes": seen.absent,
        "exact_duplicates": [
            {
                "images": [_example(seen, i) for i in group],
                "across_splits": bool(across),
                "conflicting_labels": bool(conflicting),
            }
            for group, across, conflicting in zip(d.groups, d.across, d.conflicting, strict=True)
        ],
        "near_duplicates": {
            "pairs": len(d.near),
            "complete": d.near.complete,
            "across_splits": int(d.near_across.sum()),
            "conflicting_labels": int(d.near_conflicting.sum()),
            "most_alike": [
                {
                    "correlation": round(float(d.near.correlation[i]), 4),
                    "images": [_example(seen, d.near.first[i]), _example(seen, d.near.second[i])],
                }
                for i in seen.telling_pairs()[:_MOST_PAIRS]
            ],
        },
        "grey": [seen.name_of(i) for i in np.flatnonzero(seen.facts.grey)]
        if not seen.facts.grey.all()
        else len(seen),
        "sizes": _sizes(seen),
        "unused": seen.unused,
    }


def _example(seen: Survey, position: int) -> dict[str, str]:
    return {
        "name": seen.name_of(position),
        "split": seen.split_of(position),
        "class": seen.class_of(position),
    }


def _sizes(seen: Survey) -> Mapping[str, Any]:
    return {
        name: {
            "smallest": float(values.min()),
            "median": float(np.median(values)),
            "largest": float(values.max()),
            "of": [seen.name_of(int(values.argmin())), seen.name_of(int(values.argmax()))],
        }
        for name, values in seen.measures().items()
    }
