"""Arrays that the user has, in one .npz file."""

from pathlib import Path

import numpy as np

from flaxcls.data.arrays import as_images, load_fault
from flaxcls.data.dataset import Dataset, Split
from flaxcls.errors import InputError

# (split, images, labels); a file uses one of the three ways of naming.
_KEYS = (
    ("train", "images", "labels"),
    ("train", "train_images", "train_labels"),
    ("val", "val_images", "val_labels"),
    ("test", "test_images", "test_labels"),
    ("train", "x_train", "y_train"),
    ("val", "x_val", "y_val"),
    ("test", "x_test", "y_test"),
)
# What each array is saved as; others in the file are not read.
_DTYPES = {
    **{images: "numpy.uint8" for _, images, _ in _KEYS},
    **{labels: "int" for _, _, labels in _KEYS},
    "class_names": "str",
}


def read(path: str | Path) -> Dataset:
    """Return the splits in the file as uint8 (N, H, W, C).

    Keys: `images` and `labels`; or `train_images`, `train_labels` and the same with `val_` and
    `test_`; or `x_train`, `y_train`, `x_val`, ... Images are uint8 (N, H, W), (N, H, W, 1 or 3) or
    flat squares (N, H * H), labels integers from 0, (N,) or (N, 1). `class_names`, optional, are
    their names.
    Raises InputError, naming the file and the array.
    """
    arrays = _arrays(path)
    file = Path(path).expanduser()
    splits: dict[str, Split] = {}
    for key, images_key, labels_key in _KEYS:
        if images_key in arrays or labels_key in arrays:
            for needed, other in ((images_key, labels_key), (labels_key, images_key)):
                if needed not in arrays:
                    raise InputError(f"'{file}' has '{other}' but no '{needed}'; add it")
            if key in splits:
                raise InputError(
                    f"'{file}' holds the split '{key}' twice ('{images_key}' is one); keep one"
                )
            splits[key] = _split(arrays, images_key, labels_key, file)
    if not splits:
        raise InputError(
            f"'{file}' has the arrays {', '.join(sorted(arrays)) or 'none'}; name them 'images' "
            "and 'labels', or 'train_images', 'train_labels' and so on"
        )
    return Dataset(file.stem, _class_names(arrays, splits, file), splits)


def _arrays(path: str | Path) -> dict[str, np.ndarray]:
    if not str(path):
        raise InputError("data.path is not set; set it to the .npz file")
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError(f"data.path: '{path}' does not exist; set it to the .npz file")
    if file.is_dir():
        raise InputError(f"data.path: '{path}' is a folder; set it to the .npz file itself")
    try:
        loaded = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy and zipfile raise anything on damaged bytes.
        raise InputError(f"'{file}' {load_fault(error, '.npz')}") from error
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise InputError(f"'{file}' holds one array, not a .npz; write it with numpy.savez")
    with loaded:
        return {
            key: _array(loaded, key, file) if key in _DTYPES else np.zeros(0)
            for key in loaded.files
        }


def _array(loaded: np.lib.npyio.NpzFile, key: str, file: Path) -> np.ndarray:
    try:
        array = loaded[key]
        if not isinstance(array, np.ndarray):  # bytes, where a file in the archive is no array
            raise ValueError("it holds no array")
    except Exception as error:  # NumPy and zipfile raise anything on damaged bytes.
        fault = load_fault(error, ".npz", _DTYPES[key])
        raise InputError(f"'{key}' in '{file}' {fault}") from error
    return array


def _split(arrays: dict[str, np.ndarray], images_key: str, labels_key: str, file: Path) -> Split:
    images = as_images(arrays[images_key], f"'{images_key}' in '{file}'")
    labels = arrays[labels_key]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(
            f"'{labels_key}' in '{file}' has shape {labels.shape}; it should be (N,), one class "
            "number an image"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(
            f"'{labels_key}' in '{file}' is {labels.dtype}; labels should be integers from 0"
        )
    if len(images) != len(labels):
        raise InputError(
            f"'{file}' has {len(images)} '{images_key}' but {len(labels)} '{labels_key}'; "
            "give each image one label"
        )
    if not len(images):
        raise InputError(f"'{images_key}' in '{file}' holds no images; leave it out or fill it")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        wrong = int(np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int32).max))[0])
        raise InputError(
            f"'{labels_key}' in '{file}': label {labels[wrong]} of example {wrong} is out of "
            "range; number the classes from 0"
        )
    return Split(images, labels.astype(np.int32))


def _class_names(
    arrays: dict[str, np.ndarray], splits: dict[str, Split], file: Path
) -> tuple[str, ...]:
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise InputError(f"'class_names' in '{file}' should be a list of strings")
        try:
            return tuple(n.decode() if isinstance(n, bytes) else n for n in names.tolist())
        except UnicodeDecodeError as error:
            raise InputError(
                f"'class_names' in '{file}' has a name that is not UTF-8 ({error.object!r}); save "
                "numpy.array(class_names, dtype=str)"
            ) from error
    highest = max(int(split.labels.max()) for split in splits.values())
    if highest >= sum(len(split) for split in splits.values()):
        raise InputError(
            f"'{file}' has the label {highest}, more than it has images; number the classes from 0 "
            "without gaps, or add 'class_names'"
        )
    return tuple(str(i) for i in range(highest + 1))
