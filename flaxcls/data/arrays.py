"""Checks of image arrays that come from files."""

import tokenize

import numpy as np

from flaxcls.errors import InputError


def as_images(array: np.ndarray, where: str) -> np.ndarray:
    """Return uint8 images (N, H, W, C) from (N, H, W[, 1 or 3]) or flat squares (N, H * H).

    The result is a view, so that nothing of a memory-mapped file is read. `where` begins the error.
    Raises InputError for another type or shape.
    """
    if array.dtype != np.uint8:
        scaled = "(images * 255).round()" if array.dtype.kind == "f" else "images"
        raise InputError(
            f"{where} is {array.dtype}, not uint8; save {scaled}.astype(numpy.uint8) with values "
            "from 0 to 255"
        )
    shape = array.shape
    if array.ndim == 2 and (side := round(shape[1] ** 0.5)) ** 2 == shape[1] > 0:
        return array.reshape(shape[0], side, side, 1)
    if array.ndim == 3 and 0 not in shape[1:]:
        return array[..., None]
    if array.ndim == 4 and shape[3] in (1, 3) and 0 not in shape:
        return array
    if array.ndim == 4 and shape[1] in (1, 3):
        raise InputError(
            f"{where} has shape {shape}, channels first; save images.transpose(0, 2, 3, 1)"
        )
    raise InputError(
        f"{where} has shape {shape}; it should be (N, height, width) or (N, height, width, 1 or 3)"
    )


def load_fault(error: Exception, kind: str, dtype: str = "numpy.uint8") -> str:
    """Return what is wrong, and the remedy, where loading a file or array raised `error`.

    kind: `.npy` or `.npz`; dtype: what the array should be saved as.
    """
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    if "Object arrays" in reason or "Python objects" in reason:
        return f"holds Python objects; save numpy.array(..., dtype={dtype}) instead"
    if isinstance(error, SyntaxError | tokenize.TokenError):
        reason = "its header is damaged"
    elif "pickle" in reason:
        # NumPy takes any other file for pickled objects, and advises to load them unsafely.
        reason = "it holds no array"
    writer = "numpy.savez" if kind == ".npz" else "numpy.save"
    return f"cannot be read as {kind} ({reason}); write it anew with {writer}"
