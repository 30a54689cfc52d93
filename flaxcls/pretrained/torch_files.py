"""Reads `.pth` files of PyTorch without PyTorch, and without running what they contain.

A pickle can name any function of any installed package and have it called. The unpickler here
knows the few names that a state dict of tensors consists of and refuses every other.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flaxcls.errors import InputError

# PyTorch's storage classes and the dtype of their elements.
_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# What a legacy file (before PyTorch 1.6) begins with, pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    """A one-dimensional array of a file, to be read once the pickle has been."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, all in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: np.dtype


def _rebuild_tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    del rest  # whether it needs a gradient, and hooks
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(data: _Tensor, *rest: Any) -> _Tensor:
    del rest
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds nothing but dicts, lists, numbers, texts and `_Tensor`s."""

    def __init__(self, file: Any, source: str):
        super().__init__(file, encoding="latin-1")
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"{self._source}: the file asks for {module}.{name}, which weights do not need and "
                "which might run code; save only the model's state_dict(), best as .safetensors"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, size, *view = reference
        if any(part is not None for part in view):
            raise ValueError("a storage is a view of another")
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"a reference of the unknown kind {kind!r}")
        return _Storage(str(key), storage_type.dtype, int(size))


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a `.pth` or `.pt` file by name, as arrays of their own dtype.

    A state dict may lie under `state_dict`, `model` or the like, as training scripts save it.

    Raises:
      InputError: the file is damaged, holds no state dict, or more than one may hold.
    """
    source = f"'{path}'"
    try:
        with path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
        content, storages = (_read_zip if is_zip else _read_legacy)(path, source)
        tensors = _state_dict(content, source)
        return {name: _array(tensor, storages) for name, tensor in tensors.items()}
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"model.pretrained: there is no file {source}; correct the path"
        ) from error
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}); give another file"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(
            f"{source} is no weights file of PyTorch, or a damaged one "
            f"({type(error).__name__}: {error}); fetch it anew"
        ) from error


def _read_zip(path: Path, source: str) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((n for n in names if n.endswith("/data.pkl") or n == "data.pkl"), None)
        if pickled is None:
            raise ValueError("the archive holds no data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its members are compressed, which PyTorch's are not")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = _Unpickler(io.BytesIO(archive.read(pickled)), source).load()
        folder = f"{root}data/"
        storages = {n.removeprefix(folder): archive.read(n) for n in names if n.startswith(folder)}
    return content, storages


def _read_legacy(path: Path, source: str) -> tuple[Any, dict[str, bytes]]:
    """Pickles of magic number, version, machine, content and keys; then the storages' bytes."""
    with path.open("rb") as file:
        if _Unpickler(file, source).load() != _LEGACY_MAGIC:
            raise ValueError("it does not begin as one")
        _Unpickler(file, source).load()  # the version of the format
        machine = _Unpickler(file, source).load()
        if not machine.get("little_endian", True):
            raise ValueError("its numbers are big-endian")
        unpickler = _LegacyUnpickler(file, source)
        content = unpickler.load()
        storages = {}
        for key in _Unpickler(file, source).load():
            (size,) = struct.unpack("<q", file.read(8))
            storages[str(key)] = file.read(size * unpickler.item_sizes[str(key)])
    return content, storages


class _LegacyUnpickler(_Unpickler):
    """Remembers how large the elements of each storage are, which comes before its bytes."""

    def __init__(self, file: Any, source: str):
        super().__init__(file, source)
        self.item_sizes: dict[str, int] = {}

    def persistent_load(self, reference: Any) -> _Storage:
        storage = super().persistent_load(reference)
        self.item_sizes[storage.key] = storage.dtype.itemsize
        return storage


def _state_dict(content: Any, source: str) -> dict[str, _Tensor]:
    """The first dict of tensors, wherever training scripts put it."""
    for key in (None, "state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"):
        found = content if key is None else content.get(key)
        if isinstance(found, dict):
            tensors = {str(k): v for k, v in found.items() if isinstance(v, _Tensor)}
            if tensors:
                return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        if not isinstance(content, dict):
            break
    raise InputError(f"{source} holds no state dict of tensors; save the model's state_dict()")


def _array(tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
    storage = tensor.storage
    flat = np.frombuffer(storages[storage.key], storage.dtype, storage.size)
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    empty = 0 in tensor.shape
    if tensor.offset < 0 or min((*tensor.strides, *tensor.shape, 0)) < 0:
        raise ValueError("a tensor has a negative size")
    if not empty and tensor.offset + reach >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(tensor.shape) > storage.size:
        raise ValueError("a tensor is larger than its storage")
    if empty:
        return np.zeros(tensor.shape, storage.dtype)
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :],
        tensor.shape,
        tuple(stride * storage.dtype.itemsize for stride in tensor.strides),
    ).copy()
