"""A whole data set looked at once: every image in the split that a config draws for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, SupportsIndex

import numpy as np
from ml_collections import ConfigDict

from flaxcls.analysis import image_facts
from flaxcls.analysis.duplicates import NearPairs, equal_groups, near_pairs
from flaxcls.analysis.image_facts import Facts
from flaxcls.data.dataset import SPLITS, Dataset, Split, named
from flaxcls.data.decode import decode_whole
from flaxcls.data.inventory import draw_splits, take_inventory
from flaxcls.data.splits import merged, take_per_class
from flaxcls.errors import InputError
from flaxcls.experiment import image_spec
from flaxcls.history import SPLIT_TITLES


class Duplicates(NamedTuple):
    """Images that occur more than once, as positions in a survey.

    Attributes:
      groups: the positions of each image with exact copies.
      across: bool (groups,), whether the copies lie in several splits.
      conflicting: bool (groups,), whether they have several labels.
      near: pairs of which neither is an exact copy of the other, nor of one colour all over.
      near_across: bool (pairs,).
      near_conflicting: bool (pairs,).
    """

    groups: list[np.ndarray]
    across: np.ndarray
    conflicting: np.ndarray
    near: NearPairs
    near_across: np.ndarray
    near_conflicting: np.ndarray


@dataclass(frozen=True, eq=False)
class Survey:
    """What a config trains, validates and tests on, and what is wrong with it.

    Attributes:
      name: of the data set.
      class_names: those chosen or found, also classes without any image.
      parts: the splits, by name, in the order train, val, test; of files that can be read.
      facts: of all their images, split after split; what follows counts positions in this order.
      files: whether the images are files, which differ in size.
      faults: what is wrong with each file that cannot be read, by name.
      missing: class -> why it has no training image.
      absent: split -> classes which have training images, but none there.
      undrawn: why the splits cannot be drawn from what can be read, so that they are the source's
        own; empty where they were drawn.
      unused: images that can be read but that the config draws for no split.
      notes: sentences on what lies there and is not read, and on classes that were drawn.
    """

    name: str
    class_names: tuple[str, ...]
    parts: Mapping[str, Split]
    facts: Facts
    files: bool
    faults: Mapping[str, str]
    missing: Mapping[str, str]
    absent: Mapping[str, list[str]]
    undrawn: str
    unused: int
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.facts)

    @cached_property
    def labels(self) -> np.ndarray:
        """int32 (N,)."""
        return np.concatenate([np.zeros(0, np.int32), *(s.labels for s in self.parts.values())])

    @cached_property
    def splits(self) -> np.ndarray:
        """int64 (N,), positions in `parts`."""
        return np.repeat(np.arange(len(self.parts)), [len(s) for s in self.parts.values()])

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Images of each class, int64 (classes,), by split."""
        most = len(self.class_names)
        return {k: np.bincount(s.labels, minlength=most) for k, s in self.parts.items()}

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *(len(split) for split in self.parts.values())])

    def _place(self, position: SupportsIndex) -> tuple[str, int]:
        """Returns the split of an image and its index in it."""
        key = list(self.parts)[self.splits[position]]
        return key, int(position) - int(self._begins[self.splits[position]])

    def split_of(self, position: SupportsIndex) -> str:
        """Returns train, val or test."""
        return self._place(position)[0]

    def class_of(self, position: SupportsIndex) -> str:
        """Returns the name of an image's class."""
        return self.class_names[self.labels[position]]

    def name_of(self, position: SupportsIndex) -> str:
        """Returns the name of an image: its file, or its place in the source."""
        key, index = self._place(position)
        names = self.parts[key].names
        return names[index] if names is not None else f"{key}/{index}"

    def image(self, position: int, longest: int) -> np.ndarray:
        """Returns an image as a person looks at it, uint8 (H, W, C); files at most that large."""
        key, index = self._place(position)
        images = self.parts[key].images
        if isinstance(images, np.ndarray):
            return images[index]
        return decode_whole(images[index], longest=longest)

    @cached_property
    def duplicates(self) -> Duplicates:
        """Exact and near duplicates, of all splits together."""
        groups = equal_groups(self.facts.digest)
        alone = ~self.facts.blank
        for group in groups:
            alone[group[1:]] = False
        chosen = np.flatnonzero(alone)
        pairs = near_pairs(self.facts.fingerprint[chosen], self.facts.view[chosen])
        near = replace(pairs, first=chosen[pairs.first], second=chosen[pairs.second])
        return Duplicates(
            groups,
            np.array([len(set(self.splits[g].tolist())) > 1 for g in groups], bool),
            np.array([len(set(self.labels[g].tolist())) > 1 for g in groups], bool),
            near,
            self.splits[near.first] != self.splits[near.second],
            self.labels[near.first] != self.labels[near.second],
        )

    def telling_pairs(self) -> np.ndarray:
        """Returns the near pairs, int64 (P,), those across splits first, then the most alike."""
        d = self.duplicates
        return np.lexsort((-d.near.correlation, ~d.near_across))

    def measures(self) -> dict[str, np.ndarray]:
        """Returns width, height and width / height of all images, float64 (N,); {} of none."""
        if not len(self):
            return {}
        width, height = self.facts.width.astype(float), self.facts.height.astype(float)
        return {"width": width, "height": height, "aspect": width / height}


def survey(config: ConfigDict, begin: Callable[[int], Callable[[int], object]]) -> Survey:
    """Reads and decodes everything that `data` names.

    Of a file that can be read nothing is kept but its facts, some 350 bytes.

    Args:
      config: resolved.
      begin: called with the number of images before they are looked at; what it returns is told
        after each few hundred how many were.

    Raises:
      InputError: there is nothing to look at, or the splits cannot be drawn.
    """
    d = config.data
    found = take_inventory(
        d.source,
        d.path or "",
        name=d.name or "",
        classes=d.classes,
        num_classes_drawn=d.num_classes_drawn,
        per_class=d.per_class,
        label_pattern=d.label_pattern or "",
        seed=config.seed,
        spec=image_spec(config),
    )
    dataset = found.dataset
    if len(dataset.class_names) < 2:
        raise InputError(
            f"{dataset.name}: a classifier needs at least 2 classes, found "
            f"{len(dataset.class_names)} ({', '.join(dataset.class_names)}); add another class"
        )
    drawn = _drawn(config, dataset)  # also before files are opened: it may be impossible
    faults, undrawn = dict(found.faults), ""
    files = not any(isinstance(split.images, np.ndarray) for split in dataset.splits.values())
    if files:
        every = merged(dataset)
        facts, bad = image_facts.of_files(every.images, begin(len(every)))  # type: ignore[arg-type]
        names = every.names or ()
        faults |= {names[i]: fault for i, fault in bad.items()}
        if bad:
            left = _without(dataset, faults)
            try:
                drawn = _drawn(config, left)
            except InputError as error:
                drawn, undrawn = left, str(error)
        readable = [name for name in names if name not in faults]
        row = {name: i for i, name in enumerate(readable)}
        used = [row[name] for split in drawn.splits.values() for name in split.names or ()]
        facts = facts.take(np.array(used, np.int64))
        unused = len(readable) - len(used)
    else:
        advance = begin(sum(len(split) for split in drawn.splits.values()))
        facts = image_facts.concatenate(
            [image_facts.of_array(np.asarray(s.images), advance) for s in drawn.splits.values()]
        )
        unused = sum(len(split) for split in dataset.splits.values()) - len(facts)
    return Survey(
        dataset.name,
        dataset.class_names,
        drawn.splits,
        facts,
        files,
        dict(sorted(faults.items())),
        _missing(dataset, drawn, found.empty, faults),
        _absent(drawn, found.empty),
        undrawn,
        unused,
        dataset.notes,
    )


def _drawn(config: ConfigDict, dataset: Dataset) -> Dataset:
    d = config.data
    per_class = d.source in ("image_folder", "image_files") and d.per_class
    if per_class and "train" in dataset.splits:
        train = take_per_class(
            dataset.splits["train"], per_class, config.seed, "train", "per_class"
        )
        dataset = replace(dataset, splits={**dataset.splits, "train": train})
    return draw_splits(
        dataset,
        val_fraction=d.val_fraction,
        test_fraction=d.test_fraction,
        mode=d.split_mode,
        stratify=d.stratify,
        max_per_class=d.max_per_class,
        seed=config.seed,
    )


def _without(dataset: Dataset, faults: Mapping[str, str]) -> Dataset:
    splits = {}
    for key, split in dataset.splits.items():
        good = [i for i, name in enumerate(named(split, key).names or ()) if name not in faults]
        splits[key] = split.take(np.array(good, np.int64))
    return replace(dataset, splits=splits)


def _missing(
    dataset: Dataset,
    drawn: Dataset,
    empty: Mapping[str, Mapping[str, str]],
    faults: Mapping[str, str],
) -> dict[str, str]:
    """Returns class -> why it has no training image."""
    reasons = dict(empty.get("train", {}))
    for label, name in enumerate(dataset.class_names):
        counts = {k: int((s.labels == label).sum()) for k, s in drawn.splits.items()}
        if counts.get("train"):
            reasons.pop(name, None)
            continue
        listed = sum(int((s.labels == label).sum()) for s in dataset.splits.values())
        if f"{name}.npy" in faults:
            reason = f"its file {faults[f'{name}.npy']}"
        elif listed and not sum(counts.values()):
            several = f"none of its {listed} files can be read"
            reason = several if listed > 1 else "its only file cannot be read"
        else:
            reason = reasons.get(name, "there are no training images")
        elsewhere = [f"{n} {SPLIT_TITLES[k]}" for k, n in counts.items() if n]
        if elsewhere:
            total = sum(counts.values())
            reason += f", but {' and '.join(elsewhere)} image{'s' if total > 1 else ''}"
        reasons[name] = reason
    return reasons


def _absent(drawn: Dataset, empty: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Returns split -> classes that are trained but not in it."""
    if "train" not in drawn.splits:
        return {}
    trained = set(drawn.splits["train"].labels.tolist())
    absent = {}
    for key in SPLITS[1:]:
        if key in drawn.splits:
            there = set(drawn.splits[key].labels.tolist())
            names = [drawn.class_names[label] for label in sorted(trained - there)]
            if names:
                absent[key] = names
    return absent
