"""A run that was interrupted, however and wherever, ends as one that was not."""

import random
import shlex
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_runs import Workplace, assert_close, history, saved_steps, state, summary

EVERYTHING = (
    "--config.augment.horizontal_flip=0.5",
    "--config.augment.crop_padding=1",
    "--config.augment.erasing=0.5",
    "--config.augment.mixup=0.2",
    "--config.optimizer.ema_decay=0.9",
    "--config.checkpoint.every_steps=3",
)

RUNS = {
    # Several steps a call, and a learning rate that depends on the metric history.
    "device": (
        "--config=small.py",
        "--config.data.placement=device",
        "--config.train.steps_per_call=2",
        "--config.schedule.name=plateau",
        "--config.schedule.patience=0",
        "--config.schedule.factor=0.5",
        *EVERYTHING,
    ),
    # Micro-batches, moments in the optimizer, and no checkpoint to spare.
    "host": (
        "--config=small.py",
        "--config.data.placement=host",
        "--config.optimizer.name=adam",
        "--config.optimizer.learning_rate=0.003",
        "--config.optimizer.accumulate=2",
        "--config.checkpoint.keep=1",
        *EVERYTHING,
    ),
    # Crops that are cut while files are decoded, and a run that stops early.
    "files": (
        "--config=small.py:image_folder",
        "--config.data.path=photos",
        "--config.data.placement=files",
        "--config.data.max_per_class=0",
        "--config.augment.random_resized_crop=True",
        "--config.train.epochs=20",
        "--config.train.patience=2",
        *EVERYTHING,
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """A workplace with a folder of photos of three kinds and many sizes."""
    place = Workplace(tmp_path_factory.mktemp("resume"))
    rng = np.random.default_rng(0)
    for level, name in enumerate(("dark", "grey", "light")):
        folder = place.folder / "photos" / name
        folder.mkdir(parents=True)
        for i in range(32):
            size = (*rng.integers(9, 24, 2), 3)
            pixels = rng.normal(60 + 60 * level, 50, size).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def background(place):
    """The runs that were left alone, and the killed ones, all going on at the same time."""
    with ThreadPoolExecutor(3) as pool:
        whole = {name: pool.submit(run_to_the_end, place, name) for name in RUNS}
        killed = {name: pool.submit(kill_five_times, place, name, whole[name]) for name in RUNS}
        yield {"whole": whole, "killed": killed}


def run_to_the_end(place: Workplace, name: str) -> Path:
    place.start(f"{name}.log", *RUNS[name], f"--workdir={name}").succeed()
    return place.folder / name


def kill_five_times(place: Workplace, name: str, whole: Future) -> tuple[Path, list[Any]]:
    """Kills a run while it begins, three times while it trains and while it writes its results.

    Returns:
      The run's folder after it has come to its end, and the moments at which it was killed.
    """
    run, rng = place.folder / f"{name}-killed", random.Random(name)
    last = saved_steps(whole.result())[-1]
    moments = ["beginning", *sorted(rng.sample(range(1, last * 3 // 4), 3)), "results"]
    killed = []
    for number, moment in enumerate(moments):
        command = place.start(f"{name}-{number}.log", *RUNS[name], f"--workdir={run.name}")

        def reached(moment=moment, command=command) -> bool:
            if moment == "beginning":
                return (run / "config.json").exists()
            if moment == "results":
                return (run / "predictions" / "val.npz").exists()
            return "compiled" in command.output and max(saved_steps(run), default=0) >= moment

        command.until(reached)
        # A checkpoint takes some 50 ms: this falls into steps, validation and all parts of saving.
        time.sleep(rng.uniform(0, 0.02 if moment == "results" else 0.15))
        command.process.kill()
        if command.finish() == -signal.SIGKILL:
            killed.append(moment)
    place.start(f"{name}-end.log", *RUNS[name], f"--workdir={run.name}").succeed()
    return run, killed


def assert_same_end(run: Path, whole: Path) -> None:
    """Every array of the last checkpoint, every metric and every result is the same to the bit."""
    ended, expected = state(run), state(whole)
    assert ended.keys() == expected.keys()
    for path, array in expected.items():
        assert ended[path].dtype == array.dtype, path
        np.testing.assert_array_equal(ended[path], array, err_msg=path)
    assert history(run) == history(whole)
    assert summary(run) == summary(whole)
    for file in ("weights.safetensors", "predictions/val.npz", "predictions/test.csv"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def test_interrupted_run_saves_and_the_printed_command_resumes(place, background):
    """After SIGTERM and Ctrl-C the newest checkpoint is damaged, and half of another is there."""
    run = place.folder / "interrupted"
    arguments = [*RUNS["files"], f"--workdir={run.name}"]
    saved = [0]
    for number, exit_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = place.start(f"{number.name}.log", *arguments)
        assert command.until(lambda: saved_steps(run)[-1:] > saved[-1:]), command.output
        command.process.send_signal(number)
        assert command.finish() == exit_code, command.output
        saved.append(saved_steps(run)[-1])
        *_, said = command.output.splitlines()
        start, _, resume = said.partition("; to resume: ")
        assert start == f"flaxcls: stopped by {number.name} and saved at step {saved[-1]}"
        _, option, module, *arguments = shlex.split(resume)
        assert (option, module) == ("-m", "flaxcls.main")

    *_, intact, newest = saved_steps(run)
    folder = run / "checkpoints" / str(newest)
    half_written = shutil.copytree(folder, folder.with_name("99.orbax-checkpoint-tmp"))
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    output = place.start("end.log", *arguments).succeed()
    assert f"resumed: step {intact}, " in output
    assert not half_written.exists()
    assert_same_end(run, background["whole"]["files"].result())


@pytest.mark.parametrize("name", RUNS)
def test_killed_five_times_ends_bitwise_equal(name, background):
    run, killed = background["killed"][name].result()
    assert len(killed) == 5, f"some ended before they were killed: {killed}"
    assert_same_end(run, background["whole"][name].result())


def test_a_run_goes_on_on_another_number_of_devices(place):
    """Eight with every parameter whole, one, eight that share the parameters: but for rounding."""
    keys = (
        "--config=small.py",
        "--config.train.batch_size=8",
        "--config.model.head_width=1024",  # large enough to be shared
        "--config.precision=float64",
        "--config.augment.horizontal_flip=0.5",
    )

    def train(workdir: str, epochs: int, devices: int, *more: str) -> Path:
        name, end = f"{workdir}-{epochs}.log", f"--config.train.epochs={epochs}"
        arguments = (*keys, end, f"--workdir={workdir}", *more)
        place.start(name, *arguments, devices=devices).succeed()
        return place.folder / workdir

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(train, "alone", 3, 1)
        train("moving", 1, 8)
        train("moving", 2, 1)
        run, alone = train("moving", 3, 8, "--config.mesh.shard_params=True"), whole.result()
    assert_close(state(run), state(alone))
    assert_close(history(run), history(alone))
