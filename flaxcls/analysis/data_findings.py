"""What a survey of a data set says, finding by finding, each in words with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flaxcls.analysis.data_survey import Survey
from flaxcls.analysis.duplicates import LEAST_CORRELATION
from flaxcls.analysis.image_facts import PECULIARITIES
from flaxcls.history import SPLIT_TITLES

# Below as many training images a class is called tiny.
TINY = 10
# From this ratio of the largest class to the smallest on, and of a side to the other.
IMBALANCED, ELONGATED = 10.0, 3.0
# An image whose shorter side must grow more than so often to be as large as training wants it.
ENLARGED = 2.0
# A class's share of grey images may lie so far from that of all before it gives the class away.
UNEVENLY_GREY = 0.25

LEVELS = FAIL, WARN, NOTE, GOOD = "fail", "warn", "note", "good"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
      key: its name in the JSON.
      level: fail (training would stop, or mislead), warn, note, or good: nothing was found.
      count: how many were found.
      title: what was looked for.
      sentence: what was found, and the remedy.
      items: each, in words.
    """

    key: str
    level: str
    count: int
    title: str
    sentence: str
    items: tuple[str, ...] = ()


def findings(survey: Survey, image_size: int, channels: int) -> list[Finding]:
    """Returns what was looked for and found, the worst first.

    Args:
      survey: of the data.
      image_size: pixels of a side in training.
      channels: 1 where all images are made grey.
    """
    found = [
        _unreadable(survey),
        _missing(survey),
        *_exact(survey),
        *_near(survey),
        _tiny(survey),
        _absent(survey),
        _imbalance(survey),
        _grey(survey, channels),
        _blank(survey),
        *_shapes(survey, image_size),
        *_peculiar(survey),
        *(Finding("not_used", NOTE, 1, "not used", note) for note in survey.notes),
    ]
    if survey.undrawn:
        sentence = f"of the files that can be read no splits can be drawn: {survey.undrawn}"
        found.append(Finding("splits", FAIL, 1, "splits", sentence))
    if survey.unused:
        sentence = (
            f"{counted(survey.unused, 'image')} are in no split, as the config asks for fewer"
        )
        found.append(Finding("unused", NOTE, survey.unused, "images left out", sentence))
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def exit_code(found: Sequence[Finding]) -> int:
    """Returns 1 where something failed, else 0."""
    return int(any(finding.level == FAIL for finding in found))


def counted(n: int, thing: str, things: str = "") -> str:
    """Returns "1 image" or "1,200 images"."""
    return f"{n:,} {thing if n == 1 else things or thing + 's'}"


def printable(name: str) -> str:
    """Returns a name as one line that no terminal acts on."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name
    )


def quoted(name: str) -> str:
    """Returns a name, printable, in quotes."""
    return f"'{printable(name)}'"


def described(survey: Survey, position: int) -> str:
    """Returns "'a/1.jpg' (train, cat)"."""
    split = SPLIT_TITLES[survey.split_of(position)]
    return f"{quoted(survey.name_of(position))} ({split}, {printable(survey.class_of(position))})"


def _unreadable(survey: Survey) -> Finding:
    items = tuple(f"{quoted(name)} {fault}" for name, fault in survey.faults.items())
    title = "unreadable files"
    if not items:
        every = "file" if survey.files else "image"
        return Finding("unreadable", GOOD, 0, title, f"every {every} can be read")
    sentence = (
        f"{counted(len(items), 'file')} cannot be read as an image; replace or remove "
        f"{'it' if len(items) == 1 else 'them'}"
        + (", or set data.on_bad=skip to leave such files out" if survey.files else "")
    )
    return Finding("unreadable", FAIL, len(items), title, sentence, items)


def _missing(survey: Survey) -> Finding:
    items = tuple(f"{quoted(name)}: {reason}" for name, reason in survey.missing.items())
    title = "missing classes"
    if not items:
        return Finding("missing_classes", GOOD, 0, title, "every class has training images")
    sentence = (
        f"{counted(len(items), 'class has', 'classes have')} nothing to train on; add training "
        "images or remove the class"
    )
    return Finding("missing_classes", FAIL, len(items), title, sentence, items)


def _exact(survey: Survey) -> list[Finding]:
    """Exact duplicates across splits, with several labels, and within a split."""
    d = survey.duplicates
    copies = [" = ".join(described(survey, i) for i in group[:6]) for group in d.groups]
    for place, group in enumerate(d.groups):
        if len(group) > 6:
            copies[place] += f" = ... ({counted(len(group), 'copy', 'copies')})"

    def finding(key: str, level: str, title: str, chosen: np.ndarray, what: str) -> Finding:
        items = tuple(copies[i] for i in np.flatnonzero(chosen))
        if not items:
            return Finding(key, GOOD, 0, title, "none")
        extra = sum(len(d.groups[i]) for i in np.flatnonzero(chosen))
        sentence = what.format(images=counted(len(items), "image"), copies=f"{extra:,}")
        return Finding(key, level, len(items), title, sentence, items)

    return [
        finding(
            "duplicates_across_splits",
            FAIL,
            "exact duplicates across splits",
            d.across,
            "{images} ({copies} copies) in more than one split, so that what is measured was "
            "trained on; keep one copy of each",
        ),
        finding(
            "conflicting_labels",
            WARN,
            "conflicting labels",
            d.conflicting,
            "{images} ({copies} copies) in more than one class; keep the right one",
        ),
        finding(
            "duplicates_within_splits",
            WARN,
            "exact duplicates within a split",
            ~d.across,
            "{images} ({copies} copies) more than once in one split; they count as often",
        ),
    ]


def _near(survey: Survey) -> list[Finding]:
    d = survey.duplicates
    more = "" if d.near.complete else "more than "

    def finding(key: str, title: str, chosen: np.ndarray, what: str) -> Finding:
        pairs = np.flatnonzero(chosen)
        if not pairs.size:
            return Finding(key, GOOD, 0, title, "none")
        images = len(np.unique([d.near.first[pairs], d.near.second[pairs]]))
        labels = int(d.near_conflicting[pairs].sum())
        sentence = (
            f"{more}{counted(len(pairs), 'pair')} of {images:,} images that look alike "
            f"(correlation {LEAST_CORRELATION} or more){what}"
            + (f"; {labels:,} of them with different labels" if labels else "")
        )
        items = tuple(
            f"{described(survey, d.near.first[i])} ~ {described(survey, d.near.second[i])} "
            f"{d.near.correlation[i]:.3f}"
            for i in pairs[:100]
        )
        return Finding(key, WARN, len(pairs), title, sentence, items)

    return [
        finding(
            "near_duplicates_across_splits",
            "near duplicates across splits",
            d.near_across,
            ", one of them trained on or tuned on: see whether they are one object",
        ),
        finding(
            "near_duplicates_within_splits",
            "near duplicates within a split",
            ~d.near_across,
            "",
        ),
    ]


def _tiny(survey: Survey) -> Finding:
    title = "tiny classes"
    counts = survey.counts.get("train", np.zeros(len(survey.class_names), int))
    tiny = [i for i in np.argsort(counts, kind="stable") if 0 < counts[i] < TINY]
    if not tiny:
        sentence = f"every class that is trained has {TINY} training images or more"
        return Finding("tiny_classes", GOOD, 0, title, sentence)
    items = tuple(
        f"{quoted(survey.class_names[i])}: {counted(int(counts[i]), 'training image')}"
        for i in tiny
    )
    sentence = (
        f"{counted(len(tiny), 'class has', 'classes have')} fewer than {TINY} training images; "
        "collect more, or join classes"
    )
    return Finding("tiny_classes", WARN, len(tiny), title, sentence, items)


def _absent(survey: Survey) -> Finding:
    title = "classes that are not measured"
    items = tuple(
        f"{quoted(name)}: no {SPLIT_TITLES[key]} images"
        for key, names in survey.absent.items()
        for name in names
    )
    if not items:
        return Finding("unmeasured_classes", GOOD, 0, title, "none")
    sentence = (
        f"{counted(len(items), 'time')} a class that is trained has no images in a split that "
        "measures; its score there is undefined"
    )
    return Finding("unmeasured_classes", WARN, len(items), title, sentence, items)


def imbalance(survey: Survey) -> float | None:
    """Returns the largest class's training images over the smallest's, of those that have any."""
    counts = survey.counts.get("train", np.zeros(0, int))
    counts = counts[counts > 0]
    return float(counts.max() / counts.min()) if counts.size else None


def _imbalance(survey: Survey) -> Finding:
    title = "class balance"
    ratio = imbalance(survey)
    if ratio is None:
        return Finding("imbalance", GOOD, 0, title, "there are no training images")
    counts = survey.counts["train"]
    if ratio == 1:
        sentence = f"every class has {counted(int(counts.max()), 'training image')}"
        return Finding("imbalance", GOOD, 0, title, sentence)
    some = np.flatnonzero(counts)
    small, large = (int(some[choose(counts[some])]) for choose in (np.argmin, np.argmax))
    sentence = (
        f"{quoted(survey.class_names[large])} has {counts[large]:,} training images, "
        f"{quoted(survey.class_names[small])} {counts[small]:,}: {ratio:.1f} to 1"
    )
    if ratio < IMBALANCED:
        return Finding("imbalance", GOOD, 0, title, sentence)
    sentence += "; accuracy hides the small ones, so see the macro metrics, or set"
    return Finding("imbalance", WARN, 1, title, f"{sentence} loss.class_weights=balanced")


def _grey(survey: Survey, channels: int) -> Finding:
    title = "grey among colour"
    grey, n = survey.facts.grey, len(survey)
    count = int(grey.sum())
    if count in (0, n):
        kind = "tells no colours" if n and count else "has colours"
        return Finding("grey", GOOD, 0, title, f"every image {kind}")
    sentence = f"{count:,} of {counted(n, 'image')} tell no colours"
    if channels == 1:
        return Finding("grey", NOTE, count, title, f"{sentence}; all are made grey here")
    uneven = []
    for label, name in enumerate(survey.class_names):
        own = grey[survey.labels == label]
        if own.size >= TINY and abs(own.mean() - grey.mean()) >= UNEVENLY_GREY:
            uneven.append(f"{quoted(name)}: {int(own.sum()):,} of {own.size:,} are grey")
    if uneven:
        sentence += "; some classes have far more of them than others, which gives the class away"
    names = tuple(quoted(survey.name_of(i)) for i in np.flatnonzero(grey)[:100])
    return Finding("grey", WARN, count, title, sentence, (*uneven, *names))


def _blank(survey: Survey) -> Finding:
    blank = np.flatnonzero(survey.facts.blank)
    if not blank.size:
        return Finding("blank", GOOD, 0, "images of one colour", "none")
    sentence = f"{counted(blank.size, 'image')} of one colour all over, which show nothing"
    items = tuple(described(survey, i) for i in blank[:100])
    return Finding("blank", WARN, blank.size, "images of one colour", sentence, items)


def _shapes(survey: Survey, image_size: int) -> list[Finding]:
    """Elongated images, and small ones among larger."""
    width, height = (survey.facts.width.astype(float), survey.facts.height.astype(float))
    if not len(survey):
        return []
    ratio = np.maximum(width, height) / np.minimum(width, height)
    growth = image_size / np.minimum(width, height)
    sizes = [f"{w:.0f} x {h:.0f}" for w, h in zip(width, height, strict=True)]

    def finding(key: str, title: str, order: np.ndarray, what: str, good: str) -> Finding:
        if not order.size:
            return Finding(key, GOOD, 0, title, good)
        items = tuple(f"{quoted(survey.name_of(i))}: {sizes[i]} pixels" for i in order[:100])
        return Finding(
            key, WARN, order.size, title, f"{counted(order.size, 'image')} {what}", items
        )

    long = np.flatnonzero(ratio >= ELONGATED)
    small = np.flatnonzero(growth > ENLARGED)
    if small.size == len(survey):  # a choice, and no fault of some of the images
        small = small[:0]
    return [
        finding(
            "elongated",
            "elongated images",
            long[np.argsort(-ratio[long], kind="stable")],
            f"at least {ELONGATED:g} times as long as wide; data.resize says whether they are "
            "squashed, cropped or padded",
            f"no image is {ELONGATED:g} times as long as wide",
        ),
        finding(
            "small",
            "small images",
            small[np.argsort(-growth[small], kind="stable")],
            f"enlarged more than {ENLARGED:g} times to {image_size} pixels, and blurred by that",
            f"all are as small, and enlarged to {image_size} pixels"
            if (growth > ENLARGED).all()
            else f"none is enlarged more than {ENLARGED:g} times to {image_size} pixels",
        ),
    ]


def _peculiar(survey: Survey) -> list[Finding]:
    found = []
    for key, what in PECULIARITIES.items():
        places = [i for i, keys in enumerate(survey.facts.peculiar) if key in keys]
        if places:
            items = tuple(quoted(survey.name_of(i)) for i in places[:100])
            sentence = f"{counted(len(places), 'file')} that {what}"
            found.append(Finding(key, NOTE, len(places), "peculiar files", sentence, items))
    return found
