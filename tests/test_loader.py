"""Batches: every example once a pass, the same for any placement, worker count and start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import jax
import numpy as np
import pytest
from PIL import Image

from flaxcls.augment import Augmentation
from flaxcls.data import loader
from flaxcls.data.dataset import Split
from flaxcls.data.decode import ImageSpec
from flaxcls.data.shared_images import SharedImages
from flaxcls.errors import InputError
from flaxcls.sharding import create_mesh
from flaxcls.step import gather

N, SIZE, BATCH = 23, 8, 5
SPEC = ImageSpec(SIZE, 3)
PLAIN, CROPS = Augmentation(), Augmentation(random_resized_crop=True)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return Split(
        images=rng.integers(0, 256, (N, SIZE, SIZE, 3), np.uint8),
        labels=rng.integers(0, 4, N).astype(np.int32),
    )


@pytest.fixture
def files(arrays, tmp_path):
    """The same images as files, without loss."""
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(N))
    for path, image in zip(paths, arrays.images, strict=True):
        Image.fromarray(image).save(path)
    return Split(paths, arrays.labels, aspect=np.ones(N, np.float32))


def make_feed(split, placement, *, workers=0, prefetch=2):
    return loader.create_feed(
        split, create_mesh(1), SPEC, placement=placement, workers=workers, prefetch=prefetch
    )


def make_order(epochs=2):
    return loader.train_order(N, BATCH, epochs=epochs, seed=7)


def read(feed, iterator):
    """All (count, batch) of an iterator, on the host, with images and labels filled in."""
    with iterator:
        return [(count, jax.device_get(gather(batch, feed.resident))) for count, batch in iterator]


def read_training(feed, augmentation=PLAIN, **options):
    return read(feed, feed.train(make_order(), augmentation, **options))


def assert_same(a, b):
    assert len(a) == len(b)
    for (count, batch), (other_count, other) in zip(a, b, strict=True):
        assert count == other_count
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_an_epoch_is_a_permutation_less_its_incomplete_batch():
    order = make_order(epochs=3)
    assert order.steps_per_epoch == N // BATCH
    assert len(order) == 3 * order.steps_per_epoch
    epochs = []
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        elements = [order[step] for step in range(first, first + order.steps_per_epoch)]
        assert {element["epoch"] for element in elements} == {epoch}
        index = np.concatenate([element["index"] for element in elements])
        assert index.dtype == np.int32
        assert len(set(index)) == len(index) == N - N % BATCH
        assert index.min() >= 0
        assert index.max() < N
        epochs.append(index)
    assert len({tuple(index) for index in epochs}) == 3
    # What one epoch drops another one takes.
    assert set(np.concatenate(epochs)) == set(range(N))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_out_each_batch(count):
    whole = make_order()
    shares = [
        loader.TrainOrder(N, BATCH, 2, 7, process=(process, count)) for process in range(count)
    ]
    for step in range(len(whole)):
        parts = [share[step]["index"] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), whole[step]["index"])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("size", [1, 9, 12, N])
def test_evaluation_covers_each_example_once(size, processes):
    orders = [loader.EvalOrder(size, 6, process=(p, processes)) for p in range(processes)]
    assert len(orders[0]) == -(-size // 6)
    seen = []
    for step in range(len(orders[0])):
        elements = [order[step] for order in orders]
        assert [len(element["index"]) for element in elements] == [6 // processes] * processes
        for element in elements:
            assert element["index"].min() >= 0
            assert element["index"].max() < size  # padding repeats a real example
            seen.extend(element["index"][element["mask"]])
    assert seen == list(range(size))


@pytest.mark.parametrize("placement", ["device", "host", "files"])
def test_an_evaluated_split_comes_whole_and_in_order(placement, arrays, files):
    feed = make_feed(files if placement == "files" else arrays, placement)
    batches = [batch for _, batch in read(feed, feed.evaluate(BATCH))]
    mask = np.concatenate([batch.mask for batch in batches])
    assert mask.sum() == N
    for name, expected in (("image", arrays.images), ("label", arrays.labels)):
        values = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(values[mask], expected)


def test_no_worker_is_started_to_evaluate(files):
    feed = make_feed(files, "files", workers=1)
    with feed.evaluate(BATCH) as batches:
        next(batches)
        assert not multiprocessing.active_children()


def test_every_placement_gives_the_same_batches(arrays, files):
    device, host, streamed = (
        read_training(make_feed(split, placement))
        for split, placement in ((arrays, "device"), (arrays, "host"), (files, "files"))
    )
    assert_same(device, host)
    assert_same(host, streamed)


def test_crop_boxes_travel_where_the_device_crops(arrays, files):
    device, host, streamed = (
        read_training(make_feed(split, placement), CROPS)
        for split, placement in ((arrays, "device"), (arrays, "host"), (files, "files"))
    )
    assert_same(device, host)
    assert all(batch.box.shape == (BATCH, 4) for _, batch in host)
    assert all(batch.box is None for _, batch in streamed), "files are cropped while they are read"
    changed = [(a.image != b.image).any() for (_, a), (_, b) in zip(host, streamed, strict=True)]
    assert all(changed)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers, files, monkeypatch):
    # Nor do they use shared memory, which Grain may close twice, the second time another's file.
    monkeypatch.delattr(shared_memory.SharedMemory, "__init__")
    assert_same(
        read_training(make_feed(files, "files", workers=workers), CROPS),
        read_training(make_feed(files, "files"), CROPS),
    )


@pytest.mark.parametrize("obstacle", ["another system", "memory of another user"])
def test_images_come_through_pipes_where_memory_cannot_be_shared(obstacle, files, monkeypatch):
    expected = read_training(make_feed(files, "files"), CROPS)
    if obstacle == "another system":
        monkeypatch.setattr(loader, "share_images", lambda *_: None)
    else:
        state = {"workers": 1, "shape": (BATCH, SIZE, SIZE, 3), "path": "/proc/none/fd/3"}
        monkeypatch.setattr(SharedImages, "__getstate__", lambda self: state)
    assert_same(read_training(make_feed(files, "files", workers=1), CROPS), expected)


@pytest.mark.parametrize("placement", ["device", "host", "files"])
def test_a_run_goes_on_at_any_step(placement, arrays, files):
    feed = make_feed(files if placement == "files" else arrays, placement)
    whole = read_training(feed, CROPS)
    for start in range(0, len(whole) + 1, 3):
        assert_same(read_training(feed, CROPS, start=start), whole[start:])


@pytest.mark.parametrize(
    ("chunk", "start", "expected"),
    [
        (1, 0, [1] * 8),
        (2, 0, [2, 2, 2, 2]),
        (3, 0, [3, 1, 3, 1]),
        (3, 2, [1, 1, 3, 1]),  # single steps up to the next chunk of an uninterrupted run
        (3, 3, [1, 3, 1]),
        (9, 0, [1] * 8),
    ],
)
def test_chunks_hold_the_same_steps_and_never_cross_an_epoch(chunk, start, expected, arrays):
    feed = make_feed(arrays, "host")
    batches = read_training(feed, start=start, chunk=chunk)
    assert [count for count, _ in batches] == expected
    steps = []
    for count, batch in batches:
        assert batch.image.shape == (count,) * (count > 1) + (BATCH, SIZE, SIZE, 3)
        for i in range(count):
            part = batch if count == 1 else jax.tree.map(lambda x, i=i: x[i], batch)
            steps.append((1, part))
    assert_same(steps, read_training(feed, start=start))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_named_where_its_batch_would_have_come(workers, files):
    bad = files.images[make_order()[1]["index"][2]]  # in the second batch
    with open(bad, "rb+") as file:
        file.truncate(os.path.getsize(bad) // 2)
    feed = make_feed(files, "files", workers=workers)
    with feed.train(make_order(), PLAIN) as batches:
        next(batches)
        with pytest.raises(InputError) as raised:
            list(batches)
        assert str(raised.value).count(bad) == 1
        assert "\n" not in str(raised.value)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_worker_that_dies_is_told_in_one_sentence(files):
    feed = make_feed(files, "files", workers=1)
    with feed.train(make_order(epochs=1000), PLAIN) as batches:
        next(batches)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(InputError, match=r"data\.workers: .* died \(exit code -9;"):
            list(batches)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_epochs(workers, tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
        paths.append(str(tmp_path / f"{i}.{'png' if i % 8 == 0 else 'jpg'}"))
        coarse.resize((300, 200)).save(paths[-1])
    split = Split(tuple(paths), np.zeros(24, np.int32), aspect=np.full(24, 1.5, np.float32))
    feed = loader.create_feed(
        split, create_mesh(1), ImageSpec(224), placement="files", workers=workers, prefetch=2
    )
    order = loader.train_order(24, 8, epochs=1000, seed=0)
    sizes = []
    with feed.train(order, CROPS) as batches:
        for step in range(151):
            next(batches)
            if step in (50, 100, 150):  # a batch has 1.2 MB
                pids = ["self", *(child.pid for child in multiprocessing.active_children())]
                sizes.append(sum(map(_resident, pids)))
    assert sizes[2] - sizes[0] < 12 << 20


def _resident(pid):
    """Bytes of memory that a process has."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("workers", [0, 1])
def test_closing_early_leaves_no_thread_and_no_process(workers, files):
    feed = make_feed(files, "files", workers=workers)
    before = set(threading.enumerate())
    with feed.train(make_order(epochs=1000), PLAIN) as batches:
        next(batches)
    assert not multiprocessing.active_children()
    _wait_until(lambda: not _reading(set(threading.enumerate()) - before))
    if os.path.isdir("/proc/self/fd"):
        opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [path for path in opened if "flaxcls-images" in path]


def _reading(threads):
    return [t.name for t in threads if t.name.startswith(("flaxcls", "grain"))]


def _wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.05)


READS_WITH_A_WORKER = """
import multiprocessing, sys, time
import numpy as np
from flaxcls.augment import Augmentation
from flaxcls.data import loader
from flaxcls.data.dataset import Split
from flaxcls.data.decode import ImageSpec
from flaxcls.sharding import create_mesh

if __name__ == "__main__":
    split = Split(tuple(sys.argv[1:]), np.zeros(len(sys.argv) - 1, np.int32))
    feed = loader.create_feed(
        split, create_mesh(1), ImageSpec(8), placement="files", workers=1, prefetch=2
    )
    order = loader.train_order(len(split), 2, epochs=10**6, seed=0)
    with feed.train(order, Augmentation()) as batches:
        next(batches)
        print(multiprocessing.active_children()[0].pid, flush=True)
        for _ in batches:
            time.sleep(0.01)
"""


def test_a_worker_outlives_a_signal_to_the_group_but_not_its_parent(files, tmp_path):
    program = tmp_path / "reads.py"
    program.write_text(READS_WITH_A_WORKER)
    command = [sys.executable, program, *files.images]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as parent:
        try:
            worker = int(parent.stdout.readline())
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker, number)
            time.sleep(0.5)
            assert _runs(worker), "the parent had need of it for its last step"
        finally:
            parent.kill()
    _wait_until(lambda: not _runs(worker))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(InputError, match=r"batch_size = 24 .*\(23 examples\)"):
        loader.train_order(N, N + 1, epochs=1, seed=0)


@pytest.mark.parametrize(
    ("requested", "needed", "in_files", "expected"),
    [
        ("auto", 25, True, "device"),
        ("auto", 26, True, "host"),
        ("auto", 101, True, "files"),
        ("auto", 101, False, "host"),  # arrays are in memory already
        ("host", 1, True, "host"),
        ("files", 1, True, "files"),
    ],
)
def test_the_placement_is_chosen_by_size(requested, needed, in_files, expected):
    placement, sentence = loader.choose_placement(
        requested,
        bytes_needed=needed,
        device_bytes=100,
        host_bytes=200,
        in_files=in_files,
        describe=lambda count: f"{count} B",
    )
    assert placement == expected
    assert f"{needed} B" in sentence


def test_arrays_cannot_be_streamed():
    with pytest.raises(InputError, match=r"data\.placement"):
        loader.choose_placement(
            "files", bytes_needed=1, device_bytes=1, host_bytes=1, in_files=False, describe=str
        )
