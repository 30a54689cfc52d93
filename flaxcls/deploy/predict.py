"""Prediction of images, videos and what a camera sees, by a trained run, into a folder of results.

`--mode=predict` writes `predictions.csv` and `predictions.json` and, with `--explain`, what decided
into `overlays/`; of a video and a camera it writes a copy with what the model says of each frame.
All of it lies in RUN/predict/NAME, NAME being what was given and, where that has results already,
NAME-2 and so on, or in `--output`, which must be new or empty: no result takes another's place.
"""

import contextlib
import dataclasses
import io
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path, PurePath
from typing import NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flaxcls import runlog
from flaxcls.analysis.explain import METHODS, Explainer, place_heat
from flaxcls.data.decode import UnreadableImage, count_cores, decode_whole
from flaxcls.deploy import tables, video
from flaxcls.deploy.counter import Counter, say
from flaxcls.deploy.inputs import Inputs, Photo, find_inputs, shown
from flaxcls.deploy.pictures import picture, scaled, show_at
from flaxcls.deploy.predictor import INVERT, Predictor
from flaxcls.deploy.records import Clip, Failure, Seen, box_of, seen_of, write_records
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError, did_you_mean

# Activations of vgg13 at 224 px take 50 MB an image: a folder of photos is predicted in 1.5 GB.
_BATCH, _BATCH_PIXELS = 32, 16 * 224 * 224
# Sides of an overlay, pixels: one sees a digit of 8 pixels, and thousands of photos fit on a disk.
_LEAST, _LONGEST = 256, 1024
_QUALITY = 90  # of its JPEG

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Results(NamedTuple):
    """What was predicted, in the order in which it was named.

    Attributes:
      photos: (path, what is said of it) of the image files that could be read.
      clips: the videos and cameras.
      failures: what could not be read.
    """

    photos: list[tuple[str, Seen]]
    clips: list[Clip]
    failures: list[Failure]


def predict_run(
    config: ConfigDict,
    workdir: Path,
    inputs: Sequence[str],
    *,
    output: str | None = None,
    top_k: int = 5,
    explain: str | None = None,
    invert: str = "auto",
) -> Path:
    """Predicts what `--input` names, shows it, and returns the folder of results.

    What cannot be read is listed with the reason, and the rest predicted. Ctrl-C is how a camera
    ends; elsewhere what was predicted until then is written, and the exit code is 130.

    Args:
      config: resolved, of the run.
      workdir: the run folder.
      inputs: images, folders, patterns, videos and cameras; see `inputs.find_inputs`.
      output: the folder of results, which must be new or empty; None: one in the run folder.
      top_k: how many classes are told.
      explain: the method of the heat maps, or "auto" for the best one; None draws none.
      invert: "yes", "no" or "auto"; see `Predictor.inverts`.

    Raises:
      InputError: nothing could be read, or an argument is wrong.
    """
    _check(top_k, explain, invert)
    found = find_inputs(inputs)
    trained = load_run(workdir, config)
    predictor = Predictor(trained, batch_size=batch_size(trained, len(found.photos)))
    del trained  # and with it the host's copy of the weights
    explainer = None if explain is None else create_explainer(predictor, explain)
    top_k = min(top_k, len(predictor.trained.class_names))
    folder = _output_folder(predictor.trained.folder, found.name, output)
    for note in found.notes:
        say(note)
    try:
        with video.Stop() as stop:
            results = _predict_all(
                predictor, explainer, found, folder, top_k=top_k, invert=invert, stop=stop
            )
        if not results.photos and not results.clips:
            raise _nothing(results.failures)
        method = None if explainer is None else explainer.method
        write_records(folder, predictor.trained, *results, top_k=top_k, method=method)
    except BaseException:
        with contextlib.suppress(OSError):  # It holds overlays, which stay.
            folder.rmdir()
        raise
    _show(predictor.trained, results, folder, method, invert)
    if stop and not found.cameras:
        say("stopped by SIGINT; what was predicted until then is kept")
        raise SystemExit(128 + signal.SIGINT)
    return folder


def predict_photos(
    predictor: Predictor,
    photos: Sequence[Photo],
    *,
    top_k: int = 5,
    invert: str = "auto",
    explainer: Explainer | None = None,
    overlays: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_done: Callable[[int], None] = lambda count: None,
) -> tuple[list[tuple[str, Seen]], list[Failure]]:
    """Predicts image files, decoding ahead of the model in threads, of which memory holds a few.

    Args:
      predictor: of the run.
      photos: the files.
      top_k: how many classes are kept.
      invert: "yes", "no" or "auto"; see `Predictor.inverts`.
      explainer: of the same model, for what decided; None: that is not asked for.
      overlays: the folder of the pictures of what decided.
      stop: true as soon as it is to end.
      on_done: called with the number of files that are done, more and more of them.

    Returns:
      What is said of each file, in their order, and those that could not be read.
    """
    seen: list[tuple[str, Seen]] = []
    failures: list[Failure] = []
    names = _overlay_names(photos) if explainer is not None else None
    drawing: deque[tuple[str, Future[Seen]]] = deque()
    with _pool() as pool:
        decode = partial(_decode, predictor, invert=invert)
        decoded = _ahead(pool, decode, photos, 2 * predictor.batch_size)
        for batch in _in_batches(decoded, predictor.batch_size, stop):
            readable = [one for one in batch if not isinstance(one, Failure)]
            failures += [one for one in batch if isinstance(one, Failure)]
            if readable:
                images = np.stack([one.image for one in readable])
                predicted, heats = video.look(predictor, explainer, images)
                said = seen_of(predicted, top_k, [one.inverted for one in readable])
                for i, one in enumerate(readable):
                    if heats is None or names is None or overlays is None:
                        seen.append((one.photo.path, said[i]))
                        continue
                    draw = partial(_draw, predictor.trained, one.photo, said[i], heats[i])
                    drawing.append((one.photo.path, pool.submit(draw, overlays, names[one.photo])))
                _collect(drawing, seen, most=predictor.batch_size)
            on_done(len(batch))
        _collect(drawing, seen, most=0)
    return seen, failures


def create_explainer(predictor: Predictor, method: str) -> Explainer:
    """Returns the explainer of a predictor's model.

    Raises:
      InputError: the model has no such method.
    """
    trained = predictor.trained
    return Explainer(
        trained.model,
        trained.variables,
        trained.preprocess,
        method=method,
        dtype=trained.dtype,
        batch_size=predictor.batch_size,
    )


def batch_size(trained: TrainedModel, images: int) -> int:
    """Returns how many images a step takes: a power of two, of which there are few to compile."""
    most = max(1, min(_BATCH, _BATCH_PIXELS // trained.preprocess.size**2))
    wanted = min(most, images) if images else most
    return 1 << (wanted - 1).bit_length() if wanted < most else 1 << (most.bit_length() - 1)


def _check(top_k: int, explain: str | None, invert: str) -> None:
    """Refuses arguments before anything is read."""
    if top_k < 1:
        raise InputError(f"--top_k: {top_k} classes cannot be shown; give at least 1")
    if invert not in INVERT:
        raise InputError(f"--invert: {invert!r} is none of them; {did_you_mean(invert, INVERT)}")
    known = ("auto", *METHODS)
    if explain is not None and explain not in known:
        raise InputError(
            f"--explain: there is no method {explain!r}; {did_you_mean(explain, known)}"
        )


def _output_folder(run: Path, name: str, output: str | None) -> Path:
    """Makes the folder of results, where nothing is yet."""
    try:
        if output is None:
            (run / "predict").mkdir(exist_ok=True)
            for number in count(1):
                folder = run / "predict" / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    return folder
        folder = Path(str(output))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(
                f"--output: '{folder}' is not empty, and no result is to take another's place; "
                "give a new folder"
            )
        return folder
    except (FileExistsError, NotADirectoryError) as error:
        place = f"'{run / 'predict'}'" if output is None else f"'{output}'"
        raise InputError(
            f"--output: {place} is a file, or in one; give a new folder as --output"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot write '{error.filename}': {error.strerror}; give a folder that may be "
            "written as --output"
        ) from error


def _predict_all(
    predictor: Predictor,
    explainer: Explainer | None,
    found: Inputs,
    folder: Path,
    *,
    top_k: int,
    invert: str,
    stop: video.Stop,
) -> Results:
    results = Results([], [], [])
    if found.photos:
        with Counter("images", len(found.photos)) as counter:
            photos, failures = predict_photos(
                predictor,
                found.photos,
                top_k=top_k,
                invert=invert,
                explainer=explainer,
                overlays=folder / "overlays",
                stop=lambda: bool(stop),
                on_done=counter.add,
            )
        results.photos.extend(photos)
        results.failures.extend(failures)
    sources = [(path, partial(video.open_file, path)) for path in found.videos]
    sources += [(f"camera {n}", partial(video.open_camera, n)) for n in found.cameras]
    taken: set[str] = set()
    for name, open_source in sources:
        if stop:
            break
        try:
            frames = open_source()
        except InputError as error:
            results.failures.append(Failure(name, _reason(error, name)))
            continue
        with frames:
            if frames.live:
                say(f"{name}: {frames.width} x {frames.height}; Ctrl-C ends it")
            stem = _free_name(PurePath(name).stem, taken)
            target = folder / f"{stem}.mp4"
            results.clips.append(
                video.annotate(
                    predictor, explainer, frames, target, top_k=top_k, invert=invert, stop=stop
                )
            )
    return results


class _Decoded(NamedTuple):
    photo: Photo
    image: np.ndarray
    inverted: bool


def _decode(predictor: Predictor, photo: Photo, *, invert: str) -> _Decoded | Failure:
    try:
        return _Decoded(photo, *predictor.decode_noting(photo.path, invert=invert))
    except UnreadableImage as error:
        return Failure(photo.path, _reason(error, photo.path))


def _reason(error: InputError, name: str) -> str:
    """Returns what an error says of a file, without its name."""
    said = str(error)
    for kind in (f"image '{name}' ", f"video {shown(name)} ", f"{name} "):
        said = said.removeprefix(kind)
    return said.removesuffix("; replace or remove it")


def _nothing(failures: Sequence[Failure]) -> InputError:
    """Returns what to raise where nothing could be read."""
    said = [f"{shown(failure.file)} {failure.reason}" for failure in failures[:3]]
    more = f", and {len(failures) - 3} more" if len(failures) > 3 else ""
    remedy = "" if ";" in said[-1] else "; give a file that can be read"
    return InputError(f"--input: nothing could be read: {', '.join(said)}{more}{remedy}")


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, one a CPU; what has not begun is dropped where an error ends it."""
    pool = ThreadPoolExecutor(count_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    most: int,
) -> Iterator[_Result]:
    """Yields function(item) in order, computed by the pool, at most so many ahead."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _in_batches(
    items: Iterator[_Item], size: int, stop: Callable[[], bool]
) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
            if stop():
                return
    if batch:
        yield batch


def _collect(
    drawing: deque[tuple[str, Future[Seen]]], seen: list[tuple[str, Seen]], *, most: int
) -> None:
    """Takes what was drawn until at most so many are not."""
    while len(drawing) > most:
        path, future = drawing.popleft()
        seen.append((path, future.result()))


def _draw(
    trained: TrainedModel, photo: Photo, seen: Seen, heat: np.ndarray, folder: Path, name: str
) -> Seen:
    """Writes the picture of what decided, and returns what is said with its place and the box."""
    try:
        image = decode_whole(photo.path, longest=_LONGEST)
    except UnreadableImage:  # removed since it was predicted
        return seen
    height, width, _ = image.shape
    size = scaled(width, height, least=_LEAST, longest=_LONGEST)
    placed = place_heat(heat, trained.spec, *size)
    drawn, box = picture(show_at(image, *size), video.describe(trained, seen), placed)
    content = io.BytesIO()
    Image.fromarray(drawn).save(content, "JPEG", quality=_QUALITY)
    runlog.write_bytes(folder / name, content.getvalue())
    return dataclasses.replace(
        seen, box=box_of(box, *size), overlay=os.path.join(folder.name, name)
    )


def _overlay_names(photos: Sequence[Photo]) -> dict[Photo, str]:
    """Returns the file of each image's overlay: its place in its folder, no two alike."""
    taken: set[str] = set()
    names = {}
    for photo in photos:
        parts = PurePath(photo.place).with_suffix("").parts
        kept = [_plain_name(part) for part in parts]
        names[photo] = f"{_free_name('/'.join(kept), taken)}.jpg"
    return names


def _plain_name(part: str) -> str:
    """Returns the name of a file or folder as one that any file system takes, and no other place's.

    80 characters of 4 bytes leave room for a number and an extension in 255 bytes.
    """
    plain = re.sub(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"/\\|?*]', "_", part)[-60:].strip(" .")
    return plain or "_"


def _free_name(name: str, taken: set[str]) -> str:
    """Returns the name, or with a number where it is taken, by one in other capitals too."""
    name = "/".join(_plain_name(part) for part in name.split("/"))
    free = next(
        one
        for one in (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
        if one.casefold() not in taken
    )
    taken.add(free.casefold())
    return free


def _show(
    trained: TrainedModel, results: Results, folder: Path, method: str | None, invert: str
) -> None:
    """Says what was predicted, and where the files are."""
    if results.photos:
        for content in tables.of_photos(trained, results.photos):
            say(content)
    for clip in results.clips:
        for content in tables.of_clip(trained, clip):
            say(content)
    for content in tables.of_failures(results.failures):
        say(content)
    if invert == "auto":
        _say_inverted(results)
    where = [f"predictions.csv and predictions.json are in {shown(str(folder))}"]
    if method is not None and results.photos:
        where.append(f"what decided, by {method}, in its folder overlays")
    where += [
        f"the annotated {clip.file} is {shown(str(folder / clip.annotated))}"
        for clip in results.clips
    ]
    say("; ".join(where))


def _say_inverted(results: Results) -> None:
    """Says of how many images light and dark were swapped, and why."""
    everything = [seen for _, seen in results.photos]
    everything += [seen for clip in results.clips for seen in clip.frames]
    swapped = sum(seen.inverted for seen in everything)
    if not swapped:
        return
    which = "the input is"
    if swapped < len(everything):
        which = f"{swapped} of {len(everything)} images {'is' if swapped == 1 else 'are'}"
    say(
        f"{which} dark on light, and the run was trained on light on dark: light and dark were "
        "swapped (--invert=no leaves them)"
    )
