"""What `--input` names: images, folders of them, patterns, videos and cameras."""

import glob
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from flaxcls.data.decode import EXTENSIONS
from flaxcls.errors import InputError

VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov"),
        *("mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv"),
    )
)
# Where a container's name stands in its first bytes. A file that has none is not given to FFmpeg,
# which would read playlists, and with them files and addresses that they name.
_SIGNATURES = (
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),  # MP4, QuickTime
    (0, (b"\x1a\x45\xdf\xa3",)),  # Matroska, WebM
    (8, (b"AVI ",)),
    (0, (b"OggS", b"FLV\x01", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")),
    (0, (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",)),  # ASF, WMV
    (188, (b"G",)),  # MPEG-TS: packets of 188 bytes, or 192 with the time before each
    (196, (b"G",)),
)
_CAMERA = re.compile(r"(?:/dev/video)?(\d{1,4})")


class Photo(NamedTuple):
    """An image file.

    Attributes:
      path: of the file.
      place: its path within the folder that was given; its name where it was given itself.
    """

    path: str
    place: str


class Inputs(NamedTuple):
    """What was named, each thing once, in the order in which it was.

    Attributes:
      photos: image files.
      videos: paths of video files.
      cameras: their numbers.
      notes: sentences on what was left out.
      name: of all that, for a folder of results.
    """

    photos: tuple[Photo, ...]
    videos: tuple[str, ...]
    cameras: tuple[int, ...]
    notes: tuple[str, ...]
    name: str


def find_inputs(inputs: Sequence[str]) -> Inputs:
    """Finds what the values of `--input` name.

    A folder stands for the images in it and in its folders, hidden ones left out, in the order in
    which a person counts: 2.jpg before 10.jpg. What is there is taken by that name; otherwise a
    number is a camera, and a text with *, ? or [ a pattern, in which ** stands for any folders.

    Raises:
      InputError: nothing was given, or something of it is not there.
    """
    if not inputs:
        raise InputError(
            "--input is missing; give an image, a folder, a pattern in quotes, a video, or the "
            "number of a camera"
        )
    photos: dict[str, Photo] = {}
    videos: dict[str, str] = {}
    cameras: dict[int, None] = {}
    notes: list[str] = []
    for given in inputs:
        camera = _CAMERA.fullmatch(given)
        if camera and (not os.path.lexists(given) or given.startswith("/dev/")):
            cameras[int(camera[1])] = None
            continue
        for path in _paths(given):
            if os.path.isdir(path):
                found, left_out = images_in(path)
                notes += left_out
            elif is_video(path):
                videos.setdefault(_identity(path), path)
                continue
            else:
                found = [Photo(path, os.path.basename(path))]
            for photo in found:
                photos.setdefault(_identity(photo.path), photo)
    return Inputs(
        tuple(photos.values()), tuple(videos.values()), tuple(cameras), tuple(notes), _name(inputs)
    )


def images_in(folder: str) -> tuple[list[Photo], list[str]]:
    """Returns the image files under a folder, and notes on what is left out.

    Links to folders are followed, each folder once.

    Raises:
      InputError: there are none.
    """
    found: list[Photo] = []
    others: list[str] = []
    closed: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: closed.append(str(error.filename))
    ):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if real in seen:  # by a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.startswith("."):
                continue
            path = os.path.join(place, name)
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append(Photo(path, os.path.relpath(path, folder)))
            else:
                others.append(path)
    if folder in closed:
        raise InputError(f"--input: {shown(folder)} may not be listed; get leave to read it")
    if not found:
        raise InputError(
            f"--input: there are no images in {shown(folder)} (of {len(others)} other files); give "
            "a folder of JPEG, PNG, BMP, WebP, GIF, TIFF or PPM files, or a file by its name"
        )
    notes = [f"not read: {shown(path)}, which may not be listed" for path in closed]
    videos = [path for path in others if _extension(path) in VIDEO_EXTENSIONS]
    if videos:
        count = "a video" if len(videos) == 1 else f"{len(videos)} videos"
        notes.append(
            f"left out of {shown(folder)}: {count}, such as {shown(videos[0])}; give a video by "
            "its name"
        )
    found.sort(key=lambda photo: natural_order(photo.place))
    return found, notes


def natural_order(path: str) -> tuple[tuple[tuple[int, str], ...], ...]:
    """Returns a key by which paths are sorted as a person counts: a2 before a10, a/9 before b/1."""
    return tuple(
        tuple(
            (int(part), "") if part.isdecimal() else (-1, part.casefold())
            for part in re.split(r"(\d+)", name)
        )
        for name in path.split(os.sep)
    )


def is_video(path: str) -> bool:
    """Whether a file is to be read as a video: its name says so, or else its first bytes."""
    if _extension(path) in VIDEO_EXTENSIONS:
        return True
    return _extension(path) not in EXTENSIONS and has_video_signature(path)


def has_video_signature(path: str) -> bool:
    """Whether an ordinary file begins as one of the containers of videos does."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            return False
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    for position, names in _SIGNATURES:
        if position > 180 and head[position - 188 : position - 187] != b"G":
            continue
        if any(head[position : position + len(name)] == name for name in names):
            return True
    return False


def shown(path: str) -> str:
    """Returns the name of a file in quotes, as one line that no terminal acts on."""
    safe = "".join(c if c.isprintable() else _escaped(c) for c in path)
    return f"'{safe}'"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _paths(given: str) -> Iterable[str]:
    """Returns what a value names on disk: itself, or what matches it as a pattern."""
    if not given:
        raise InputError("--input: the name is empty; give a file, a folder or a pattern")
    if os.path.lexists(given):
        return [given]
    if not any(c in given for c in "*?["):
        if "://" in given:
            raise InputError(
                f"--input: {shown(given)} is an address; download it and give the file"
            )
        raise InputError(f"--input: {shown(given)} does not exist; correct the name")
    matching = glob.glob(given, recursive=True)
    if not matching:
        raise InputError(
            f"--input: no file matches the pattern {shown(given)}; correct it, and put it in quotes"
        )
    return sorted(matching, key=natural_order)


def _identity(path: str) -> str:
    """Returns the same for all ways to a file, but another for a link to it."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _name(inputs: Sequence[str]) -> str:
    """Returns a file name for results: photo, holidays, camera-0, photo-and-3-more."""
    first = inputs[0]
    camera = _CAMERA.fullmatch(first)
    named = f"camera-{camera[1]}" if camera and not os.path.isfile(first) else Path(first).name
    if Path(first).suffix.lower() in EXTENSIONS | VIDEO_EXTENSIONS:
        named = Path(named).stem
    name = re.sub(r"[^\w.-]+", "-", named or Path(os.path.abspath(first)).name)
    name = name.strip("-.")[:60] or "images"
    return name if len(inputs) == 1 else f"{name}-and-{len(inputs) - 1}-more"
