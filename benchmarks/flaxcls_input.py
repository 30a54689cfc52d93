"""The peers of input_pipeline.py that feed with flaxcls, and what they are measured against.

python flaxcls_input.py files WORKERS DIR      # data.workers; 0: threads
python flaxcls_input.py bare THREADS DIR       # threads that decode, crop and resize
python flaxcls_input.py decoder NAME PART DIR  # NAME of DECODERS; PART: decode or all
python flaxcls_input.py arrays | device | gather
"""

import io
import itertools
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flaxcls import ops

ops.prepare_process()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import turns  # noqa: E402
from input_task import ARRAY_BATCH, ARRAYS, FILE_BATCH, MEAN, SIZE, STD  # noqa: E402
from PIL import Image  # noqa: E402

from flaxcls.augment import Augmentation, augment, draw_boxes  # noqa: E402
from flaxcls.batch import Batch, Preprocess  # noqa: E402
from flaxcls.data import loader  # noqa: E402
from flaxcls.data.dataset import Split  # noqa: E402
from flaxcls.data.decode import ImageSpec, decode  # noqa: E402
from flaxcls.data.load import load_dataset  # noqa: E402
from flaxcls.sharding import create_mesh  # noqa: E402

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

EPOCHS = 10**6


def files(workers: int, folder: str) -> Iterator[int]:
    """The feed of placement `files`, flipped and normalised on the device."""
    split = load_dataset("image_folder", folder).splits["train"]
    augmentation = Augmentation(random_resized_crop=True, horizontal_flip=0.5)

    def prepare(batch: Batch) -> jax.Array:
        return augment(
            batch,
            key=jax.random.key(0),
            epoch=0,
            augmentation=augmentation,
            preprocess=Preprocess(SIZE, 3, MEAN, STD),
            num_classes=int(split.labels.max()) + 1,
        )[0]

    compiled = jax.jit(prepare, compiler_options=ops.compiler_options())
    mesh = create_mesh(1)
    feed = loader.create_feed(
        split, mesh, ImageSpec(SIZE), placement="files", workers=workers, prefetch=2
    )
    order = loader.train_order(len(split), FILE_BATCH, epochs=EPOCHS, seed=0)
    with feed.train(order, augmentation) as batches:
        for _, batch in batches:
            compiled(batch).block_until_ready()
            yield FILE_BATCH


def bare(threads: int, folder: str) -> Iterator[int]:
    """Threads that keep nothing of what they decode, and are a batch ahead of their count."""
    split = load_dataset("image_folder", folder).splits["train"]
    boxes = draw_boxes(0, 0, np.arange(len(split)), np.asarray(split.aspect))
    order = np.random.default_rng(0).permutation(len(split)).tolist()
    wanted, done = queue.SimpleQueue[int](), queue.SimpleQueue[int]()

    def work() -> None:
        while True:
            i = wanted.get()
            done.put(decode(split.images[i], ImageSpec(SIZE), boxes[i]).size)

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    for i in itertools.islice(source := itertools.cycle(order), FILE_BATCH):
        wanted.put(i)
    for i in source:
        wanted.put(i)
        done.get()
        yield 1


def decoder(name: str, part: str, folder: str) -> Iterator[int]:
    """One decoder in one thread, from bytes in memory to RGB, or cropped and resized as well.

    Pillow and OpenCV resize with their own bilinear filters, of which OpenCV's does not average.
    """
    split = load_dataset("image_folder", folder).splits["train"]
    data = [Path(path).read_bytes() for path in split.images[::8]]
    aspect = np.asarray(split.aspect)[::8]
    boxes = draw_boxes(0, 0, np.arange(len(data)), aspect)

    def pillow(i: int) -> Any:
        return Image.open(io.BytesIO(data[i])).convert("RGB")

    def pillow_all(i: int) -> Any:
        image = pillow(i)
        box = _pixels(image.width, image.height, boxes[i])
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))

    def opencv(i: int) -> Any:
        return cv2.imdecode(np.frombuffer(data[i], np.uint8), cv2.IMREAD_COLOR_RGB)

    def opencv_all(i: int) -> Any:
        image = opencv(i)
        left, top, right, bottom = map(round, _pixels(image.shape[1], image.shape[0], boxes[i]))
        return cv2.resize(image[top : bottom + 1, left : right + 1], (SIZE, SIZE))

    functions: dict[tuple[str, str], Callable[[int], Any]] = {
        ("flaxcls", "decode"): lambda i: simplejpeg.decode_jpeg(data[i]),
        ("flaxcls", "all"): lambda i: decode(data[i], ImageSpec(SIZE), boxes[i]),
        ("Pillow", "decode"): pillow,
        ("Pillow", "all"): pillow_all,
        ("OpenCV", "decode"): opencv,
        ("OpenCV", "all"): opencv_all,
    }
    for i in itertools.cycle(range(len(data))):
        functions[name, part](i)
        yield 1


def _pixels(width: int, height: int, box: np.ndarray) -> tuple[float, float, float, float]:
    y, x, h, w = (float(value) for value in box)
    return x * width, y * height, min(width, (x + w) * width), min(height, (y + h) * height)


def arrays() -> tuple[Split, loader.TrainOrder]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, ARRAYS, np.uint8)
    split = Split(images, rng.integers(0, 10, len(images)).astype(np.int32))
    return split, loader.train_order(len(split), ARRAY_BATCH, epochs=EPOCHS, seed=0)


def host(to_device: bool) -> Iterator[int]:
    """The feed of placement `host`, up to NumPy arrays or up to the device."""
    split, order = arrays()
    mesh = create_mesh(1)
    feed = loader.create_feed(
        split, mesh, ImageSpec(28, 1), placement="host", workers=0, prefetch=2
    )
    if not to_device:
        for batch in feed.read_training(order, Augmentation()):
            yield len(batch.image)
    with feed.train(order, Augmentation()) as batches:
        for _, batch in batches:
            yield len(jax.block_until_ready(batch).image)


def gather() -> Iterator[int]:
    """NumPy's own gather of the same batches."""
    split, order = arrays()
    steps = [order[step]["index"] for step in range(order.steps_per_epoch)]
    for index in itertools.cycle(steps):
        images, labels = split.images[index], split.labels[index]
        yield min(len(images), len(labels))


def main(kind: str, *arguments: str) -> None:
    if kind == "files":
        workers = int(arguments[0])
        turns.serve(files(workers, arguments[1]), ahead=4 * workers + 4)
    elif kind == "bare":
        turns.serve(bare(int(arguments[0]), arguments[1]), ahead=FILE_BATCH)
    elif kind == "decoder":
        if arguments[0] == "OpenCV" and cv2 is None:
            sys.exit(0)
        turns.serve(decoder(*arguments))
    elif kind == "gather":
        turns.serve(gather())
    else:
        turns.serve(host(to_device=kind == "device"), ahead=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
