"""The number of devices and processes and the place of the data change nothing but rounding."""

import itertools
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from small_runs import Command, Workplace, assert_close, history, saved_steps, summary

from flaxcls import metrics
from flaxcls.config import for_dataset, resolve
from flaxcls.experiment import for_training
from flaxcls.sharding import fetch, replicated
from flaxcls.step import compile_train_step

STEPS = 20

LENET = {
    "model.name": "lenet",
    "data.image_size": 28,
    "data.max_per_class": 40,
    "train.batch_size": 16,
    "optimizer.learning_rate": 0.05,
    "augment.random_resized_crop": True,
    "augment.horizontal_flip": 0.5,
    "augment.erasing": 0.3,
    "augment.mixup": 0.2,
}

VGG11 = {
    "model.name": "vgg11",
    "model.head_width": 64,
    "data.image_size": 32,
    "data.max_per_class": 20,
    "train.batch_size": 8,
    "precision": "float64",
    "augment.horizontal_flip": 0.5,
    "augment.crop_padding": 2,
    "augment.erasing": 0.3,
}


@pytest.fixture(scope="module")
def eight_devices() -> Iterator[ProcessPoolExecutor]:
    """A process with eight simulated devices."""
    # Optimised code takes longer to make than it saves in so few steps.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", flags)
        patch.setenv("JAX_PLATFORMS", "cpu")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        assert pool.submit(jax.device_count).result() == 8
    with pool:
        yield pool


def losses(keys: dict[str, Any]) -> np.ndarray:
    """Takes 20 steps and returns the loss of each, float64 (20,)."""
    config = for_dataset("digits")
    config.update_from_flattened_dict(keys)
    config, _ = resolve(config)
    with jax.enable_x64(config.precision == "float64"):
        experiment = for_training(config)
        sharding, everywhere = experiment.state_sharding(), replicated(experiment.mesh)
        state = jax.jit(experiment.create_state, out_shardings=sharding)()
        empty = jax.jit(experiment.empty_metrics, out_shardings=everywhere)
        step = compile_train_step(experiment.recipe, sharding, everywhere)
        feed, taken = experiment.data.feeds["train"], []
        with feed.train(experiment.order, experiment.recipe.augmentation) as batches:
            for _, batch in itertools.islice(batches, STEPS):
                assert len(batch.index.sharding.device_set) == config.mesh.devices
                state, counted, _ = step(state, empty(), batch, feed.resident)
                taken.append(metrics.compute(fetch(counted))["loss"])
    assert len(set(taken)) == STEPS
    return np.array(taken)


@pytest.fixture(scope="module")
def lenet_alone(eight_devices) -> np.ndarray:
    keys = LENET | {"mesh.devices": 1, "data.placement": "device"}
    return eight_devices.submit(losses, keys).result()


@pytest.mark.parametrize(
    "keys",
    [
        {"mesh.devices": 8, "data.placement": "device"},
        {"mesh.devices": 8, "data.placement": "host", "mesh.shard_params": True},
        {"mesh.devices": 1, "data.placement": "host"},
        {"mesh.devices": 1, "data.placement": "device", "optimizer.accumulate": 2},
        {"mesh.devices": 8, "data.placement": "host", "optimizer.accumulate": 2},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_lenet_has_the_same_losses_in_float32(keys, eight_devices, lenet_alone):
    found = eight_devices.submit(losses, LENET | keys).result()
    np.testing.assert_allclose(found, lenet_alone, rtol=1e-5)


@pytest.mark.slow
def test_vgg11_that_eight_devices_share_has_the_same_losses_in_float64(eight_devices):
    alone = eight_devices.submit(losses, VGG11 | {"mesh.devices": 1})
    keys = VGG11 | {"mesh.devices": 8, "mesh.shard_params": True}
    found = eight_devices.submit(losses, keys)
    np.testing.assert_allclose(found.result(), alone.result(), rtol=1e-8)


PAIR = (
    "--config=small.py",
    "--config.model.pretrained=weights.safetensors",
    "--config.precision=float64",
    "--config.train.epochs=4",
    "--config.augment.horizontal_flip=0.5",
    "--config.augment.crop_padding=1",
    "--config.optimizer.ema_decay=0.9",
    "--config.checkpoint.every_steps=3",
    "--config.eval.batch_size=6",  # divides neither split
)


class Pair:
    """Two processes that train together."""

    def __init__(
        self, place: Workplace, name: str, *arguments: str, other: Workplace | None = None
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = (f"--coordinator=localhost:{port}", "--num_processes=2")
        self.commands: list[Command] = [
            where.start(f"{name}-{i}.log", *arguments, *flags, f"--process_id={i}")
            for i, where in enumerate((place, other or place))
        ]

    def finish(self) -> list[int]:
        return [command.finish() for command in self.commands]

    @property
    def output(self) -> str:
        return "\n".join(command.output for command in self.commands)


def test_two_processes_train_are_interrupted_resume_and_evaluate(tmp_path):
    place = Workplace(tmp_path)
    write_weights(tmp_path / "weights.safetensors")
    run, alone = tmp_path / "pair", tmp_path / "alone"
    single = place.start("alone.log", *PAIR, f"--workdir={alone}")

    for name, placement, interrupt, exit_code in (
        ("killed", "host", signal.SIGKILL, -signal.SIGKILL),
        ("stopped", "device", signal.SIGTERM, 143),
    ):
        done = max(saved_steps(run), default=0)
        pair = Pair(place, name, *PAIR, f"--config.data.placement={placement}", f"--workdir={run}")

        def further(done=done) -> bool:
            return max(saved_steps(run), default=0) > done

        assert pair.commands[0].until(further), pair.output
        # A signal to one of them is enough to stop both in good order.
        for command in pair.commands if interrupt == signal.SIGKILL else pair.commands[1:]:
            command.process.send_signal(interrupt)
        assert pair.finish() == [exit_code] * 2, pair.output
    assert f"saved at step {saved_steps(run)[-1]}; to resume: " in pair.commands[0].output
    assert max(saved_steps(run)) < 4 * 7, "nothing was left to do"

    pair = Pair(place, "resumed", *PAIR, f"--workdir={run}")
    assert pair.finish() == [0, 0], pair.output
    single.succeed()
    assert_close(history(run), history(alone))
    assert_close(summary(run), summary(alone))
    assert [record["epoch"] for record in history(run)] == [1, 1, 2, 2, 3, 3, 4, 4]

    evaluate = ("--mode=evaluate", *PAIR, f"--workdir={run}", "--config.eval.split=test")
    pair = Pair(place, "evaluated", *evaluate)
    assert pair.finish() == [0, 0], pair.output
    found, expected = (predictions(folder) for folder in (run, alone))
    assert found["index"].tolist() == list(range(20))
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-9, atol=1e-12)
    measured = json.loads((run / "predictions" / "test.json").read_text())
    assert measured["support"] == np.bincount(found["label"]).tolist() == [2] * 10
    test = summary(alone)["test"]
    assert_close({key: measured[key] for key in test}, test)


def test_processes_with_different_weights_are_stopped(tmp_path):
    places = []
    for i, name in enumerate(("here", "there")):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name / "weights.safetensors", seed=i)
        places.append(Workplace(tmp_path / name))
    pair = Pair(places[0], "pair", *PAIR, f"--workdir={tmp_path / 'run'}", other=places[1])
    assert pair.finish() == [2, 2], pair.output
    assert "found different weights under 'weights.safetensors'; give" in pair.output


def write_weights(path: Path, seed: int = 0) -> None:
    """Writes weights for the model of `small.py` on its grey 8x8 digits."""
    shapes = {
        "params/Conv_0/kernel": (3, 3, 1, 8),
        "params/Conv_0/bias": (8,),
        "params/Conv_1/kernel": (3, 3, 8, 16),
        "params/Conv_1/bias": (16,),
        "params/Dense_0/kernel": (64, 64),
        "params/Dense_0/bias": (64,),
        "params/Dense_1/kernel": (64, 10),
        "params/Dense_1/bias": (10,),
    }
    for i, width in enumerate((8, 16)):
        shapes |= {f"params/BatchNorm_{i}/{name}": (width,) for name in ("scale", "bias")}
        shapes |= {f"batch_stats/BatchNorm_{i}/{name}": (width,) for name in ("mean", "var")}
    rng = np.random.default_rng(seed)
    arrays = {name: rng.uniform(0.05, 0.15, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, path)


def predictions(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions" / "test.npz") as arrays:
        return dict(arrays)
