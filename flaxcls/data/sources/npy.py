"""QuickDraw's layout: a folder of NAME.npy, one a class (https://quickdraw.withgoogle.com/data)."""

from pathlib import Path

import numpy as np

from flaxcls.data.arrays import as_images, load_fault
from flaxcls.data.dataset import Dataset, Split
from flaxcls.data.paths import existing_folder
from flaxcls.data.splits import draw_classes, draw_order, per_class_count
from flaxcls.errors import InputError, did_you_mean

_HOLDS = "NAME.npy files, one a class"


def read(
    path: str | Path,
    classes: tuple[str, ...] = (),
    num_classes_drawn: int = 0,
    per_class: float = 0.0,
    seed: int = 0,
    known_classes: tuple[str, ...] = (),
) -> Dataset:
    """Return the classes' images as one split `train`, uint8 (N, H, W, C), class after class.

    Files are memory-mapped, so that only the images asked for are read.

    classes: only these, numbered in this order; all, sorted, where empty.
    num_classes_drawn: so many, drawn with the seed; which ones is recorded in the data set.
    per_class: of each class a fraction (below 1) or a number, by lot, the same whichever other
        classes are read; 0 for all.
    known_classes: the classes of a trained model, where the folder is only evaluated: those of them
        that it has are read.
    Raises InputError, naming the file.
    """
    folder = existing_folder(path, _HOLDS)
    files = {f.stem: f for f in sorted(folder.glob("*.npy")) if not f.name.startswith(".")}
    if not files:
        raise InputError(f"data.path: no .npy files in '{folder}'; set it to a folder of {_HOLDS}")
    notes: tuple[str, ...] = ()
    class_names = classes or tuple(name for name in known_classes if name in files) or tuple(files)
    if num_classes_drawn:
        class_names = draw_classes(tuple(files), num_classes_drawn, seed)
        notes = (
            f"{num_classes_drawn} of {len(files)} classes drawn with seed {seed}: "
            f"{', '.join(class_names)}.",
        )
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    names: list[str] = []
    for label, name in enumerate(class_names):
        if name not in files:
            raise InputError(_no_file(folder, name, tuple(files)))
        array = mapped(files[name])
        if not len(array):
            raise InputError(
                f"'{files[name]}' holds no images; remove it or add images of its class"
            )
        if images and array.shape[1:] != images[0].shape[1:]:
            raise InputError(
                f"'{files[name]}' holds images of shape {array.shape[1:]} but "
                f"'{files[class_names[0]]}' of {images[0].shape[1:]}; give all classes one shape"
            )
        count = per_class_count(per_class, len(array))
        rows = np.sort(draw_order(len(array), seed, "per_class", name)[:count])
        images.append(array[rows] if count < len(array) else np.asarray(array))
        labels.append(np.full(count, label, np.int32))
        names += [f"{files[name].name}/{row}" for row in rows]
    split = Split(np.concatenate(images), np.concatenate(labels), names=tuple(names))
    return Dataset(folder.resolve().name, class_names, {"train": split}, notes=notes)


def mapped(file: Path) -> np.ndarray:
    """Return the images of a class, memory-mapped; raises InputError where it holds others."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises anything on damaged headers.
        raise InputError(f"'{file}' {load_fault(error, '.npy')}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"'{file}' is a .npz, which holds several arrays; write one .npy a class with "
            "numpy.save, or set data.source=npz"
        )
    return as_images(array, f"'{file}'")


def _no_file(folder: Path, name: str, known: tuple[str, ...]) -> str:
    return f"data.classes: no '{name}.npy' in '{folder}'; {did_you_mean(name, known)}"
