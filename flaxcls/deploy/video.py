"""Videos and cameras: what a model says of each frame, written on a copy of it.

OpenCV, of the extra `video`, reads and writes them. The copy is MPEG-4 in .mp4, the one format that
every build of OpenCV writes; it has the frames of the original, at its rate. What a camera sees is
written at the camera's rate: a frame is repeated for as long as the next takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from flaxcls.analysis.explain import Explainer, place_heat
from flaxcls.data.decode import count_cores
from flaxcls.deploy.counter import Counter
from flaxcls.deploy.inputs import has_video_signature, shown
from flaxcls.deploy.pictures import picture, scaled, show_at
from flaxcls.deploy.predictor import Prediction, Predictor
from flaxcls.deploy.records import Clip, Seen, box_of, seen_of
from flaxcls.deploy.trained import TrainedModel
from flaxcls.errors import InputError

_BATCH = 16
# Frames of a batch are held three times: read ahead, predicted, drawn.
_BATCH_BYTES = 96e6
_MOST_PIXELS = 8192 * 8192
# MPEG-4 has sides of at most 8191 pixels, two of these and a caption.
_LEAST, _LONGEST = 240, 1280
_USUAL_RATE = 25.0


class Stop:
    """Whether Ctrl-C was pressed since `with` was entered; a second one ends the process."""

    def __init__(self) -> None:
        self._pressed = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self._pressed

    def _press(self, *_: object) -> None:
        self._pressed = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class Frames:
    """The frames of a video file or a camera. A context manager.

    Attributes:
      name: of the file, or the camera, as a person calls it.
      live: whether it is a camera, which does not wait.
      width: pixels.
      height: pixels.
      rate: frames a second.
      count: how many there will be, as the file says; None where it does not.
      note: what is to be said of it, or "".
    """

    def __init__(self, capture: Any, first: np.ndarray, name: str, *, live: bool = False):
        cv2 = _opencv()
        self._capture = capture
        self._first: np.ndarray | None = first
        self.name = name
        self.live = live
        self.height, self.width, _ = first.shape
        self.note = ""
        self.rate = float(capture.get(cv2.CAP_PROP_FPS))
        if not 0.1 <= self.rate <= 500:
            self.rate = _USUAL_RATE
            self.note = f"its rate is not known and taken for {_USUAL_RATE:.0f} frames a second"
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.count = int(count) if not live and math.isfinite(count) and count > 0 else None

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def read(self) -> np.ndarray | None:
        """Returns the next frame, RGB uint8 (height, width, 3); None after the last."""
        cv2 = _opencv()
        if self._first is not None:
            frame, self._first = self._first, None
        else:
            there, frame = self._capture.read()
            if not there or frame is None:
                return None
        if frame.shape[:2] != (self.height, self.width):  # It may change on the way.
            frame = cv2.resize(frame, (self.width, self.height))
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def open_file(path: str) -> Frames:
    """Opens a video file.

    Raises:
      InputError: it is none, has no frames, or its codec is not there.
    """
    cv2 = _opencv()
    status = _status(path)
    if status:
        raise InputError(f"video {shown(path)} {status}")
    if not has_video_signature(path):
        raise InputError(
            f"video {shown(path)} is none (MP4, MOV, Matroska, WebM, AVI, Ogg, FLV, MPEG or WMV); "
            "replace it"
        )
    # As an absolute path it is neither an address nor a pattern of numbered images.
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise InputError(
            f"video {shown(path)} cannot be opened: it holds no pictures, is truncated, or is of a "
            "codec that this OpenCV lacks; convert it, as with: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    try:
        if capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > (
            _MOST_PIXELS
        ):
            raise InputError(
                f"video {shown(path)} has too many pixels to be decoded safely; make it smaller"
            )
        there, first = capture.read()
        if not there or first is None:
            raise InputError(
                f"video {shown(path)} has no frame that can be decoded: it is empty, damaged, or "
                "of a codec that this OpenCV lacks; convert it, as with: ffmpeg -i IN -c:v libx264 "
                "OUT.mp4"
            )
        return Frames(capture, first, path)
    except BaseException:
        capture.release()
        raise


def open_camera(number: int) -> Frames:
    """Opens a camera of this machine.

    Raises:
      InputError: there is none of that number, or it gives no pictures.
    """
    cv2 = _opencv()
    capture = cv2.VideoCapture(number)
    there, first = capture.read() if capture.isOpened() else (False, None)
    if not there or first is None:
        capture.release()
        known = sorted(path.name.removeprefix("video") for path in Path("/dev").glob("video[0-9]*"))
        others = f"this machine has {', '.join(known)}" if known else "this machine shows none"
        raise InputError(
            f"camera {number} cannot be opened ({others}); connect it, end the programs that use "
            "it, and see that you may read /dev/video*"
        )
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return Frames(capture, first, f"camera {number}", live=True)


def annotate(
    predictor: Predictor,
    explainer: Explainer | None,
    frames: Frames,
    target: Path,
    *,
    top_k: int,
    invert: str,
    stop: Stop,
) -> Clip:
    """Predicts every frame and writes a copy that says so; of a camera, until `stop`.

    Whether light and dark are swapped is decided by the first frames, for all of them.

    Args:
      predictor: of the run.
      explainer: of the same model, for the box and the heat map; None draws none.
      frames: of the video.
      target: the copy, .mp4.
      top_k: how many classes are kept.
      invert: "yes", "no" or "auto"; see `Predictor.inverts`.
      stop: true as soon as it is to end.

    Raises:
      InputError: the copy cannot be written.
    """
    longest = _LONGEST if explainer else 2 * _LONGEST
    size = scaled(frames.width, frames.height, least=_LEAST, longest=longest)
    draw = partial(_draw, predictor.trained, size)
    seen: list[Seen] = []
    seconds: list[float] = []
    with (
        contextlib.closing(_batches(predictor, frames, invert, stop)) as batches,
        _Writer(target, frames.rate) as writer,
        ThreadPoolExecutor(count_cores()) as pool,
        Counter("frames", frames.count) as counter,
    ):
        drawing: deque[Future[tuple[np.ndarray, Seen]]] = deque()
        began = time.monotonic()

        def put(most: int) -> None:
            """Writes what is drawn until at most so many frames are not."""
            while len(drawing) > most:
                image, said = drawing.popleft().result()
                seconds.append(time.monotonic() - began if frames.live else len(seen) / frames.rate)
                seen.append(said)
                writer.write(image, round(seconds[-1] * frames.rate) if frames.live else None)
                counter.add(1, describe(predictor.trained, said))

        for images, small, inverted in batches:
            predicted, heats = look(predictor, explainer, small)
            said = seen_of(predicted, top_k, [inverted] * len(small))
            for i, image in enumerate(images):
                heat = None if heats is None else heats[i]
                drawing.append(pool.submit(draw, image, said[i], heat))
            put(0 if frames.live else len(images))
        put(0)
    note = frames.note
    if frames.count and not stop and len(seen) < 0.98 * frames.count - 2:
        note = (
            f"it ended after {len(seen)} of {frames.count} frames: the rest is missing or damaged"
        )
    return Clip(
        frames.name,
        target.name,
        frames.width,
        frames.height,
        frames.rate,
        seen,
        seconds,
        note,
    )


def look(
    predictor: Predictor, explainer: Explainer | None, images: np.ndarray
) -> tuple[Prediction, np.ndarray | None]:
    """Returns what the model says of images uint8 (N, S, S, C) and, with an explainer, of where.

    Where float32 (N, S, S), 0 to 1: of the class that each is predicted to be.
    """
    if explainer is None:
        return predictor(images), None
    if predictor.trained.parent_names:  # of which the maps say nothing
        predicted = predictor(images)
        return predicted, explainer(images, predicted.logits.argmax(axis=1)).heat
    maps = explainer(images)
    return Prediction.of(maps.logits), maps.heat


def describe(trained: TrainedModel, seen: Seen) -> str:
    """Returns what the model says in a few words: `Ankle boot 97.3 %`, after its parent's name."""
    name = trained.class_names[seen.classes[0]]
    if seen.parent is not None:
        name = f"{trained.parent_names[seen.parent]}: {name}"
    return f"{name} {100 * seen.probabilities[0]:.1f} %"


def _batches(
    predictor: Predictor, frames: Frames, invert: str, stop: Stop
) -> Generator[tuple[list[np.ndarray], np.ndarray, bool], None, None]:
    """Yields frames, what the model sees of them and whether that is inverted, read ahead."""
    frame_bytes = 3 * frames.width * frames.height
    size = 1 if frames.live else max(1, min(_BATCH, int(_BATCH_BYTES / frame_bytes)))
    swap: str | None = None if invert == "auto" else invert

    def read() -> tuple[list[np.ndarray], np.ndarray, bool] | None:
        nonlocal swap
        images: list[np.ndarray] = []
        while len(images) < size and not stop and (image := frames.read()) is not None:
            images.append(image)
        if not images:
            return None
        if swap is None:
            votes = [predictor.inverts(image, "auto") for image in images]
            swap = "yes" if 2 * sum(votes) > len(votes) else "no"
        small = [predictor.fit(image, invert=swap) for image in images]
        return images, np.stack(small), swap == "yes"

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read)
        while (batch := coming.result()) is not None:
            coming = pool.submit(read)
            yield batch


def _draw(
    trained: TrainedModel,
    size: tuple[int, int],
    image: np.ndarray,
    seen: Seen,
    heat: np.ndarray | None,
) -> tuple[np.ndarray, Seen]:
    """Returns a frame of the copy, and what is said of it with the box."""
    image = show_at(image, *size)
    if heat is not None:
        heat = place_heat(heat, trained.spec, *size)
    drawn, box = picture(image, describe(trained, seen), heat)
    return drawn, dataclasses.replace(seen, box=box_of(box, *size))


class _Writer:
    """Writes a video beside its place and moves it there when it is whole. A context manager."""

    def __init__(self, target: Path, rate: float):
        self._target = target
        self._beside = target.with_name(f".{os.getpid()}-{target.name}")
        self._rate = rate
        self._writer: Any = None
        self._written = 0

    def __enter__(self) -> _Writer:
        return self

    def write(self, image: np.ndarray, number: int | None = None) -> None:
        """Writes a frame, RGB uint8 (H, W, 3); where it is frame `number`, as often as is due."""
        cv2 = _opencv()
        if self._writer is None:
            height, width, _ = image.shape
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(
                str(self._beside), cv2.CAP_FFMPEG, code, self._rate, (width, height)
            )
            if not self._writer.isOpened():
                raise InputError(
                    f"cannot write '{self._target}': the folder may not be written, or this OpenCV "
                    "writes no MPEG-4; give another --output, or pip install 'flaxcls[video]'"
                )
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        for _ in range(1 if number is None else max(0, number + 1 - self._written)):
            self._writer.write(bgr)
            self._written += 1

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._writer is not None:
                self._writer.release()
                if kind is None:
                    self._check()
                    os.replace(self._beside, self._target)
        finally:
            self._beside.unlink(missing_ok=True)

    def _check(self) -> None:
        """Compares the file with what was written: of a full disk OpenCV says nothing."""
        cv2 = _opencv()
        reader = cv2.VideoCapture(str(self._beside), cv2.CAP_FFMPEG)
        count = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
        reader.release()
        if count != self._written:
            raise InputError(
                f"cannot write '{self._target}': {count} of {self._written} frames are in it; make "
                "room and run the same command again"
            )


def _status(path: str) -> str:
    """Returns what is wrong with a file before it is opened, and the remedy; else ""."""
    if not os.path.exists(path):
        return "is a link that leads nowhere; correct the link"
    if not os.path.isfile(path):
        return "is a pipe, socket or device, not a file; give a file"
    if not os.access(path, os.R_OK):
        return "may not be read; get leave to read it"
    return "" if os.path.getsize(path) else "is empty (0 bytes); replace it"


@cache
def _opencv() -> Any:
    """Returns OpenCV, which then says nothing on the terminal of its own.

    Raises:
      InputError: it is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise InputError(
            "videos and cameras are read by OpenCV, which is not installed; "
            "pip install 'flaxcls[video]'"
        )
    # FFmpeg's is read when it first opens a video, OpenCV's own when it is imported.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    if "OPENCV_LOG_LEVEL" not in os.environ:
        module = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4, 5
        module.setLogLevel(0)
    return cv2
