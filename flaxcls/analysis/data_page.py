"""The page of `--mode=check_data`: tables, contact sheets, and what is wrong as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flaxcls.analysis import html
from flaxcls.analysis.data_findings import FAIL, Finding, imbalance, printable
from flaxcls.analysis.data_survey import Survey
from flaxcls.analysis.duplicates import LEAST_CORRELATION
from flaxcls.data.decode import UnreadableImage, in_threads
from flaxcls.history import SPLIT_TITLES

# Pixels of the longer side of a picture on a contact sheet, of duplicates and of extreme shapes;
# smaller images are shown as they are.
_SIDE, _LARGER, _LARGEST = 96, 128, 240
# Pictures on all contact sheets together, and of one class at most and at least.
_PICTURES, _MOST, _LEAST = 1600, 16, 4
_SHEETS = 400
# Correlations from which pairs of near duplicates are counted.
_LEVELS = (LEAST_CORRELATION, 0.99, 0.995, 0.999)
# Groups and pairs of duplicates that are shown, copies of one image, and rows of a list.
_GROUPS, _COPIES, _ROWS = 24, 4, 1000


def write(path: Path, config: ConfigDict, seen: Survey, found: Sequence[Finding]) -> None:
    """Writes the page to `path`, atomically."""
    html.write_page(path, "check_data.html", **page_values(config, seen, found))


def page_values(config: ConfigDict, seen: Survey, found: Sequence[Finding]) -> dict[str, Any]:
    """Returns what the template is given."""
    groups, pairs = _groups(seen), _pairs(seen)
    extremes = _extremes(seen)
    sheets = _sheets(seen)
    wanted = {i: _SIDE for sheet in sheets for i in sheet["images"]}
    wanted |= {i: _LARGER for shown in (*groups, *pairs) for i in shown["images"]}
    wanted |= {row["image"]: _LARGEST for row in extremes}
    return {
        "name": printable(seen.name),
        "source": config.data.source,
        "place": printable(config.data.path or ""),
        "size": config.data.image_size,
        "total": len(seen),
        "splits": [
            {"title": SPLIT_TITLES[key], "count": len(split)} for key, split in seen.parts.items()
        ],
        "findings": [
            {
                "level": finding.level,
                "title": finding.title,
                "count": finding.count,
                "sentence": printable(finding.sentence),
                "items": [printable(item) for item in finding.items[:_ROWS]],
                "more": max(0, finding.count - _ROWS) if len(finding.items) > _ROWS else 0,
            }
            for finding in found
        ],
        "counts": {finding.key: finding.count for finding in found},
        "failed": sum(finding.level == FAIL for finding in found),
        "imbalance": imbalance(seen),
        "classes": _classes(seen),
        "grey_differs": 0 < int(seen.facts.grey.sum()) < len(seen),
        "groups": groups,
        "groups_left": len(seen.duplicates.groups) - len(groups),
        "pairs": pairs,
        "pairs_left": len(seen.duplicates.near) - len(pairs),
        "levels": _levels(seen),
        "pairs_complete": seen.duplicates.near.complete,
        "measures": _measures(seen),
        "extremes": extremes,
        "sheets": sheets,
        "sheets_left": len(seen.class_names) - len(sheets),
        "pictures": _pictures(seen, wanted),
        "captions": {i: _caption(seen, i) for i in wanted},
    }


def _caption(seen: Survey, position: int) -> dict[str, Any]:
    facts = seen.facts
    return {
        "name": printable(seen.name_of(position)),
        "split": SPLIT_TITLES[seen.split_of(position)],
        "class": printable(seen.class_of(position)),
        "size": f"{facts.width[position]} x {facts.height[position]}",
    }


def _pictures(seen: Survey, wanted: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    """Returns the wanted images as addresses, each of its largest side in pixels.

    A file that has gone meanwhile is left out.
    """

    def picture(position: int) -> tuple[int, dict[str, Any] | None]:
        try:
            image = seen.image(position, wanted[position])
        except UnreadableImage:
            return position, None
        small = max(image.shape[:2]) <= 40
        return position, {"address": html.thumbnail(image, wanted[position]), "small": small}

    return {i: value for i, value in in_threads(picture, sorted(wanted)) if value is not None}


def _classes(seen: Survey) -> list[dict[str, Any]]:
    train = seen.counts.get("train", np.zeros(len(seen.class_names), int))
    most = max(1, int(train.max(initial=0)))
    grey = np.bincount(seen.labels[seen.facts.grey], minlength=len(seen.class_names))
    totals = np.bincount(seen.labels, minlength=len(seen.class_names))
    return [
        {
            "name": printable(name),
            "counts": [int(counts[i]) for counts in seen.counts.values()],
            "bar": 100 * int(train[i]) / most,
            "grey": f"{int(grey[i]):,}" if totals[i] else "",
            "missing": name in seen.missing,
        }
        for i, name in enumerate(seen.class_names)
    ]


def _sheets(seen: Survey) -> list[dict[str, Any]]:
    """Returns some images of each class, spread evenly over it."""
    classes = min(len(seen.class_names), _SHEETS)
    each = min(_MOST, max(_LEAST, _PICTURES // max(1, classes)))
    order = np.argsort(seen.labels, kind="stable")
    members = np.split(
        order, np.cumsum(np.bincount(seen.labels, minlength=len(seen.class_names)))[:-1]
    )
    sheets = []
    for name, own in list(zip(seen.class_names, members, strict=True))[:_SHEETS]:
        places = np.linspace(0, len(own) - 1, min(each, len(own))).round().astype(int)
        images = [int(i) for i in own[places]]
        sheets.append({"name": printable(name), "count": len(own), "images": images})
    return sheets


def _groups(seen: Survey) -> list[dict[str, Any]]:
    d = seen.duplicates
    order = sorted(range(len(d.groups)), key=lambda g: (not d.across[g], not d.conflicting[g], g))
    return [
        {
            "images": [int(i) for i in d.groups[g][:_COPIES]],
            "copies": len(d.groups[g]),
            "across": bool(d.across[g]),
            "conflicting": bool(d.conflicting[g]),
        }
        for g in order[:_GROUPS]
    ]


def _pairs(seen: Survey) -> list[dict[str, Any]]:
    d = seen.duplicates
    return [
        {
            "images": [int(d.near.first[p]), int(d.near.second[p])],
            "correlation": float(d.near.correlation[p]),
            "across": bool(d.near_across[p]),
            "conflicting": bool(d.near_conflicting[p]),
        }
        for p in seen.telling_pairs()[:_GROUPS]
    ]


def _levels(seen: Survey) -> list[dict[str, Any]]:
    """Returns how many pairs correlate so much, across splits and within one."""
    d = seen.duplicates
    rows = []
    for level in _LEVELS:
        alike = d.near.correlation >= level
        across = int((alike & d.near_across).sum())
        rows.append({"level": level, "across": across, "within": int(alike.sum()) - across})
    return rows


def _measures(seen: Survey) -> list[dict[str, Any]]:
    """Returns a row for each side; none where all images are of one size."""
    rows = []
    for name, values in seen.measures().items():
        digits = 2 if name == "aspect" else 0
        levels = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
        title = "width / height" if name == "aspect" else f"{name}, pixels"
        rows.append({"title": title, "values": [f"{level:,.{digits}f}" for level in levels]})
    return rows


def _extremes(seen: Survey) -> list[dict[str, Any]]:
    """Returns the smallest, largest, widest and tallest image, where sizes differ."""
    if not len(seen) or not (np.ptp(seen.facts.width) or np.ptp(seen.facts.height)):
        return []
    measured = seen.measures()
    area, aspect = measured["width"] * measured["height"], measured["aspect"]
    chosen = {
        "smallest": area.argmin(),
        "largest": area.argmax(),
        "widest": aspect.argmax(),
        "tallest": aspect.argmin(),
    }
    return [{"title": title, "image": int(position)} for title, position in chosen.items()]
