"""A run that was interrupted, however and wherever, ends as one that was not."""

import random
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_runs import Workplace, history, saved_steps, state, summary, weights

AUGMENTATION = (
    "--config.augment.horizontal_flip=0.5",
    "--config.augment.crop_padding=1",
    "--config.augment.erasing=0.5",
    "--config.augment.mixup=0.2",
    "--config.optimizer.ema_decay=0.9",
    "--config.checkpoint.every_steps=2",
)

RUNS = {
    # A scan over steps, and a learning rate that depends on the metric history.
    "device": (
        "--config=small.py",
        "--config.data.placement=device",
        "--config.train.steps_per_call=2",
        "--config.schedule.name=plateau",
        "--config.schedule.patience=0",
        "--config.schedule.factor=0.5",
        *AUGMENTATION,
    ),
    # Micro-batches, another optimizer, and no spare checkpoint.
    "host": (
        "--config=small.py",
        "--config.data.placement=host",
        "--config.optimizer.name=adam",
        "--config.optimizer.learning_rate=0.003",
        "--config.optimizer.accumulate=2",
        "--config.checkpoint.keep=1",
        *AUGMENTATION,
    ),
    # Crops that are cut while files are decoded, and early stopping.
    "files": (
        "--config=small.py:image_folder",
        "--config.data.path=photos",
        "--config.data.placement=files",
        "--config.augment.random_resized_crop=True",
        "--config.train.patience=5",
        *AUGMENTATION,
    ),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "grey", "light")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(32):
            shape = (*rng.integers(9, 24, 2), 3)
            pixels = np.clip(rng.normal(60 + 60 * number, 50, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    return Workplace(folder)


def kill_five_times_and_finish(place: Workplace, name: str, last_step: int) -> int:
    run, rng = place.folder / f"{name}-killed", random.Random(name)
    *middle, = sorted(rng.sample(range(1, last_step * 3 // 4), 3))
    kills = 0
    for attempt, moment in enumerate(["begin", *middle, "finish"]):
        command = place.start(f"{name}-{attempt}.log", *RUNS[name], f"--workdir={run.name}")

        def reached() -> bool:
            if moment == "begin":
                return (run / "config.json").exists()
            if moment == "finish":
                return (run / "predictions" / "val.npz").exists()
            return "compiled" in command.output and max(saved_steps(run), default=0) >= moment

        command.await_(reached)
        delay = rng.uniform(0, 0.02 if moment == "finish" else 0.15)
        time.sleep(delay)
        before = saved_steps(run)
        command.process.kill()
        code = command.finish()
        kills += code == -signal.SIGKILL
        print(name, moment, delay, code, before, sorted(p.name for p in (run/"checkpoints").glob("*")), sorted(p.name for p in run.glob("*")))
    t = time.monotonic()
    place.start(f"{name}-end.log", *RUNS[name], f"--workdir={run.name}").succeed()
    print(name, "end", time.monotonic()-t)
    return kills

@pytest.mark.parametrize("name", RUNS)
def test_resume_after_five_kills_is_bitwise_equal(workplace, name):
    t = time.monotonic()
    place=workplace
    place.start(f"{name}.log", *RUNS[name], f"--workdir={name}").succeed()
    print("ref", time.monotonic()-t)
    whole = place.folder / name
    last = saved_steps(whole)[-1]
    print((place.folder/f"{name}.log").read_text(), last)
    t = time.monotonic()
    kills = kill_five_times_and_finish(place, name, last)
    print("killed", time.monotonic()-t)
    again = place.folder / f"{name}-killed"
    assert kills == 5
    assert history(again) == history(whole)
    assert summary(again) == summary(whole)
    a, b = state(again), state(whole)
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)
    a, b = weights(again), weights(whole)
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)
