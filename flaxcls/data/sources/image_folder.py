"""Folders of image files: one folder a class, or `train/ val/ test/` above such folders.

Classes are the sorted folder names and files are walked as torchvision's ImageFolder walks them
(sorted, folders inside a class folder included, links followed); hidden files are ignored.
"""

import os
from pathlib import Path

import numpy as np

from flaxcls.data.dataset import SPLITS, Dataset, Split, unknown_class
from flaxcls.data.decode import EXTENSIONS, LEADS_NOWHERE, check_images
from flaxcls.data.paths import existing_folder
from flaxcls.errors import InputError

_HOLDS = "images, one folder a class"
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_NOT_DATA = frozenset(("desktop.ini", "thumbs.db"))  # What Windows leaves in folders of images.


def read(
    path: str | Path,
    classes: tuple[str, ...] = (),
    on_bad: str = "error",
    known_classes: tuple[str, ...] = (),
    threads: int = 0,
) -> Dataset:
    """Return the splits on disk as file references; a folder without split folders is all `train`.

    classes: only these, numbered in this order; all, sorted, where empty.
    on_bad: what to do with files that are no images: `error`, or `skip` and list them. An error is
        raised for what a file's first and last bytes show; skipping decodes every file once.
    known_classes: the classes of a trained model, where the folder is only evaluated: it then needs
        neither training images nor every class.
    Raises InputError, naming the folder or the files.
    """
    if on_bad not in ("error", "skip"):
        raise InputError(f"data.on_bad must be 'error' or 'skip', not '{on_bad}'")
    root = existing_folder(path, _HOLDS)
    layout = split_folders(root)
    notes = unused(root, layout)
    present = {key: class_folders(folder) for key, folder in layout.items()}
    class_names = known_classes or _class_names(root, present, classes)
    for key, folders in present.items():
        for name in folders:
            if name not in class_names and not classes:
                raise InputError(_stray_class(layout[key], name, known_classes))
    found, others = _find(layout, present, class_names, classes, training=not known_classes)
    splits, faults = file_splits(root, found, on_bad, threads)
    for file in others:
        fault = "is not an image file" if os.path.exists(file) else LEADS_NOWHERE
        faults[file.relative_to(root).as_posix()] = fault
    if faults and on_bad == "error":
        total = sum(len(files) for files in found.values()) + len(others)
        raise InputError(listing(root, faults, total))
    for label, name in enumerate(class_names):
        if not known_classes and not (splits["train"].labels == label).any():
            raise InputError(
                f"data.path: no file of class '{name}' in '{layout['train']}' can be read as an "
                "image; replace them or remove the folder"
            )
    return Dataset(
        root.resolve().name, class_names, splits, skipped=tuple(sorted(faults)), notes=notes
    )


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, sorted by name, without hidden files."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".")]
    except PermissionError as error:
        raise InputError(
            f"data.path: '{folder}' may not be listed; get leave to read it"
        ) from error
    return sorted((e for e in kept if e.name.lower() not in _NOT_DATA), key=lambda e: e.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link that leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; one to a missing file gives False
        return False


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def class_folders(folder: Path) -> dict[str, Path]:
    """Return class -> its folder; raises InputError where there are none."""
    entries = visible(folder)
    folders = {e.name: Path(e.path) for e in entries if is_folder(e)}
    if not folders:
        raise InputError(
            f"data.path: no class folders in '{folder}' (found {len(entries)} files at its top "
            "level); put each class in its own folder"
        )
    return folders


def split_folders(root: Path) -> dict[str, Path]:
    """Return split -> folder of class folders; the root is `train` where there are no splits."""
    folders = [Path(e.path) for e in visible(root) if is_folder(e)]
    named = [f for f in folders if f.name.lower() in _SPLIT_FOLDERS]
    layout: dict[str, Path] = {}
    for folder in named:
        # A class may be called "train" (the vehicle): it holds no folders and has other neighbours.
        if len(named) < len(folders) and not any(is_folder(e) for e in visible(folder)):
            continue
        key = _SPLIT_FOLDERS[folder.name.lower()]
        if key in layout:
            raise InputError(
                f"data.path: '{root}' has both '{layout[key].name}' and '{folder.name}'; keep one "
                "folder a split"
            )
        layout[key] = folder
    return {key: layout[key] for key in SPLITS if key in layout} or {"train": root}


def unused(root: Path, layout: dict[str, Path]) -> tuple[str, ...]:
    """Return sentences on what lies beside the classes and is not read."""
    notes = []
    if root not in layout.values():
        used = {folder.name for folder in layout.values()}
        others = [e.name for e in visible(root) if is_folder(e) and e.name not in used]
        if others:
            notes.append(f"Not used: {', '.join(others)} in '{root}', beside the split folders.")
    for folder in {root, *layout.values()}:
        entries = visible(folder)
        lost = [e.name for e in entries if not os.path.exists(e.path)]
        if lost:
            notes.append(f"Not used: {', '.join(lost)} in '{folder}', links that lead nowhere.")
        loose = [e.name for e in entries if not is_folder(e) and is_image(e.name)]
        if loose and any(is_folder(e) for e in entries):
            notes.append(f"Not used: {len(loose)} images in '{folder}', outside any class folder.")
    return tuple(sorted(notes))


def _class_names(
    root: Path, present: dict[str, dict[str, Path]], classes: tuple[str, ...]
) -> tuple[str, ...]:
    if "train" not in present:
        raise InputError(
            f"data.path: '{root}' has {' and '.join(present)} but no train folder; add 'train'"
        )
    folders = present["train"]
    for name in classes:
        if name not in folders:
            raise InputError(unknown_class(name, tuple(folders), f"'{root}'"))
    return classes or tuple(folders)


def _find(
    layout: dict[str, Path],
    present: dict[str, dict[str, Path]],
    class_names: tuple[str, ...],
    classes: tuple[str, ...],
    *,
    training: bool,
) -> tuple[dict[str, list[tuple[Path, int]]], list[Path]]:
    """Return the (file, label) pairs of each split, and the files that are no images."""
    found: dict[str, list[tuple[Path, int]]] = {}
    strangers: list[Path] = []
    for key, folders in present.items():
        found[key] = []
        for label, name in enumerate(class_names):
            if name not in folders or (classes and name not in classes):
                continue
            images, others = files_of_class(folders[name])
            if not images and key == "train" and training:
                raise InputError(_empty_class(folders[name], others))
            found[key] += [(file, label) for file in images]
            strangers += others
        if not found[key]:
            raise InputError(
                f"data.path: no images in '{layout[key]}'; add some or remove the folder"
            )
    return found, strangers


def files_of_class(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (image files, other files) under a class folder."""
    images: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()

    def walk(place: Path) -> None:
        real = os.path.realpath(place)
        if real in seen:  # A link to a folder above would be walked for ever.
            return
        seen.add(real)
        entries = visible(place)
        for entry in entries:
            if not is_folder(entry):
                (images if is_image(entry.name) else others).append(Path(entry.path))
        for entry in entries:
            if is_folder(entry):
                walk(Path(entry.path))

    walk(folder)
    return images, others


def file_splits(
    root: Path,
    found: dict[str, list[tuple[Path, int]]],
    on_bad: str,
    threads: int,
) -> tuple[dict[str, Split], dict[str, str]]:
    """Return the splits of (file, label) pairs that can be read, and each other file's fault."""
    splits: dict[str, Split] = {}
    bad: dict[str, str] = {}
    for key, files in found.items():
        paths = tuple(str(file) for file, _ in files)
        names = tuple(file.relative_to(root).as_posix() for file, _ in files)
        labels = np.array([label for _, label in files], np.int32)
        aspect, faults = check_images(paths, thorough=on_bad == "skip", threads=threads)
        split = Split(paths, labels, names=names, aspect=aspect)
        good = np.setdiff1d(np.arange(len(paths)), list(faults))
        splits[key] = split.take(good) if faults else split
        bad |= {names[i]: fault for i, fault in faults.items()}
    return splits, bad


def _empty_class(folder: Path, others: list[Path]) -> str:
    held = f"(it holds {len(others)} other files)" if others else "(it is empty)"
    return (
        f"data.path: no images in the class folder '{folder}' {held}; add some or remove the folder"
    )


def _stray_class(folder: Path, name: str, known_classes: tuple[str, ...]) -> str:
    if known_classes:
        return (
            f"data.path: class '{name}' in '{folder}' is not one of the {len(known_classes)} "
            "classes the model was trained on; remove or rename the folder"
        )
    return (
        f"data.path: class '{name}' in '{folder}' has no folder in train; add training images "
        "of it or remove the folder"
    )


def listing(root: Path, faults: dict[str, str], total: int) -> str:
    """Return the sentence that names files which cannot be read, of `total`."""
    shown = "; ".join(f"'{name}' {faults[name]}" for name in sorted(faults)[:8])
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    return (
        f"data.path: {len(faults)} of {total} files in '{root}' cannot be read as images: "
        f"{shown}{more}; replace or remove them, or set data.on_bad=skip to leave them out"
    )
