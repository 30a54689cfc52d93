"""Image files and arrays brought to one size, the same way in training, validation and prediction.

Alpha is composited on white, so that a drawing on a transparent ground looks as it does in a
viewer; opaque images are as `Image.convert("RGB")` gives them. Grey is ITU-R 601-2 luma.
Grey of 12 and 16 bits is scaled by the range of its type, not by the values that occur, so that a
dark image stays dark. Signed and 32-bit integers and floating-point numbers say nothing of their
range and are refused: clipped at 255, as Pillow does, one is white; over 65535 another is black.
Resampling is Pillow's bilinear filter, which averages when it shrinks.
"""

import errno
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from flaxcls.errors import InputError

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Naming them keeps Pillow from trying plugins that run other programs (EPS starts Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LEADS_NOWHERE = "is a link that leads nowhere"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# They tell of metadata only, EXIF in every format included: what harms the pixels raises an error.
# Said once for the process, as `warnings.catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class UnreadableImage(InputError):
    """An image file that cannot be decoded; the message names the file and what is wrong."""


@dataclass(frozen=True)
class ImageSpec:
    """How an image of any shape becomes `size` x `size` pixels.

    size: pixels of a side of the result.
    channels: 1 (grey) or 3 (RGB).
    resize: `squash` stretches both sides to size; `crop` brings the shorter side to size and keeps
        the centre; `pad` brings the longer side to size and centres the image on black.
    crop_fraction: the central part of each side that is kept: 0.8 of the image, or 0.875 for "224
        of 256".
    crop_order: the crop comes `after` resizing (to size / crop_fraction) or `before` it. The result
        differs only with `pad`, whose bars are cropped away with the image or stay whole.
    Raises InputError for values outside these.
    """

    size: int
    channels: int = 3
    resize: str = "squash"
    crop_fraction: float = 1.0
    crop_order: str = "after"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"data.image_size must be at least 1 pixel, not {self.size}")
        if self.channels not in (1, 3):
            raise InputError(f"data.channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if self.resize not in ("squash", "crop", "pad"):
            raise InputError(f"data.resize must be 'squash', 'crop' or 'pad', not '{self.resize}'")
        if not 0.0 < self.crop_fraction <= 1.0:
            raise InputError(
                f"data.crop_fraction must be above 0 and at most 1, not {self.crop_fraction}"
            )
        if self.crop_order not in ("after", "before"):
            raise InputError(
                f"data.crop_order must be 'after' or 'before', not '{self.crop_order}'"
            )


def decode(
    source: str | os.PathLike[str] | bytes,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Read one image: a path, or the bytes of a file.

    box: (y0, x0, h, w) relative to the upright image; this part is stretched to the result and the
        spec's own resizing and cropping are left out.
    Returns uint8 (size, size, channels).
    Raises UnreadableImage.
    """
    try:
        image = _read(source, spec, box)
    except Exception as error:  # Pillow's decoders raise anything on corrupt data.
        raise UnreadableImage(
            f"{_name(source)} {_fault(source, error)}; replace or remove it"
        ) from error
    return _resize(image, spec, box)


def decode_all(paths: Sequence[str], spec: ImageSpec, threads: int = 0) -> np.ndarray:
    """Decode many files with a pool of threads (0: one a CPU) to uint8 (N, size, size, channels).

    Raises UnreadableImage for the first file, in the order of `paths`, that cannot be read.
    """
    images = np.empty((len(paths), spec.size, spec.size, spec.channels), np.uint8)

    def put(item: tuple[int, str]) -> None:
        images[item[0]] = decode(item[1], spec)

    in_threads(put, enumerate(paths), threads)
    return images


def resize_array(images: np.ndarray, spec: ImageSpec, threads: int = 0) -> np.ndarray:
    """Bring images uint8 (N, H, W, C) to the spec, with the geometry that files get.

    Square images that are not larger than the result and not cropped are returned as they are:
    they are stored small and enlarged in the compiled step, where grey is repeated to three
    channels too. Returns uint8 (N, S, S, C'), C' = min(C, spec.channels).
    """
    n, height, width, channels = images.shape
    if channels == 3 and spec.channels == 1:
        weights = np.array([19595, 38470, 7471], np.uint32)  # Pillow's luma, in 1 / 65536
        images = ((images @ weights + 32768) >> 16).astype(np.uint8)[..., None]
        channels = 1
    if height == width <= spec.size and spec.crop_fraction == 1.0:
        return images
    result = np.empty((n, spec.size, spec.size, channels), np.uint8)

    def put(i: int) -> None:
        resized = _resize(Image.fromarray(images[i, :, :, 0] if channels == 1 else images[i]), spec)
        result[i] = resized

    in_threads(put, range(n), threads)
    return result


def check_images(
    paths: Sequence[str], *, thorough: bool, threads: int = 0
) -> tuple[np.ndarray, dict[int, str]]:
    """Open every file and return (aspect, faults).

    aspect: float32 (N,), width / height of the upright image, 1 where it cannot be read.
    faults: what is wrong with the file at each position that cannot be read, such as "is empty".
    A file whose end is missing is noticed from its last bytes; `thorough` decodes every file, which
    also finds damage inside.
    """
    outcomes = in_threads(lambda path: _check(path, thorough), paths, threads)
    aspect = np.array([1.0 if isinstance(o, str) else o for o in outcomes], np.float32)
    return aspect, {i: o for i, o in enumerate(outcomes) if isinstance(o, str)}


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 0
) -> list[_Result]:
    """Return function(item) for every item, in order, from a pool of threads (0: one a CPU).

    The error of the first item that raises is raised, and what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _name(source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return f"image '{os.fspath(source)}'"


def _fault(source: str | os.PathLike[str] | bytes, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ELOOP):
        return LEADS_NOWHERE if os.path.islink(source) else "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if number is not None:  # from the system; what Pillow raises has none
        return f"cannot be read ({os.strerror(number)})"
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size == 0:
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image (JPEG, PNG, BMP, WebP, GIF, TIFF or PPM)"
    if isinstance(error, Image.DecompressionBombError):
        return "has too many pixels to be decoded safely"
    if "truncated" in str(error) or isinstance(error, EOFError):
        return "is truncated"
    return f"cannot be decoded ({error or type(error).__name__})"


def _check(path: str, thorough: bool) -> float | str:
    try:
        with open(path, "rb") as file:
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if _orientation(image) >= 5:
                    width, height = height, width
                whole = not thorough and _has_its_end(file, image.format)
            if not whole:
                _read(path, ImageSpec(1), None)
        return width / height
    except Exception as error:  # Pillow's decoders raise anything on corrupt data.
        return _fault(path, error)


def _has_its_end(file: io.BufferedReader, kind: str | None) -> bool:
    """Tell whether the file certainly ends where its format says; False where one must decode."""
    size = file.seek(0, os.SEEK_END)
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    file.seek(max(0, size - 12))
    tail = file.read()
    if kind in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail[4:8] == b"IEND"
    return kind == "GIF" and tail.endswith(b";")


def _read(
    source: str | os.PathLike[str] | bytes,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None,
) -> Image.Image:
    """Return the upright image in mode L or RGB, at least twice as fine as the result."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=_FORMATS) as image:
        turn = _orientation(image)
        width, height = image.size
        if turn >= 5:
            width, height = height, width
        (left, top, right, bottom), (columns, rows) = _geometry(width, height, spec, box)
        # JPEG can leave out the finest frequencies: 12 megapixels become 224 px in 55 ms instead of
        # 156. Twice the needed resolution leaves the averaging to the resize.
        wanted = [
            max(1, int(2 * columns * width / (right - left))),
            max(1, int(2 * rows * height / (bottom - top))),
        ]
        if turn >= 5:
            wanted.reverse()
        image.draft(None, (wanted[0], wanted[1]))
        image.load()
        plain = _plain(image, "L" if spec.channels == 1 else "RGB")
    return plain.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else plain


def _orientation(image: Image.Image) -> int:
    """Return how the image must be turned, 1 (upright) to 8."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns these itself.
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # It may stand behind the pixels, whose damage must not pass for its own.
    try:
        turn = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow raises anything on a broken block, which says nothing of the pixels.
        return 1
    return turn if turn in _UPRIGHT else 1


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in mode L or RGB, in 8 bits, alpha laid on white."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers")
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 12 or 16 bits in mode L, with its transparent value white."""
    values, white = np.asarray(image).astype(np.uint32), 65535  # Pillow scales those of PPM to it.
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits = tags[TiffImagePlugin.BITSPERSAMPLE][0]
        signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
        if bits > 16 or signed:
            raise ValueError(
                f"its values are {'signed ' if signed else ''}{bits}-bit integers, for which no "
                "value is known to be white; save them as 8 or 16 bits, unsigned"
            )
        white = 2**bits - 1
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            values = white - values
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _geometry(
    width: float, height: float, spec: ImageSpec, box: Sequence[float] | np.ndarray | None
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Return the part of the image that is shown, (left, top, right, bottom) in pixels, and its
    (columns, rows) in the result; what is left of the result is padding."""
    size = spec.size
    if box is not None:
        y0, x0, h, w = (float(v) for v in box)
        left, top = x0 * width, y0 * height
        right, bottom = min(width, left + w * width), min(height, top + h * height)
        return (left, top, right, bottom), (size, size)
    if spec.resize == "pad":
        side = max(width, height) * spec.crop_fraction
        if spec.crop_order == "before":
            shown = width * spec.crop_fraction, height * spec.crop_fraction
        else:
            shown = min(width, side), min(height, side)
        parts = max(1, round(size * shown[0] / side)), max(1, round(size * shown[1] / side))
    else:
        shorter = min(width, height)
        whole = (shorter, shorter) if spec.resize == "crop" else (width, height)
        shown = whole[0] * spec.crop_fraction, whole[1] * spec.crop_fraction
        parts = size, size
    left, top = (width - shown[0]) / 2, (height - shown[1]) / 2
    return (left, top, min(width, left + shown[0]), min(height, top + shown[1])), parts


def _resize(
    image: Image.Image, spec: ImageSpec, box: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """Return uint8 (size, size, channels of the image); one resampling does crop and resize."""
    part, (columns, rows) = _geometry(image.width, image.height, spec, box)
    resized = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=part))
    resized = resized.reshape(rows, columns, -1)
    if (columns, rows) == (spec.size, spec.size):
        return resized
    result = np.zeros((spec.size, spec.size, resized.shape[2]), np.uint8)
    top, left = (spec.size - rows) // 2, (spec.size - columns) // 2
    result[top : top + rows, left : left + columns] = resized
    return result
