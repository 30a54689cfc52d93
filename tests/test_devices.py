"""The number of devices, and where the data live, change nothing but rounding."""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np
import pytest

from flaxcls import metrics
from flaxcls.config import for_dataset, resolve
from flaxcls.experiment import for_training
from flaxcls.sharding import fetch, replicated
from flaxcls.step import compile_train_step

STEPS = 20


@pytest.fixture(scope="module")
def eight_devices():
    """A process in which eight devices are simulated."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(jax.device_count).result() == 8
        if before is None: del os.environ["XLA_FLAGS"]
        else: os.environ["XLA_FLAGS"] = before
        yield pool


def losses(keys: dict[str, Any], **also: Any) -> np.ndarray:
    """Trains for 20 steps and returns the loss of each, float64 (20,)."""
    config = for_dataset("digits", min_size=28)
    config.update_from_flattened_dict(keys | also)
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
                state, counted, _ = step(state, empty(), batch, feed.resident)
                taken.append(metrics.compute(fetch(counted))["loss"])
    return np.array(taken)

V = {
    "model.name": "vgg11",
    "model.head_width": 64,
    "model.dropout": 0.2,
    "data.image_size": 32,
    "data.max_per_class": 20,
    "precision": "float64",
    "augment.horizontal_flip": 0.5,
    "augment.crop_padding": 2,
    "augment.erasing": 0.3,
    "augment.mixup": 0.2,
    "train.batch_size": 8,
    "data.placement": "device",
}
L = {
    "model.name": "lenet",
    "data.max_per_class": 40,
    "augment.horizontal_flip": 0.5,
    "augment.crop_padding": 2,
    "augment.erasing": 0.3,
    "augment.mixup": 0.2,
    "train.batch_size": 16,
    "data.placement": "device",
}
def timed(*a, **k):
    import time; t=time.monotonic(); c=time.process_time()
    r=losses(*a, **k)
    return r, time.monotonic()-t, time.process_time()-c

def test_x(eight_devices):
    for base in (L, V):
        ref,*t = eight_devices.submit(timed, base, **{"mesh.devices":1}).result()
        print(ref, t)
        for k in ({"mesh.devices":8}, {"mesh.devices":8,"data.placement":"host"}, {"mesh.devices":8,"mesh.shard_params":True}, {"mesh.devices":1,"data.placement":"host"}, {"mesh.devices":1, "optimizer.accumulate":2}):
            r,*t = eight_devices.submit(timed, base, **k).result()
            print(k, t, np.max(np.abs(r/ref-1)))
