"""What a data set is: images or image files with integer labels, class names and splits."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flaxcls.errors import InputError

SPLITS = ("train", "val", "test")

# Hashing 64 MB takes about 0.1 s; larger arrays are sampled.
_HASH_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Split:
    """Examples in a fixed order; an example's position is its index.

    images: uint8 (N, H, W, C) with C 1 or 3, or a tuple of N paths of image files.
    labels: int32 (N,), positions in the data set's `class_names`.
    parents: int32 (N,), positions in the data set's `parent_names`, or None.
    names: N names relative to the data's path, or of arrays `test/17` for record 17 of the source's
        own test split and `digits/17` for one of a source that has no splits; None for records
        of an own split in their order.
    aspect: float32 (N,), width / height of each upright image; None for arrays.
    """

    images: np.ndarray | tuple[str, ...]
    labels: np.ndarray
    parents: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    aspect: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "Split":
        """Return the examples at `indices`, integer (M,), in that order."""
        images = self.images
        return Split(
            images=images[indices]
            if isinstance(images, np.ndarray)
            else tuple(images[i] for i in indices),
            labels=self.labels[indices],
            parents=None if self.parents is None else self.parents[indices],
            names=None if self.names is None else tuple(self.names[i] for i in indices),
            aspect=None if self.aspect is None else self.aspect[indices],
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Named splits (among train, val, test) of one labelled collection of images.

    `class_parents` gives each class's position in `parent_names`, where there are parents.
    `skipped` lists the files left out because they could not be read; `notes` are sentences for
    the log: which classes were drawn, what lies in the folder but is not used.
    Raises InputError for labels out of range, lengths that differ and repeated class names.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    parent_names: tuple[str, ...] | None = None
    class_parents: tuple[int, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.class_names)) < len(self.class_names):
            twice = next(n for n in self.class_names if self.class_names.count(n) > 1)
            raise InputError(
                f"{self.name}: the class name '{twice}' occurs twice; give each class its own name"
            )
        for key, split in self.splits.items():
            if key not in SPLITS:
                raise InputError(f"{self.name}: no split may be called '{key}'; use {SPLITS}")
            where = f"{self.name}, split '{key}'"
            if split.labels.shape != (len(split),):
                raise InputError(
                    f"{where}: {len(split)} images but labels of shape {split.labels.shape}; "
                    "give one label an image"
                )
            _check_range(where, "label", split.labels, len(self.class_names))
            if split.parents is not None:
                _check_range(where, "parent", split.parents, len(self.parent_names or ()))


def _check_range(where: str, kind: str, labels: np.ndarray, count: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if wrong.size:
        raise InputError(
            f"{where}: {kind} {int(labels[wrong[0]])} of example {int(wrong[0])} is out of range "
            f"for {count} names; number {kind}s from 0 to {count - 1}"
        )


def class_counts(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the number of examples a class, int64 (classes,), for every split."""
    classes = len(dataset.class_names)
    return {k: np.bincount(s.labels, minlength=classes) for k, s in dataset.splits.items()}


def select_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Return the data set with only these classes, numbered in this order.

    Raises InputError for a class the data set does not have.
    """
    for name in class_names:
        if name not in dataset.class_names:
            raise InputError(unknown_class(name, dataset.class_names, dataset.name))
    return _renumber(dataset, tuple(class_names))


def match_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Return the data set with labels numbered as a trained model's `class_names`.

    Classes that the data set lacks are fine (they have no examples); raises InputError for a class
    that the model does not know.
    """
    for name in dataset.class_names:
        if name not in class_names:
            raise InputError(
                f"{dataset.name}: class '{name}' is not one of the {len(class_names)} classes the "
                f"model was trained on; remove or rename it"
            )
    return _renumber(dataset, tuple(class_names))


def unknown_class(name: str, known: Sequence[str], where: str) -> str:
    """Return the sentence that says that `name` is no class, with the names that exist."""
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"data.classes: '{name}' is no class of {where}; it has {shown}"


def _renumber(dataset: Dataset, class_names: tuple[str, ...]) -> Dataset:
    position = {name: i for i, name in enumerate(class_names)}
    table = np.array([position.get(name, -1) for name in dataset.class_names], np.int32)
    splits = {}
    for key, split in dataset.splits.items():
        labels = table[split.labels]
        kept = np.flatnonzero(labels >= 0)
        if len(kept) == len(labels):
            splits[key] = replace(split, labels=labels)
        else:
            splits[key] = replace(named(split, key).take(kept), labels=labels[kept])
    return replace(dataset, class_names=class_names, splits=splits)


def with_parents(dataset: Dataset, parents: Mapping[str, str]) -> Dataset:
    """Return the data set with a parent for every class: `parents` maps class to parent name.

    Parents are numbered in sorted order. Raises InputError for a class without a parent and for a
    name that is no class.
    """
    for name in parents:
        if name not in dataset.class_names:
            raise InputError(
                f"data.parents: '{name}' is no class of {dataset.name}; remove or correct it"
            )
    for name in dataset.class_names:
        if name not in parents:
            raise InputError(
                f"data.parents: class '{name}' has no parent; add a rule '{name}=PARENT'"
            )
    names = tuple(sorted(set(parents.values())))
    table = np.array([names.index(parents[name]) for name in dataset.class_names], np.int32)
    splits = {k: replace(s, parents=table[s.labels]) for k, s in dataset.splits.items()}
    class_parents = tuple(table.tolist())
    return replace(dataset, splits=splits, parent_names=names, class_parents=class_parents)


def named(split: Split, key: str) -> Split:
    """Return the split with a name for every example: its own, or `key/17` for record 17."""
    if split.names is not None:
        return split
    return replace(split, names=tuple(f"{key}/{i}" for i in range(len(split))))


def name_undivided(dataset: Dataset) -> Dataset:
    """Return the data set with its records named after it, `digits/17`, where it has no splits.

    In predictions on a test split drawn from it, `train/17` would look like leakage.
    """
    if set(dataset.splits) != {"train"}:
        return dataset
    return replace(dataset, splits={"train": named(dataset.splits["train"], dataset.name)})


def fingerprint(dataset: Dataset) -> str:
    """Return a hex digest that changes when the data do, wherever they lie.

    It covers class and parent names, the splits with their order, labels and example names, and
    cheap content: an array's bytes (above 64 MB, those of evenly spaced images), a file's size.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((dataset.class_names, dataset.parent_names)).encode())
    for key in sorted(dataset.splits):
        split = dataset.splits[key]
        digest.update(repr((key, len(split), _lasting_names(dataset, split))).encode())
        digest.update(split.labels.astype("<i4").tobytes())
        if split.parents is not None:
            digest.update(split.parents.astype("<i4").tobytes())
        if isinstance(split.images, np.ndarray):
            digest.update(repr(split.images.shape).encode())
            step = -(-split.images.nbytes // _HASH_BYTES) or 1
            digest.update(np.ascontiguousarray(split.images[::step]).data)
        else:
            digest.update(np.array([_file_size(p) for p in split.images], "<i8").tobytes())
    return digest.hexdigest()


def _lasting_names(dataset: Dataset, split: Split) -> tuple[str, ...] | None:
    """The names, without the data set's own, which is often that of a file that may move."""
    if split.names is None or not isinstance(split.images, np.ndarray):
        return split.names
    own = f"{dataset.name}/"
    return tuple(
        f"train/{name.removeprefix(own)}" if name.startswith(own) else name for name in split.names
    )


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise InputError(
            f"image '{path}' is gone ({error.strerror}); restore it or start again"
        ) from error
