"""What each image is: its size, whether it has colours, what it looks like from far."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxcls.analysis.duplicates import FINGERPRINT_SIDE, fingerprints
from flaxcls.data.decode import (
    EXTENSIONS,
    ImageSpec,
    UnreadableImage,
    check_images,
    decode_whole,
    fit,
    in_threads,
)

# Images that are decoded before the next are begun, of which only the facts are kept.
_CHUNK = 256
_WHOLE = 2**30  # pixels: more than any image has, so that none is made smaller
# Levels of 256, in 32x32 averages: below them lies what compression does to grey and to white.
_COLOURLESS, _BLANK = 3, 2
_SUFFIXES = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
_OPENED = [kind for kind in _SUFFIXES if kind != "MPO"]  # which JPEG opens
# What a file may be besides a plain image, as a sentence of which the files are the subject.
PECULIARITIES = {
    "frames": "hold several frames, of which the first is used",
    "cmyk": "are CMYK, and are converted to RGB",
    "deep": "have more than 8 bits a channel, and are scaled to 8",
    "transparent": "are transparent, and are laid on white",
    "turned": "are stored turned, and are set upright as their EXIF data say",
    "misnamed": "are of another format than their names say, which does no harm",
}


@dataclass(frozen=True, eq=False)
class Facts:
    """What is kept of N images once they are seen.

    Attributes:
      width: int32 (N,), pixels of the upright image.
      height: int32 (N,).
      grey: bool (N,), whether it tells no colours, however it is stored.
      blank: bool (N,), whether it is of one colour all over.
      digest: 16 bytes (N,), equal where size and every decoded pixel are.
      fingerprint: uint64 (N,), see `duplicates.fingerprints`.
      view: uint8 (N, 256), the grey image of 16x16 averages.
      peculiar: N tuples of keys of PECULIARITIES; of arrays empty ones.
    """

    width: np.ndarray
    height: np.ndarray
    grey: np.ndarray
    blank: np.ndarray
    digest: np.ndarray
    fingerprint: np.ndarray
    view: np.ndarray
    peculiar: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.width)

    def take(self, rows: np.ndarray) -> Facts:
        """Returns those of the images at `rows`, integer (M,)."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Facts(**arrays, peculiar=[self.peculiar[row] for row in rows])


_ARRAYS = ("width", "height", "grey", "blank", "digest", "fingerprint", "view")


def of_files(
    paths: Sequence[str], advance: Callable[[int], object] = lambda count: None
) -> tuple[Facts, dict[int, str]]:
    """Decodes every file, whole, and returns the facts and what is wrong with those unreadable.

    Args:
      paths: N files.
      advance: told after each few hundred how many were seen.

    Returns:
      The facts of those that can be read, in order, and the fault of each other position.
    """
    faults: dict[int, str] = {}

    def seen() -> Iterator[list[_Seen]]:
        for start in range(0, len(paths), _CHUNK):
            chunk = []
            outcomes = in_threads(_see_file, paths[start : start + _CHUNK])
            for position, outcome in enumerate(outcomes, start):
                if isinstance(outcome, str):
                    faults[position] = outcome
                else:
                    chunk.append(outcome)
            advance(len(outcomes))
            yield chunk

    return _collect(seen()), faults


def of_array(images: np.ndarray, advance: Callable[[int], object] = lambda count: None) -> Facts:
    """Returns the facts of images uint8 (N, H, W, C)."""

    def seen() -> Iterator[list[_Seen]]:
        for start in range(0, len(images), _CHUNK):
            yield in_threads(_see, images[start : start + _CHUNK])
            advance(min(_CHUNK, len(images) - start))

    return _collect(seen())


def concatenate(parts: Sequence[Facts]) -> Facts:
    """Returns the facts of all, in order."""
    parts = [_collect(iter(())), *parts]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS
    }
    return Facts(**arrays, peculiar=[keys for part in parts for keys in part.peculiar])


class _Seen(NamedTuple):
    width: int
    height: int
    grey: bool
    digest: bytes
    small: np.ndarray  # uint8 (32, 32)
    peculiar: tuple[str, ...] = ()


def _collect(chunks: Iterator[list[_Seen]]) -> Facts:
    """Keeps of each chunk what is small."""
    # An empty chunk gives every array its type, where there are no images.
    kept = [_kept(chunk) for chunk in itertools.chain([[]], chunks)]
    arrays: dict[str, Any] = {name: np.concatenate([one[name] for one in kept]) for name in _ARRAYS}
    return Facts(**arrays, peculiar=[keys for one in kept for keys in one["peculiar"]])


def _kept(chunk: list[_Seen]) -> dict[str, Any]:
    side = FINGERPRINT_SIDE
    small = np.array([one.small for one in chunk], np.uint8).reshape(-1, side, side)
    return {
        "width": np.array([one.width for one in chunk], np.int32),
        "height": np.array([one.height for one in chunk], np.int32),
        "grey": np.array([one.grey for one in chunk], bool),
        "blank": np.ptp(small, axis=(1, 2)) <= _BLANK,
        "digest": np.frombuffer(b"".join(one.digest for one in chunk), "V16"),
        "fingerprint": fingerprints(small),
        "view": _halved(small),
        "peculiar": [one.peculiar for one in chunk],
    }


def _halved(small: np.ndarray) -> np.ndarray:
    """uint8 (N, 32, 32) -> (N, 256), averages of 2x2."""
    half = FINGERPRINT_SIDE // 2
    means = small.reshape(-1, half, 2, half, 2).mean(axis=(2, 4))
    return np.rint(means).astype(np.uint8).reshape(-1, half * half)


def _see(image: np.ndarray, peculiar: tuple[str, ...] = ()) -> _Seen:
    """Returns what is kept of an image uint8 (H, W, C)."""
    height, width, channels = image.shape
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    # First smaller, then grey: of 12 megapixels that is 8 ms instead of 300.
    small = fit(image, ImageSpec(FINGERPRINT_SIDE, channels))
    grey = channels == 1 or int(np.ptp(small.astype(np.int16), axis=2).max()) <= _COLOURLESS
    if channels == 3:
        small = fit(small, ImageSpec(FINGERPRINT_SIDE, 1))
    return _Seen(width, height, grey, digest.digest(), small[:, :, 0], peculiar)


def _see_file(path: str) -> _Seen | str:
    try:
        image = decode_whole(path, longest=_WHOLE)
    except UnreadableImage as error:
        _, faults = check_images([path], thorough=True, threads=1)
        return faults.get(0, str(error))
    return _see(image, _peculiar(path))


def _peculiar(path: str) -> tuple[str, ...]:
    """Returns what is out of the ordinary in a file that can be decoded."""
    try:
        with Image.open(path, formats=_OPENED) as image:
            suffix = path[path.rfind(".") :].lower()
            found = {
                "frames": image.format != "MPO" and getattr(image, "is_animated", False),
                "cmyk": image.mode == "CMYK",
                "deep": image.mode.startswith("I"),
                "transparent": image.has_transparency_data,
                "turned": image.format in ("JPEG", "MPO") and image.getexif().get(0x0112, 1) > 1,
                "misnamed": suffix in EXTENSIONS and suffix not in _SUFFIXES[image.format or ""],
            }
    except Exception:  # Pillow raises anything on metadata; the pixels were read.
        return ()
    return tuple(key for key, value in found.items() if value)
