"""Image files and arrays brought to one size, the same way in training, validation and prediction.

Alpha is composited on white, so that a drawing on a transparent ground looks as it does in a
viewer; opaque images are as `Image.convert("RGB")` gives them. Grey is ITU-R 601-2 luma.
Grey of 12 and 16 bits is scaled by the range of its type, not by the values that occur, so that a
dark image stays dark. Signed and 32-bit integers and floating-point numbers say nothing of their
range and are refused: clipped at 255, as Pillow does, one is white; over 65535 another is black.
Resampling is Pillow's bilinear filter, which averages when it shrinks; cykooz-resizer computes it
three times as fast as Pillow (126 us for 392, to 224 px), one level beside it in a tenth of values.

JPEG files are decoded by libjpeg-turbo through simplejpeg, to the pixels that Pillow, which has it
inside, gives them, in two thirds of the time. What it does not decode without a complaint is left
to Pillow: CMYK, damage, whatever is unusual; so is all that is said of a file that is refused.
"""

import contextlib
import errno
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from flaxcls.errors import InputError

try:
    import cykooz_resizer as fast
except ImportError:  # no wheels for Linux on ARM
    fast = None

# What computes the resampling here. Two of them differ by one level in up to a fourth of values.
RESAMPLER = "cykooz-resizer" if fast else "pillow"

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Naming them keeps Pillow from trying plugins that run other programs (EPS starts Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LEADS_NOWHERE = "is a link that leads nowhere"
# Files are read whole before they are decoded; what Pillow decodes at all is smaller in any format.
_LARGEST_FILE = 2**30
# One image in threads at a time that is larger than this: it takes 8 bytes a pixel and more.
_LARGE_PIXELS = 40_000_000
_large = threading.Lock()
_STRIP_PIXELS = 1 << 22
_ORIENTATION_TAG = 0x0112
# What brings an image (H, W, C) of each EXIF orientation upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
# They tell of metadata only, EXIF in every format included: what harms the pixels raises an error.
# Said once for the process, as `warnings.catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
# Of images with more than 89 megapixels; those with more than twice as many are refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Read one image: a path, or the bytes of a file.

    box: (y0, x0, h, w) relative to the upright image; this part is stretched to the result and the
        spec's own resizing and cropping are left out.
    change: of what is shown of the image, uint8 (h, w, channels) to the same, before it is padded.
    Returns uint8 (size, size, channels).
    Raises UnreadableImage.
    """
    return _resize(_read_or_refuse(source, spec, box), spec, box, change)


def decode_whole(
    source: str | os.PathLike[str] | bytes, *, longest: int, channels: int = 3
) -> np.ndarray:
    """Read one image, all of it in its own shape, as a person looks at it.

    longest: pixels; where its longer side has more, it is made smaller.
    Returns uint8 (H, W, channels).
    Raises UnreadableImage.
    """
    image = _read_or_refuse(source, ImageSpec(longest, channels, "pad"), None)
    height, width, _ = image.shape
    if max(height, width) <= longest:
        return image
    columns, rows = (max(1, round(side * longest / max(height, width))) for side in (width, height))
    return _resample(image, (0, 0, width, height), columns, rows)


def fit(
    image: np.ndarray,
    spec: ImageSpec,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Bring an image uint8 (H, W, C), C = 1 or 3, to what `decode` returns of a file that holds it.

    change: as for `decode`.
    Returns uint8 (size, size, channels).
    """
    if image.shape[2] == spec.channels:
        return _resize(image, spec, None, change)
    if spec.channels == 3:
        return _resize(np.repeat(image, 3, axis=2), spec, None, change)
    return _resize(_luma(image), spec, None, change)


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
        images, channels = _luma(images), 1
    if height == width <= spec.size and spec.crop_fraction == 1.0:
        return images
    result = np.empty((n, spec.size, spec.size, channels), np.uint8)

    def put(i: int) -> None:
        result[i] = _resize(images[i], spec)

    in_threads(put, range(n), threads)
    return result


def _luma(images: np.ndarray) -> np.ndarray:
    """Return Pillow's grey (..., 1) of colours (..., 3)."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # in 1 / 65536
    return ((images @ weights + 32768) >> 16).astype(np.uint8)[..., None]


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


def placement(
    width: int, height: int, spec: ImageSpec
) -> tuple[tuple[float, float, float, float], tuple[int, int, int, int]]:
    """Where an image of width x height pixels lies in the square that `decode` makes of it.

    Returns the part of the image that is shown, and the part of the square that shows it, both as
    (left, top, right, bottom) in pixels; the rest of the square is black.
    """
    part, (columns, rows) = _geometry(width, height, spec, None)
    left, top = (spec.size - columns) // 2, (spec.size - rows) // 2
    return part, (left, top, left + columns, top + rows)


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 0
) -> list[_Result]:
    """Return function(item) for every item, in order, from a pool of threads (0: one a CPU).

    The error of the first item that raises is raised, and what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(threads or count_cores())
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def count_cores() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    if isinstance(error, _NotForReading):
        return str(error)
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
        _check_kind(path)
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


def _read_or_refuse(
    source: str | os.PathLike[str] | bytes,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None,
) -> np.ndarray:
    """Return what `_read` does; raises UnreadableImage."""
    try:
        return _read(source, spec, box)
    except Exception as error:  # Pillow's decoders raise anything on corrupt data.
        raise UnreadableImage(
            f"{_name(source)} {_fault(source, error)}; replace or remove it"
        ) from error


class _NotForReading(Exception):
    """What must not be opened or read whole; the message says why."""


def _check_kind(path: str | os.PathLike[str]) -> None:
    """Refuse what is read for ever: to open a pipe waits for who writes to it."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise _NotForReading("is a pipe, socket or device, not a file")
    if status.st_size > _LARGEST_FILE:
        raise _NotForReading(f"has {status.st_size / 2**30:.1f} GiB, more than an image may have")


def _read(
    source: str | os.PathLike[str] | bytes,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None,
) -> np.ndarray:
    """Return the upright image, uint8 (H, W, spec.channels), at least twice as fine as the result
    where the file is."""
    if isinstance(source, bytes):
        data = source
    else:
        _check_kind(source)
        with open(source, "rb", buffering=0) as file:
            data = file.read()
    image = _read_jpeg(data, spec, box) if data.startswith(b"\xff\xd8\xff") else None
    return _read_any(data, spec, box) if image is None else image


def _read_jpeg(
    data: bytes, spec: ImageSpec, box: Sequence[float] | np.ndarray | None
) -> np.ndarray | None:
    """Return what `_read` does, or None where Pillow is to read the file or to refuse it."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        too_large = width * height > (Image.MAX_IMAGE_PIXELS or width * height)
        if too_large or colours not in ("Gray", "RGB", "YCbCr"):
            return None
        grey = colours == "Gray" and spec.channels == 1
        turn = _jpeg_orientation(data)
        part = _reduction(width, height, turn, spec, box)
        image = simplejpeg.decode_jpeg(
            data,
            "GRAY" if grey else "RGB",
            min_height=-(-height // part),
            min_width=-(-width // part),
            min_factor=2,
        )
    except Exception:  # Warnings too: some are harmless and others are a missing end.
        return None
    if spec.channels < image.shape[2]:  # JPEG's own luma differs by up to 16 where colours clip
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return _UPRIGHT[turn](image) if turn in _UPRIGHT else image


def _read_any(data: bytes, spec: ImageSpec, box: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Return what `_read` does, through Pillow."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        turn = _orientation(image)
        width, height = image.size
        part = _reduction(width, height, turn, spec, box)
        image.draft(None, (width // part, height // part))
        alone = image.width * image.height > _LARGE_PIXELS
        with _large if alone else contextlib.nullcontext():
            image.load()
            plain = np.asarray(_plain(image, "L" if spec.channels == 1 else "RGB"))
    plain = plain.reshape(*plain.shape[:2], spec.channels)
    return _UPRIGHT[turn](plain) if turn in _UPRIGHT else plain


def _reduction(
    width: int,
    height: int,
    turn: int,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None,
) -> int:
    """Return 1, 2, 4 or 8: the part of its sides at which a JPEG may be decoded.

    JPEG can leave out the finest frequencies: 12 megapixels become 224 px in 55 ms instead of 156.
    Twice the needed resolution leaves the averaging to the resize.
    """
    if turn >= 5:
        width, height = height, width
    (left, top, right, bottom), (columns, rows) = _geometry(width, height, spec, box)
    wanted = max(1, int(2 * columns * width / (right - left)))
    wanted_rows = max(1, int(2 * rows * height / (bottom - top)))
    finer = min(width // wanted, height // wanted_rows)
    return next((part for part in (8, 4, 2) if finer >= part), 1)


def _jpeg_orientation(data: bytes) -> int:
    """Return how a JPEG must be turned, 1 to 8; where nothing in it can say so, without Pillow."""
    position = 2
    while (marker := data[position : position + 2]) != b"\xff\xda":  # the pixels begin
        plain = marker[:1] == b"\xff" and b"\xc0" <= marker[1:] < b"\xff"
        if not plain or marker == b"\xff\xe1":  # EXIF or XMP
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return _orientation(image)
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return 1


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
        image = _on_white(image)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB, its alpha laid on white; in strips, as that takes three copies:
    of 177 megapixels, which a PNG of 3 MB can hold, they would be 2 GB."""
    width, height = image.size
    result = Image.new("RGB", (width, height))
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


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
    image: np.ndarray,
    spec: ImageSpec,
    box: Sequence[float] | np.ndarray | None = None,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return uint8 (size, size, channels of the image); one resampling does crop and resize."""
    height, width, channels = image.shape
    part, (columns, rows) = _geometry(width, height, spec, box)
    resized = _resample(image, part, columns, rows)
    if change is not None:
        resized = change(resized)
    if (columns, rows) == (spec.size, spec.size):
        return resized
    result = np.zeros((spec.size, spec.size, channels), np.uint8)
    top, left = (spec.size - rows) // 2, (spec.size - columns) // 2
    result[top : top + rows, left : left + columns] = resized
    return result


class _Resizer(threading.local):
    """A thread's own resizer: one that threads share works for one of them at a time."""

    def __init__(self) -> None:
        self.resize = fast.Resizer().resize
        bilinear = fast.ResizeAlg.convolution(fast.FilterType.bilinear)
        self.options = fast.ResizeOptions(bilinear, use_alpha=False)


_resizer = _Resizer() if fast else None


def _resample(
    image: np.ndarray, part: tuple[float, float, float, float], columns: int, rows: int
) -> np.ndarray:
    """Return the part (left, top, right, bottom) of the image, uint8 (rows, columns, channels)."""
    height, width, channels = image.shape
    if _resizer is None:
        plain = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        resized = plain.resize((columns, rows), Image.Resampling.BILINEAR, box=part)
        return np.asarray(resized).reshape(rows, columns, channels)
    left, top, right, bottom = part
    pixels = fast.PixelType.U8 if channels == 1 else fast.PixelType.U8x3
    result = fast.ImageData(columns, rows, pixels)
    options = _resizer.options.copy()
    options.crop_box = fast.CropBox(left, top, right - left, bottom - top)
    _resizer.resize(fast.ImageData(width, height, pixels, image.tobytes()), result, options)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(rows, columns, channels)
