"""What the page answers: what runs say of a picture, why, and how one learns a class more.

Nothing here knows of HTTP. A picture comes as the bytes of a file, is never written anywhere, and
is forgotten with its answer; what the page learns becomes a new run beside the one it learned from.
"""

import base64
import contextlib
import io
import itertools
import os
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxcls.analysis.explain import METHODS, Explainer, available, overlay, place_heat
from flaxcls.data.decode import ImageSpec, UnreadableImage, decode, decode_whole
from flaxcls.deploy.head import head_of
from flaxcls.deploy.pictures import scaled, show_at
from flaxcls.deploy.predictor import Predictor, sees_light_on_dark
from flaxcls.deploy.teach import (
    Accuracy,
    Taught,
    check_count,
    check_request,
    default_folder,
    save_taught,
    teach,
    validation,
)
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError
from flaxcls.results import read_summary

Answer = dict[str, Any]

# Sensors of 50 megapixels are usual; decoded, that is 150 MB of RGB.
MOST_PIXELS = 64_000_000
TOP = 5  # classes shown as bars
# Sides of a picture on the page, pixels: a digit of 8 pixels is seen, and a photo is sent quickly.
_LEAST, _LONGEST = 280, 720
_LOSSLESS_SIDE = 128  # smaller ones have pixels that a person is to see


class ServedRun:
    """A run on the page; one request at a time asks its model.

    Attributes:
      name: shown to a person.
      predictor: of its best model.
      methods: that explain the model, the best first.
      origin: the name of the run that it was taught from on this page, or None.
    """

    def __init__(self, predictor: Predictor, name: str, origin: str | None = None):
        self.predictor = predictor
        self.name = name
        self.origin = origin
        trained = predictor.trained
        self.methods = available(
            trained.model, trained.variables, trained.preprocess, trained.dtype
        )
        self._explainers: dict[str, Explainer] = {}
        self._lock = threading.Lock()
        summary = _summary(trained.folder)
        self._accuracy = (summary.get("test") or {}).get("accuracy")
        self._params = summary.get("params")
        self._imprints = _imprints(trained)

    @classmethod
    def load(cls, folder: Path, name: str, origin: str | None = None) -> "ServedRun":
        """Reads a run folder; see `trained.load_run` for errors."""
        return cls(Predictor(load_run(folder), batch_size=1), name, origin)

    def describe(self) -> Answer:
        """Returns what the page shows of the run, and lets a person choose."""
        trained = self.predictor.trained
        return {
            "name": self.name,
            "folder": str(trained.folder),
            "model": trained.config.model.name,
            "params": self._params,
            "accuracy": self._accuracy,
            "size": trained.preprocess.size,
            "grey": trained.preprocess.channels == 1,
            "light_on_dark": sees_light_on_dark(trained),
            "classes": list(trained.class_names),
            "parents": list(trained.parent_names),
            "methods": list(self.methods),
            "imprints": self._imprints,
            "origin": self.origin,
        }

    def look(
        self,
        content: bytes,
        *,
        method: str = "auto",
        wanted: int | None = None,
        invert: str = "auto",
    ) -> Answer:
        """Returns what the model says of a picture, and which pixels speak for a class.

        Args:
          content: of an image file.
          method: one of `methods`, or "auto", the best.
          wanted: the class to explain; None: the likeliest.
          invert: "yes", "no" or "auto"; see `Predictor.inverts`.

        Raises:
          InputError: it is no picture that is taken, or there is no such method or class.
        """
        began = time.monotonic()
        trained = self.predictor.trained
        if wanted is not None and not 0 <= wanted < len(trained.class_names):
            raise InputError(f"there is no class number {wanted}; choose one of the list")
        check_picture(content)
        square, inverted = _decoded(self.predictor, content, invert)
        classes = None if wanted is None else np.array([wanted])
        with self._lock:
            predicted = self.predictor(square[None])
            explainer = self._explainer(method)
            maps = explainer(square[None], classes)
        order, shares = predicted.top_k(TOP)
        explained = int(maps.classes[0])
        photo, heat = _shown(content, maps.heat[0], trained.spec)
        answer: Answer = {
            "top": [
                {"class": int(k), "name": trained.class_names[k], "share": float(share)}
                for k, share in zip(order[0], shares[0], strict=True)
            ],
            "parents": [],
            "explained": {
                "class": explained,
                "name": trained.class_names[explained],
                "share": float(predicted.probabilities[0, explained]),
                "method": explainer.method,
                "nothing": not maps.heat.any(),
            },
            "inverted": inverted,
            "photo": address(photo),
            "overlay": address(overlay(photo, heat)),
            "square": address(square),
            "seconds": time.monotonic() - began,
        }
        if predicted.parent_probabilities is not None:
            parents = predicted.parent_probabilities[0]
            answer["parents"] = [
                {"name": trained.parent_names[k], "share": float(parents[k])}
                for k in np.argsort(-parents, kind="stable")[:TOP]
            ]
        return answer

    def warm_up(self) -> None:
        """Compiles what the first picture needs, which takes seconds."""
        p = self.predictor.trained.preprocess
        blank = np.zeros((1, p.size, p.size, p.channels), np.uint8)
        with self._lock:
            self.predictor(blank)
            self._explainer("auto")(blank)

    def example(self, content: bytes, *, invert: str = "auto") -> Answer:
        """Returns a picture as the model sees it, a PNG, which `examples` takes back."""
        check_picture(content)
        square, inverted = _decoded(self.predictor, content, invert)
        return {"square": address(square, lossless=True), "inverted": inverted}

    def examples(self, squares: Sequence[bytes]) -> np.ndarray:
        """Returns PNG files that `example` made as uint8 (M, S, S, C).

        Raises:
          InputError: there are too few or too many, or one is of another size.
        """
        check_count(len(squares))
        p = self.predictor.trained.preprocess
        spec = ImageSpec(p.size, p.channels)
        images = []
        for square in squares:
            if check_picture(square) != (p.size, p.size):
                raise InputError("an example photo was read for another run; choose it again")
            images.append(decode(square, spec))
        return np.stack(images)

    def _explainer(self, method: str) -> Explainer:
        if method not in ("auto", *METHODS):
            raise InputError(f"there is no method {method!r}; choose one of the list")
        trained = self.predictor.trained
        method = self.methods[0] if method == "auto" else method
        if method not in self._explainers:
            self._explainers[method] = Explainer(
                trained.model,
                trained.variables,
                trained.preprocess,
                method=method,
                dtype=trained.dtype,
                batch_size=1,
            )
        return self._explainers[method]


class Lesson(NamedTuple):
    """How far the teaching of a class is.

    Attributes:
      fraction: 0 to 1.
      doing: what is being done, in words.
      result: what came of it, or None.
      refused: why nothing came of it, or None.
    """

    fraction: float
    doing: str
    result: Answer | None = None
    refused: str | None = None

    @property
    def ended(self) -> bool:
        return self.result is not None or self.refused is not None


class Answers:
    """The runs on the page, which become more, and the one lesson that may be going on.

    Attributes:
      runs: in the order in which they came.
    """

    def __init__(self, runs: Sequence[ServedRun]):
        self.runs = list(runs)
        self._lessons: list[Lesson] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    @property
    def is_teaching(self) -> bool:
        return bool(self._lessons) and not self._lessons[-1].ended

    def warm_up(self) -> None:
        """Compiles what the first picture needs, for one run after the other, in a thread."""

        def all_of_them() -> None:
            for run in list(self.runs):
                with contextlib.suppress(InputError):  # which the first picture will show
                    run.warm_up()

        self._start(threading.Thread(target=all_of_them, daemon=True))

    @property
    def is_busy(self) -> bool:
        """Whether a thread of these is inside JAX."""
        return any(thread.is_alive() for thread in self._threads)

    def run(self, number: int) -> ServedRun:
        """Returns a run by its number.

        Raises:
          InputError: there is none.
        """
        if not 0 <= number < len(self.runs):
            raise InputError("the page has no such run; load the page again")
        return self.runs[number]

    def lesson(self, number: int) -> Lesson:
        """Returns how far a lesson is.

        Raises:
          InputError: there is none of that number.
        """
        if not 0 <= number < len(self._lessons):
            raise InputError("no class is being taught; load the page again")
        return self._lessons[number]

    def begin_lesson(
        self, run: int, name: str, squares: Sequence[bytes], *, method: str, parent: str | None
    ) -> int:
        """Begins to teach a run a class, in a thread, and returns the number of the lesson.

        Args:
          run: its number.
          name: of the new class.
          squares: example photos, as `ServedRun.example` returned them.
          method: "imprint" or "finetune".
          parent: of the new class; None where the classes have no parents.

        Raises:
          InputError: something of it does not fit, or another lesson is going on.
        """
        served = self.run(run)
        trained = served.predictor.trained
        name, parent = check_request(trained, name, method=method, parent=parent)
        examples = served.examples(squares)
        with self._lock:
            if self.is_teaching:
                raise InputError("a class is being taught already; wait until that is done")
            number = len(self._lessons)
            self._lessons.append(Lesson(0.0, "beginning"))
        arguments = (number, served, examples, name, method, parent)
        self._start(threading.Thread(target=self._teach, args=arguments, daemon=True))
        return number

    def _start(self, thread: threading.Thread) -> None:
        self._threads.append(thread)
        thread.start()

    def _teach(
        self,
        number: int,
        served: ServedRun,
        examples: np.ndarray,
        name: str,
        method: str,
        parent: str | None,
    ) -> None:
        def progress(fraction: float, doing: str) -> None:
            # A bar that goes back looks like one that begins again.
            done = max(self._lessons[number].fraction, 0.8 * fraction)
            self._lessons[number] = Lesson(done, doing)

        def looking(fraction: float, doing: str) -> None:
            self._lessons[number] = Lesson(0.8 + 0.12 * fraction, doing)

        trained = served.predictor.trained
        try:
            taught = teach(trained, examples, name, method=method, parent=parent, progress=progress)
            held_out = validation(trained, taught, progress=looking)
            self._lessons[number] = Lesson(0.92, "saving the new run")
            folder = save_taught(trained, taught, new_folder(trained.folder, name), examples)
            self._lessons[number] = Lesson(0.96, "reading the new run")
            learned = ServedRun.load(folder, folder.name, served.name)
            learned.warm_up()
            self.runs.append(learned)
            result = {**_told(taught, held_out), "run": len(self.runs) - 1, "folder": _near(folder)}
            self._lessons[number] = Lesson(1.0, "done", result=result)
        except InputError as error:
            self._lessons[number] = Lesson(1.0, "refused", refused=str(error))
        except Exception:
            traceback.print_exc()
            refused = (
                "the class could not be taught, by a mistake in flaxcls; its terminal says more"
            )
            self._lessons[number] = Lesson(1.0, "failed", refused=refused)


def check_picture(content: bytes) -> tuple[int, int]:
    """Returns width and height of an image file, from its first bytes, before it is decoded.

    Raises:
      InputError: it is none, or has more pixels than the page takes.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise InputError(f"the picture has {_TOO_MANY}") from error
    except Exception as error:  # Pillow's readers raise anything on what is no image.
        raise InputError(_no_picture(content)) from error
    if width * height > MOST_PIXELS:
        raise InputError(f"the picture has {width:,} x {height:,} pixels: {_TOO_MANY}")
    return width, height


_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_TOO_MANY = f"more than the {MOST_PIXELS // 10**6} million that the page takes; make it smaller"


def _no_picture(content: bytes) -> str:
    if not content:
        return "the file is empty (0 bytes); choose another"
    return "the file is no picture (JPEG, PNG, BMP, WebP, GIF, TIFF or PPM); choose another"


def _decoded(predictor: Predictor, content: bytes, invert: str) -> tuple[np.ndarray, bool]:
    try:
        return predictor.decode_noting(content, invert=invert)
    except UnreadableImage as error:
        raise InputError(_of_upload(content, error)) from error


def _of_upload(content: bytes, error: UnreadableImage) -> str:
    """Returns what is wrong with an upload, which has no path."""
    reason = str(error).removeprefix(f"an image of {len(content)} bytes ")
    return f"the picture {reason.removesuffix('; replace or remove it')}; choose another"


def _shown(content: bytes, heat: np.ndarray, spec: ImageSpec) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture in its own shape, and the map on it."""
    photo = decode_whole(content, longest=_LONGEST)
    height, width, _ = photo.shape
    size = scaled(width, height, least=_LEAST, longest=_LONGEST)
    return show_at(photo, *size), place_heat(heat, spec, *size)


def address(image: np.ndarray, *, lossless: bool = False) -> str:
    """Returns an image uint8 (H, W, C), C = 1 or 3, as an address that holds it (data:)."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    kind = "png" if lossless or max(picture.size) <= _LOSSLESS_SIDE else "jpeg"
    picture.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _imprints(trained: TrainedModel) -> bool:
    """Whether `imprint` can teach a model a class: its logits are those of one layer."""
    try:
        return len(head_of(trained).layers) == 1
    except InputError:  # which `teach` will say
        return True


def _summary(folder: Path) -> Answer:
    """Returns a run's summary; {} of one that is not finished."""
    try:
        return dict(read_summary(folder))
    except InputError:
        return {}


def new_folder(run: Path, name: str) -> Path:
    """Returns a folder beside the run for one that learned a class, of a name not in use."""
    folder = default_folder(run, name)
    names = itertools.chain([folder.name], (f"{folder.name}-{n}" for n in itertools.count(2)))
    return next(free for free in map(folder.with_name, names) if not os.path.lexists(free))


def _near(folder: Path) -> str:
    """Returns a folder as a person would type it: by its path from here, where it lies below."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _told(taught: Taught, held_out: Accuracy | None) -> Answer:
    """Returns what a person is told of a class that was taught."""
    accuracy = held_out or taught.exemplars
    changes: list[Answer] = [
        {"name": name, "before": before, "after": after}
        for name, before, after in zip(
            taught.class_names, accuracy.class_before, accuracy.class_after, strict=False
        )
        if after < before
    ]
    changes.sort(key=lambda change: change["after"] - change["before"])
    return {
        "name": taught.name,
        "method": taught.method,
        "before": accuracy.before,
        "after": accuracy.after,
        "images": accuracy.images,
        "held_out": held_out is not None,
        "lost": changes[:3],
        "recall": taught.recall,
        "examples": taught.examples,
        "seconds": taught.seconds,
    }
