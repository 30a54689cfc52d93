"""What lies on disk, good and bad: everything is listed where reading stops at the first fault."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flaxcls.data.dataset import (
    SPLITS,
    Dataset,
    Split,
    match_classes,
    name_undivided,
    named,
    select_classes,
    unknown_class,
)
from flaxcls.data.decode import LEADS_NOWHERE, ImageSpec
from flaxcls.data.load import read_source, select
from flaxcls.data.paths import existing_folder
from flaxcls.data.sources import image_files, image_folder, npy
from flaxcls.data.splits import draw_classes, merged, split_dataset
from flaxcls.errors import InputError


@dataclass(frozen=True, eq=False)
class Inventory:
    """A data set before anything is drawn from it, and what is wrong with it already.

    dataset: every class that was asked for or found, those without images too. Files that look
        like images are in it unopened.
    faults: what is wrong with each other file, by its name relative to `data.path`.
    empty: split -> class -> a sentence on its folder, where that holds no images.
    """

    dataset: Dataset
    faults: Mapping[str, str] = field(default_factory=dict)
    empty: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def take_inventory(
    source: str,
    path: str = "",
    *,
    name: str = "",
    classes: Sequence[str] = (),
    num_classes_drawn: int = 0,
    per_class: float = 0.0,
    label_pattern: str = "",
    seed: int = 0,
    spec: ImageSpec | None = None,
) -> Inventory:
    """Return what a source holds; the arguments are those of `load_dataset`.

    Raises InputError where there is nothing to list: no such folder, no classes, a file that holds
    the whole data set and cannot be read.
    """
    arguments: dict[str, Any] = {
        "name": name,
        "classes": tuple(classes),
        "num_classes_drawn": num_classes_drawn,
        "per_class": per_class,
        "label_pattern": label_pattern,
        "seed": seed,
        "spec": spec,
    }
    if source == "image_folder":
        found = _of_class_folders(path, tuple(classes))
    elif source == "image_files":
        found = _of_named_files(path, label_pattern, tuple(classes))
    elif source == "npy":
        return _of_npy_files(path, arguments)
    else:
        return Inventory(read_source(source, path, **arguments))
    dataset = name_undivided(found.dataset)
    return replace(
        found, dataset=select(dataset, source, tuple(classes), num_classes_drawn, 0.0, seed)
    )


def draw_splits(
    dataset: Dataset,
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    mode: str = "auto",
    stratify: bool = True,
    max_per_class: int = 0,
    seed: int = 0,
) -> Dataset:
    """Return what `split_dataset` does, but leave a class without training images where it is.

    Raises InputError for impossible fractions.
    """
    pool = merged(dataset) if mode == "drawn" else dataset.splits.get("train")
    counts = np.zeros(len(dataset.class_names), np.int64)
    if pool is not None:
        counts += np.bincount(pool.labels, minlength=len(counts))
    trained = [name for name, n in zip(dataset.class_names, counts, strict=True) if n]
    if not trained:
        return dataset
    drawn = split_dataset(
        select_classes(dataset, trained),
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        mode=mode,
        stratify=stratify,
        max_per_class=max_per_class,
        seed=seed,
    )
    if len(trained) == len(dataset.class_names):
        return drawn
    splits = dict(match_classes(drawn, dataset.class_names).splits)
    for key, split in dataset.splits.items():
        strays = np.flatnonzero(counts[split.labels] == 0)
        if strays.size:
            apart = named(split, key).take(strays)
            splits[key] = _joined(splits[key], apart, key) if key in splits else apart
    return replace(dataset, splits={key: splits[key] for key in SPLITS if key in splits})


def _joined(split: Split, other: Split, key: str) -> Split:
    """Return the examples of both; those of a split without names are named after it."""
    split = named(split, key)
    images: np.ndarray | tuple[str, ...]
    if isinstance(split.images, np.ndarray) and isinstance(other.images, np.ndarray):
        images = np.concatenate([split.images, other.images])
    else:
        images = (*split.images, *other.images)
    labels = np.concatenate([split.labels, other.labels])
    return Split(images, labels, names=(*(split.names or ()), *(other.names or ())))


def _of_class_folders(path: str, classes: tuple[str, ...]) -> Inventory:
    root = existing_folder(path, "images, one folder a class")
    layout = image_folder.split_folders(root)
    if "train" not in layout:
        raise InputError(
            f"data.path: '{root}' has {' and '.join(layout)} but no train folder; add 'train'"
        )
    present = {key: image_folder.class_folders(folder) for key, folder in layout.items()}
    known = tuple(sorted({name for folders in present.values() for name in folders}))
    for name in classes:
        if name not in known:
            raise InputError(unknown_class(name, known, f"'{root}'"))
    class_names = classes or known
    splits: dict[str, Split] = {}
    faults: dict[str, str] = {}
    empty: dict[str, dict[str, str]] = {}
    for key, folders in present.items():
        pairs: list[tuple[Path, int]] = []
        for label, name in enumerate(class_names):
            if name not in folders:
                continue
            images, others = image_folder.files_of_class(folders[name])
            pairs += [(file, label) for file in images]
            for file in others:
                fault = "is not an image file" if os.path.exists(file) else LEADS_NOWHERE
                faults[file.relative_to(root).as_posix()] = fault
            if not images:
                place = folders[name].relative_to(root).as_posix()
                held = f"holds {len(others)} files but no images" if others else "is empty"
                empty.setdefault(key, {})[name] = f"the folder '{place}' {held}"
        splits[key] = _of_files(root, pairs)
    notes = image_folder.unused(root, layout)
    return Inventory(Dataset(root.resolve().name, class_names, splits, notes=notes), faults, empty)


def _of_named_files(path: str, label_pattern: str, classes: tuple[str, ...]) -> Inventory:
    root, class_names, pairs, notes = image_files.find(path, label_pattern, classes)
    splits = {"train": _of_files(root, pairs)}
    return Inventory(Dataset(root.resolve().name, class_names, splits, notes=notes))


def _of_files(root: Path, pairs: list[tuple[Path, int]]) -> Split:
    return Split(
        tuple(str(file) for file, _ in pairs),
        np.array([label for _, label in pairs], np.int32),
        names=tuple(file.relative_to(root).as_posix() for file, _ in pairs),
    )


def _of_npy_files(path: str, arguments: dict[str, Any]) -> Inventory:
    """Lists the .npy files that cannot be read or hold no images, and reads the others."""
    folder = existing_folder(path, "NAME.npy files, one a class")
    files = {f.stem: f for f in sorted(folder.glob("*.npy")) if not f.name.startswith(".")}
    chosen = arguments["classes"] or tuple(files)
    if arguments["num_classes_drawn"] and not arguments["classes"]:
        chosen = draw_classes(tuple(files), arguments["num_classes_drawn"], arguments["seed"])
    faults: dict[str, str] = {}
    empty: dict[str, str] = {}
    for name in chosen:
        if name not in files:
            continue  # what reads the others says so
        try:
            if not len(npy.mapped(files[name])):
                empty[name] = f"the file '{files[name].name}' holds no images"
        except InputError as error:
            faults[files[name].name] = str(error).removeprefix(f"'{files[name]}' ")
    bad = {name for name in chosen if name in empty or f"{name}.npy" in faults}
    good = tuple(name for name in chosen if name not in bad)
    if not bad:
        return Inventory(read_source("npy", path, **arguments))
    if not good:
        raise InputError(
            f"data.path: none of the {len(bad)} .npy files in '{folder}' holds images that can be "
            f"read ('{sorted(bad)[0]}.npy' {next(iter(faults.values()), 'holds no images')})"
        )
    arguments = {**arguments, "classes": good, "num_classes_drawn": 0}
    dataset = match_classes(read_source("npy", path, **arguments), chosen)
    return Inventory(dataset, faults, {"train": empty} if empty else {})
