"""Batches of a split, read through Grain and moved to the devices ahead of their use.

One Grain element is one whole batch: for data in memory its examples are gathered at once (a
hundred times faster than Grain record by record), and its composition depends on the step alone,
so neither the number of workers nor an interruption changes it. The position in the data is
therefore the step: a run goes on at any step with any number of workers and any placement.
"""

import dataclasses
import functools
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from flaxcls.augment import Augmentation, draw_boxes
from flaxcls.batch import Batch
from flaxcls.data.dataset import Split
from flaxcls.data.decode import ImageSpec, count_cores, decode, in_threads
from flaxcls.data.shared_images import SharedImages, share_images
from flaxcls.data.splits import draw_order
from flaxcls.errors import InputError
from flaxcls.ops.allocator import is_tunable, keep_freed_memory
from flaxcls.sharding import put_batch, put_replicated
from flaxcls.step import Resident

# Grain frees an array's shared memory in one thread while the garbage collector may do so in
# another; the descriptor that the second closes can by then be a checkpoint's. Images come through
# SharedImages, and the little that goes with them through Grain's pipes.
_NO_SHARED_MEMORY = 2**62

# Which of the workers this process is.
_worker = 0


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """The examples of each training step: a Grain source whose element is a step.

    Attributes:
      size: examples in the split.
      batch_size: examples a step, over all processes.
      epochs: each is a permutation of its own; its last incomplete batch is dropped.
      seed: of the permutations.
      process: (index, count); a process gets its contiguous share of each batch.
    """

    size: int
    batch_size: int
    epochs: int
    seed: int
    process: tuple[int, int] = (0, 1)

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Returns {"index": int32 (n,), "epoch": int} for this process."""
        epoch, position = divmod(int(step), self.steps_per_epoch)
        start, stop = _share(self.batch_size, self.process)
        offset = position * self.batch_size
        index = _permutation(self.seed, epoch, self.size)[offset + start : offset + stop]
        return {"index": index, "epoch": epoch}


@dataclasses.dataclass(frozen=True)
class EvalOrder:
    """Every example once, in order; the last batch is filled up with masked repeats of the first.

    Attributes as in `TrainOrder`.
    """

    size: int
    batch_size: int
    process: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Returns {"index": int32 (n,), "mask": bool (n,)} for this process."""
        start, stop = _share(self.batch_size, self.process)
        index = np.arange(start, stop, dtype=np.int32) + int(step) * self.batch_size
        mask = index < self.size
        return {"index": np.where(mask, index, 0).astype(np.int32), "mask": mask}


def _share(batch_size: int, process: tuple[int, int]) -> tuple[int, int]:
    index, count = process
    return index * batch_size // count, (index + 1) * batch_size // count


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return draw_order(size, seed, f"epoch {epoch}").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Feed:
    """One split, ready to be read in batches.

    Attributes:
      split: its images are an array, or files that are decoded as they are read.
      mesh: where batches go.
      spec: how files become images.
      resident: the split's arrays on the device, or None where batches carry their images.
      workers: Grain processes that decode; 0 for threads of this one.
      prefetch: batches kept ready on the device.
    """

    split: Split
    mesh: Mesh
    spec: ImageSpec
    resident: Resident | None
    workers: int = 0
    prefetch: int = 2

    def train(
        self, order: TrainOrder, augmentation: Augmentation, *, start: int = 0, chunk: int = 1
    ) -> "DeviceIterator":
        """Returns an iterator of (number of steps, batch) from step `start` to the end.

        Args:
          order: which examples make up each step.
          augmentation: with random resized crops, batches carry their boxes.
          start: first step.
          chunk: steps to put into one batch of arrays (chunk, n, ...) where a whole chunk fits
            into the epoch; otherwise single steps.
        """
        sizes = _chunk_sizes(start, order, chunk)
        batches = self.read_training(order, augmentation, start=start)
        return DeviceIterator(batches, sizes, self.mesh, self.prefetch)

    def read_training(
        self, order: TrainOrder, augmentation: Augmentation, *, start: int = 0
    ) -> Iterator[Batch]:
        """Returns an iterator of the steps of `train` as batches of NumPy arrays."""
        fetch = _Fetch(
            self.split,
            self.spec,
            gathers=self.resident is None,
            seed=order.seed,
            augmentation=augmentation if augmentation.random_resized_crop else None,
        )
        return self._read(order, fetch, start)

    def evaluate(self, batch_size: int) -> "DeviceIterator":
        """Returns an iterator of (1, batch) that covers each example exactly once."""
        order = EvalOrder(len(self.split.labels), batch_size, _process())
        fetch = _Fetch(self.split, self.spec, gathers=self.resident is None)
        sizes = iter([1] * len(order))
        # Threads: processes would be started anew for each pass.
        threads = dataclasses.replace(self, workers=0)
        return DeviceIterator(threads._read(order, fetch, 0), sizes, self.mesh, self.prefetch)

    def _read(self, order: Any, fetch: "_Fetch", start: int) -> Iterator[Batch]:
        """Runs the order through Grain."""
        steps = grain.MapDataset.source(order)[start:].map(fetch)
        in_files = fetch.gathers and not isinstance(self.split.images, np.ndarray)
        fetch.threads = count_cores() if in_files and not self.workers else 1
        # DeviceIterator's thread gathers what is in memory: handing each batch over from a thread
        # of Grain's costs as much as its gather (36 us for 256 images of 28 x 28). Workers run
        # ahead by their queues.
        ahead = in_files and not self.workers
        read_options = grain.ReadOptions(
            num_threads=int(ahead), prefetch_buffer_size=self.prefetch if ahead else 0
        )
        batches = steps.to_iter_dataset(read_options)
        if in_files and self.workers:
            start, stop = _share(order.batch_size, order.process)
            shape = stop - start, self.spec.size, self.spec.size, self.spec.channels
            fetch.shared = share_images(self.workers, shape)
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its own; a library's user parses none
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=_NO_SHARED_MEMORY)
            batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2),
                worker_init_fn=_begin_work,
            )
        return iter(batches) if fetch.shared is None else _Received(iter(batches), fetch.shared)


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def train_order(size: int, batch_size: int, *, epochs: int, seed: int) -> TrainOrder:
    """Returns this process's order of a split's examples.

    Raises:
      InputError: the batch is larger than the split.
    """
    if batch_size > size:
        raise InputError(
            f"train.batch_size = {batch_size} is larger than the training split ({size} examples); "
            "lower it or give more data"
        )
    return TrainOrder(size, batch_size, epochs, seed, _process())


def create_feed(
    split: Split,
    mesh: Mesh,
    spec: ImageSpec,
    *,
    placement: str,
    workers: int,
    prefetch: int,
) -> Feed:
    """Puts a split where `placement` says: device, host or files.

    The split's images must be an array for `device` and `host`.
    """
    resident = None
    if placement == "device":
        arrays = {"image": split.images, "label": split.labels}
        resident = Resident(**put_replicated(arrays, mesh))
    return Feed(split, mesh, spec, resident, workers, prefetch)


class _Fetch:
    """Turns an order's element into a batch of NumPy arrays; a Grain transformation."""

    def __init__(
        self,
        split: Split,
        spec: ImageSpec,
        *,
        gathers: bool,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ):
        self.split = split
        self.spec = spec
        self.gathers = gathers
        self.seed = seed
        self.augmentation = augmentation
        self.threads = 1  # that decode the files of one batch together
        self.shared: SharedImages | None = None  # where workers leave what they decode

    def __call__(self, element: dict[str, Any]) -> Batch:
        index = element["index"]
        mask = element.get("mask", np.ones(len(index), bool))
        box = self._boxes(element)
        if not self.gathers:
            return Batch(image=None, label=None, mask=mask, index=index, box=box)
        images, labels = self.split.images, self.split.labels[index]
        if isinstance(images, np.ndarray):
            return Batch(image=images[index], label=labels, mask=mask, index=index, box=box)
        shape = len(index), self.spec.size, self.spec.size, self.spec.channels
        taken = None if self.shared is None else self.shared.take(_worker)
        slot, decoded = taken or (None, np.empty(shape, np.uint8))

        def put(row: int) -> None:
            decoded[row] = decode(images[index[row]], self.spec, None if box is None else box[row])

        if self.threads > 1:
            in_threads(put, range(len(index)), self.threads)
        else:
            for row in range(len(index)):
                put(row)
        return Batch(image=decoded if slot is None else slot, label=labels, mask=mask, index=index)

    def _boxes(self, element: dict[str, Any]) -> np.ndarray | None:
        if self.augmentation is None:
            return None
        index, aspect = element["index"], self.split.aspect
        return draw_boxes(
            self.seed,
            element["epoch"],
            index,
            np.ones(len(index), np.float32) if aspect is None else aspect[index],
            area=self.augmentation.crop_area,
            ratio=self.augmentation.crop_ratio,
        )


def _chunk_sizes(start: int, order: TrainOrder, chunk: int) -> Iterator[int]:
    step = start
    while step < len(order):
        position = step % order.steps_per_epoch
        whole = position % chunk == 0 and position + chunk <= order.steps_per_epoch
        yield chunk if whole else 1
        step += chunk if whole else 1


class _Received:
    """Batches of workers, with the images that they left in slots."""

    def __init__(self, batches: Any, shared: SharedImages):
        self._batches = batches
        self._shared = shared

    def __iter__(self) -> "_Received":
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._batches)
        if isinstance(batch.image, np.ndarray):
            return batch
        return batch.replace(image=self._shared.empty(batch.image))

    def close(self) -> None:
        self._shared.close()
        self._batches.close()


def _begin_work(worker: int, workers: int) -> None:
    """Tells a worker which it is, and ends it with its parent, for which it would wait for ever."""
    global _worker
    del workers
    _worker = worker
    if is_tunable():
        keep_freed_memory()  # each image takes some blocks that glibc would map and unmap
    threading.Thread(target=_die_with_the_parent, daemon=True).start()


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class DeviceIterator:
    """Moves batches to the devices in a thread of its own, a few ahead of their use.

    Iterating gives (number of steps, batch on the devices). An error in reading is raised where
    the batch would have come.
    """

    def __init__(self, batches: Iterator[Batch], sizes: Iterator[int], mesh: Mesh, depth: int):
        self._batches = batches
        self._sizes = sizes
        self._mesh = mesh
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="flaxcls-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "DeviceIterator":
        return self

    def __next__(self) -> tuple[int, Batch]:
        item = self._queue.get()
        if item is None:
            self._queue.put(None)
            raise StopIteration
        if isinstance(item, BaseException):
            self._queue.put(None)
            raise item
        return item

    @property
    def ready(self) -> bool:
        """Whether the next batch is on the devices already."""
        return not self._queue.empty()

    def close(self) -> None:
        """Stops reading; batches not taken yet are given up."""
        self._closed.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "DeviceIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        # Workers inherit this: what a whole process group is told is for the run to handle.
        resource_tracker.ensure_running()  # whose start would end it
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for size in self._sizes:
                if size == 1:
                    item = 1, put_batch(next(self._batches), self._mesh)
                else:
                    parts = [next(self._batches) for _ in range(size)]
                    stacked = jax.tree.map(lambda *xs: np.stack(xs), *parts)
                    item = size, put_batch(stacked, self._mesh, stacked=True)
                self._put(item)
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:  # handed to the thread that waits for the batch
            self._put(_explained(error))

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue


def _explained(error: BaseException) -> BaseException:
    """Says in one sentence what Grain means by a worker that was terminated unexpectedly."""
    if isinstance(error, RuntimeError) and str(error).startswith("Worker process was terminated"):
        code = re.search(r"-?\d+", str(error))
        return InputError(
            f"data.workers: a process that decodes files died (exit code "
            f"{code.group() if code else 'unknown'}; -9 is often a lack of memory); lower "
            "data.workers or train.batch_size, then run the same command to resume"
        )
    return error


def choose_placement(
    requested: str,
    *,
    bytes_needed: int,
    device_bytes: int,
    host_bytes: int,
    in_files: bool,
    crops_files: bool = False,
    describe: Callable[[int], str],
) -> tuple[str, str]:
    """Picks device, host or files, and says why in one sentence.

    Args:
      requested: `data.placement`; other than `auto` it is taken as it is.
      bytes_needed: of all splits at their stored size.
      device_bytes: free memory of one device.
      host_bytes: free memory of the host.
      in_files: the source's images are files, so that they can be streamed.
      crops_files: whether training cuts random crops from files, which copies would blur.
      describe: bytes to words.

    Raises:
      InputError: `files` for data that are not in files.
    """
    needed = describe(bytes_needed)
    if requested == "files" and not in_files:
        raise InputError(
            "data.placement: 'files' needs a source of image files; "
            "set device or host for data that are arrays"
        )
    if requested != "auto":
        return requested, f"data: placement {requested} as set ({needed})"
    if crops_files:
        return "files", "data: placement files (random crops are cut from the images as they are)"
    if bytes_needed <= device_bytes // 4:
        return "device", f"data: placement device ({needed} fit into a quarter of its free memory)"
    if bytes_needed <= host_bytes // 2 or not in_files:
        return "host", f"data: placement host ({needed} are too much for the device)"
    return "files", f"data: placement files ({needed} are too much for half of the free memory)"
