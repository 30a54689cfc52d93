"""A process of scaling.py: the real training step of one model over all devices of its run."""

import time
from functools import partial
from typing import Any

from flaxcls import ops

ops.prepare_process()  # as main does: before JAX starts its threads

import jax  # noqa: E402
import numpy as np  # noqa: E402
import sides  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402

from flaxcls import metrics, models  # noqa: E402
from flaxcls.augment import Augmentation  # noqa: E402
from flaxcls.batch import Batch, Preprocess  # noqa: E402
from flaxcls.losses import create_loss  # noqa: E402
from flaxcls.optimizers import create_optimizer, create_schedule  # noqa: E402
from flaxcls.sharding import (  # noqa: E402
    create_mesh,
    fetch,
    put_batch,
    replicated,
    state_shardings,
)
from flaxcls.state import create_state  # noqa: E402
from flaxcls.step import Recipe, compile_train_step  # noqa: E402

LEARNING_RATE = 0.01


class ScalingSide:
    """Training steps on batches that depend on nothing but their number."""

    def __init__(self, task: dict[str, Any]):
        self.task = task
        if task["processes"] > 1:
            jax.distributed.initialize(task["coordinator"], task["processes"], task["process"])
        ops.set_backend(task["ops"])
        self.mesh = create_mesh(task["devices"])
        self.recipe = _recipe(task)
        shape = (task["size"], task["size"], task["channels"])
        create = partial(create_state, self.recipe.model, self.recipe.optimizer, shape, seed=0)
        everywhere = replicated(self.mesh)
        sharding = state_shardings(jax.eval_shape(create), self.mesh, shard_params=False)
        self.create = jax.jit(create, out_shardings=sharding)
        empty = partial(metrics.empty, task["classes"])
        self.empty = jax.jit(empty, out_shardings=everywhere)
        self.step = compile_train_step(self.recipe, sharding, everywhere)

    def about(self) -> dict[str, Any]:
        """Facts of the devices."""
        return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}

    def train(self, batch_size: int, steps: int, path: str) -> list[float]:
        """Takes some steps from the start, writes what they made of the parameters to `path`.

        Returns:
          The loss of each step. The .npz has each parameter's `before/NAME` and `after/NAME`.
        """
        state, losses = self.create(), []
        arrays = _named("before", state.params)
        for number in range(steps):
            batch = self._batch(batch_size, number)
            state, counted, _ = self.step(state, self.empty(), batch, None)
            losses.append(metrics.running(fetch(counted))[0])
        if jax.process_index() == 0:
            np.savez(path, allow_pickle=False, **arrays, **_named("after", state.params))
        return losses

    def compile(self, batch_size: int) -> float:
        """Makes ready to time steps of such a batch, which stays on the devices."""
        self.batch, self.state = self._batch(batch_size, 0), self.create()
        self.metrics = self.empty()
        return sides.seconds_of(lambda: self.steps(1))

    def steps(self, count: int) -> float:
        """Returns the seconds that so many steps take."""
        began = time.perf_counter()
        for _ in range(count):
            self.state, self.metrics, totals = self.step(self.state, self.metrics, self.batch, None)
            if jax.default_backend() == "cpu":  # whose devices would wait for each other in turn
                jax.block_until_ready(totals)
        jax.block_until_ready((self.state, totals))
        return time.perf_counter() - began

    def _batch(self, batch_size: int, number: int) -> Batch:
        """This process's share of a batch of noise."""
        rng, size = np.random.default_rng(number), self.task["size"]
        images = (batch_size, size, size, self.task["channels"])
        index = np.arange(batch_size, dtype=np.int32)
        whole = Batch(
            image=rng.integers(0, 256, images, np.uint8),
            label=rng.integers(0, self.task["classes"], batch_size).astype(np.int32),
            mask=np.ones(batch_size, bool),
            index=index,
        )
        share = np.array_split(index, jax.process_count())[jax.process_index()]
        return put_batch(jax.tree.map(lambda x: x[share], whole), self.mesh)


def _recipe(task: dict[str, Any]) -> Recipe:
    schedule = create_schedule("constant", LEARNING_RATE, steps_per_epoch=1000, epochs=1)
    return Recipe(
        model=models.create_model(task["model"], task["classes"]),
        loss=create_loss("cross_entropy"),
        optimizer=create_optimizer("sgd", schedule, momentum=0.9),
        schedule=schedule,
        preprocess=Preprocess(task["size"], task["channels"], (0.5,), (0.25,)),
        augmentation=Augmentation(),
        num_classes=task["classes"],
        seed=0,
        steps_per_epoch=1000,
    )


def _named(prefix: str, params: Any) -> dict[str, np.ndarray]:
    leaves = flatten_dict(fetch(params), sep="/")
    return {f"{prefix}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}


if __name__ == "__main__":
    sides.serve(ScalingSide)
