"""MNIST's IDX files, plain or gzipped: http://yann.lecun.com/exdb/mnist (format at the foot)."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from flaxcls.data.dataset import Dataset, Split
from flaxcls.data.paths import existing_folder
from flaxcls.errors import InputError

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
_HOLDS = "IDX files such as 'train-images-idx3-ubyte.gz' and 'train-labels-idx1-ubyte.gz'"


def read(path: str | Path, name: str = "") -> Dataset:
    """Return splits `train` and, where its files are there, `test`, as uint8 (N, H, W, 1).

    name: `mnist` or `fashion_mnist` give their class names; without one the numbers are the names.
    Raises InputError for another name and for missing, damaged or mismatched files.
    """
    if name and name not in CLASS_NAMES:
        raise InputError(
            f"data.name: no class names are known for '{name}'; write {' or '.join(CLASS_NAMES)}, "
            "or leave it empty to name classes by their numbers"
        )
    folder = existing_folder(path, _HOLDS)
    splits = {"train": _split(folder, "train")}
    if _find(folder, "t10k", "images", 3) or _find(folder, "t10k", "labels", 1):
        splits["test"] = _split(folder, "t10k")
    highest = max(int(split.labels.max()) for split in splits.values())
    class_names = CLASS_NAMES.get(name, tuple(str(i) for i in range(highest + 1)))
    return Dataset(name or folder.resolve().name, class_names, splits)


def _split(folder: Path, prefix: str) -> Split:
    images, labels = _array(folder, prefix, "images", 3), _array(folder, prefix, "labels", 1)
    if len(images) != len(labels):
        raise InputError(
            f"data.path: '{folder}' has {len(images)} {prefix} images but {len(labels)} labels; "
            "take both files from the same release"
        )
    if not images.size:
        raise InputError(
            f"data.path: the {prefix} files in '{folder}' hold no images (they declare "
            f"{images.shape} values); replace them"
        )
    return Split(images[..., None], labels.astype(np.int32))


def _find(folder: Path, prefix: str, kind: str, ndim: int) -> Path | None:
    for dot in "-.":
        for suffix in ("", ".gz"):
            file = folder / f"{prefix}-{kind}{dot}idx{ndim}-ubyte{suffix}"
            if file.is_file():
                return file
    return None


def _array(folder: Path, prefix: str, kind: str, ndim: int) -> np.ndarray:
    file = _find(folder, prefix, kind, ndim)
    if file is None:
        raise InputError(
            f"data.path: no '{prefix}-{kind}-idx{ndim}-ubyte' or '.gz' in '{folder}'; "
            f"set it to the folder of {_HOLDS}"
        )
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{file}' cannot be read ({error}); download it again") from error
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension.
    if len(data) < 4 + 4 * ndim or data[:4] != bytes((0, 0, 8, ndim)):
        raise InputError(
            f"'{file}' is not an IDX file of {kind} (it begins with {data[:4].hex() or 'nothing'}, "
            f"not 000008{ndim:02x}); download it again"
        )
    shape = tuple(np.frombuffer(data, ">u4", ndim, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
    declared = math.prod(shape)  # of Python's numbers, as NumPy's wrap around
    if values.size != declared:
        fault = "is incomplete" if values.size < declared else "is longer than its header says"
        raise InputError(
            f"'{file}' {fault}: it declares {shape} values but holds {values.size}; "
            "download it again"
        )
    return values.reshape(shape)
