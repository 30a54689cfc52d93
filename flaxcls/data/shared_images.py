"""Memory through which worker processes hand over decoded images."""

import mmap
import os
import time
from math import prod
from typing import Any

import numpy as np

# Of a worker: one that it fills, two that wait in Grain's queue, one that the parent copies.
_SLOTS = 4
_CLOSED = -1  # the flag of the whole


class SharedImages:
    """Slots for batches of images, which workers fill and their parent empties.

    Through a pipe an image of 224 px costs 200 us of CPU, half as much as decoding it; through
    here, 45. The memory has no name, so that nothing is left behind whoever is killed, and is none
    of /dev/shm's, of which Docker gives 64 MB. Pickled, it is the way to that memory; a worker to
    which the system does not open it has no slots.

    A worker uses slots of its own in turn, and waits until the parent has emptied the next one:
    however far anyone reads ahead, nothing is overwritten.
    """

    def __init__(self, workers: int, shape: tuple[int, ...]):
        """shape: of a batch, (n, height, width, channels), uint8."""
        self._workers, self._shape = workers, shape
        self._file = os.memfd_create("flaxcls-images")
        # A byte for each slot, 1 while it is in use, follows them and a byte for the whole. System
        # calls read and write it, which keeps its order with the images' on every processor.
        os.ftruncate(self._file, self._place(workers * _SLOTS))
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        return {"workers": self._workers, "shape": self._shape, "path": path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._workers, self._shape, self._taken = state["workers"], state["shape"], 0
        self._images: np.ndarray | None = None
        try:
            self._file = os.open(state["path"], os.O_RDWR)
        except OSError:  # processes may be hidden from each other
            return
        self._map()

    def take(self, worker: int) -> tuple[int, np.ndarray] | None:
        """Returns the number and the images of this worker's next slot, once it is empty.

        None where the system keeps the memory from the worker.
        """
        if self._images is None:
            return None
        slot = worker * _SLOTS + self._taken % _SLOTS
        self._taken += 1
        while self._is_set(slot) and not self._is_set(_CLOSED):
            time.sleep(0.005)  # three more batches of its are on their way
        self._set(slot, True)
        return slot, self._images[slot]

    def empty(self, slot: int) -> np.ndarray:
        """Returns a copy of a slot's images, and gives the slot back to its worker."""
        assert self._images is not None
        images = self._images[slot].copy()
        self._set(slot, False)
        return images

    def close(self) -> None:
        """Lets go of the memory, and of the workers that wait for a slot."""
        self._set(_CLOSED, True)
        self._images = None
        self._memory.close()
        os.close(self._file)

    def _place(self, flag: int) -> int:
        return self._workers * _SLOTS * prod(self._shape) + 1 + flag

    def _is_set(self, flag: int) -> bool:
        return os.pread(self._file, 1, self._place(flag)) == b"\1"

    def _set(self, flag: int, value: bool) -> None:
        os.pwrite(self._file, bytes([value]), self._place(flag))

    def _map(self) -> None:
        count = self._workers * _SLOTS
        self._memory = mmap.mmap(self._file, self._place(count))
        pixels = np.frombuffer(self._memory, np.uint8, count * prod(self._shape))
        self._images = pixels.reshape(count, *self._shape)


def share_images(workers: int, shape: tuple[int, ...]) -> SharedImages | None:
    """Returns slots for so many workers, or None where the system is not Linux."""
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return None
    return SharedImages(workers, shape)
