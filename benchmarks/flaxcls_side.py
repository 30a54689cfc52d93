"""flaxcls's side of throughput.py: the real training step, and a prediction, of one model."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from flaxcls import ops

ops.prepare_process()  # as main does: before JAX starts its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import sides  # noqa: E402

from flaxcls import metrics, models  # noqa: E402
from flaxcls.augment import Augmentation  # noqa: E402
from flaxcls.batch import Batch, Preprocess, preprocess  # noqa: E402
from flaxcls.losses import create_loss, parts_of  # noqa: E402
from flaxcls.optimizers import create_optimizer, create_schedule  # noqa: E402
from flaxcls.sharding import create_mesh, put_batch, replicated, state_shardings  # noqa: E402
from flaxcls.state import TrainState, create_state  # noqa: E402
from flaxcls.step import Recipe, compile_train_step  # noqa: E402

LEARNING_RATE = 1e-3


class FlaxclsSide:
    """A step of one model on one batch that stays on the device.

    Training is what `flaxcls.main` compiles: normalisation, dropout, loss, SGD with momentum and
    metrics in one program, the state donated. Inference is normalisation and the model.
    """

    def __init__(self, task: dict[str, Any]):
        self.task = task
        ops.set_backend(task["ops"])
        self.memory = sides.Memory()
        self.recipe = _recipe(task)
        self.mesh = create_mesh(1)
        self.batch = put_batch(_batch(task), self.mesh)
        state = _draw_state(self.recipe)
        self.shardings = state_shardings(state, self.mesh, shard_params=False)
        self.state: Any = jax.device_put(state, self.shardings)

    def about(self) -> dict[str, Any]:
        """Facts of the network and of the device."""
        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.platform,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "forward_gflop": self._forward_flops() / 1e9,
        }

    def lower(self) -> str:
        """Traces the step and returns a name of the program, the same for the same program."""
        if self.task["mode"] == "train":
            everywhere = replicated(self.mesh)
            parts, parents = parts_of(self.task["loss"]), _parents(self.task)
            empty = partial(metrics.empty, self.task["classes"], parts=parts, parents=parents)
            self.metrics = jax.jit(empty, out_shardings=everywhere)()
            step = compile_train_step(self.recipe, self.shardings, everywhere)
            self.lowered = step.lower(self.state, self.metrics, self.batch, None)
        else:
            self.variables = self.state.variables()
            self.state = None  # nor does one who predicts hold the optimizer's
            step = jax.jit(self._forward, compiler_options=ops.compiler_options())
            self.lowered = step.lower(self.variables, self.batch.image)
        program = self.lowered.as_text() + json.dumps(ops.compiler_options())
        return hashlib.sha256(program.encode()).hexdigest()

    def compile(self) -> dict[str, float]:
        """Compiles the step, and returns seconds and the peak of memory until then, in bytes."""
        began = time.perf_counter()
        self.compiled = self.lowered.compile()
        seconds = time.perf_counter() - began
        del self.lowered
        self.steps(1)
        return {"seconds": seconds, "peak": self._peak()}

    def steps(self, count: int) -> float:
        """Returns the seconds that so many steps take."""
        return sides.seconds_of(partial(self._run, count))

    def _run(self, count: int) -> None:
        if self.task["mode"] == "train":
            for _ in range(count):
                self.state, self.metrics, totals = self.compiled(
                    self.state, self.metrics, self.batch, None
                )
            jax.block_until_ready((self.state, totals))
            return
        for _ in range(count):
            logits = self.compiled(self.variables, self.batch.image)
        jax.block_until_ready(logits)

    def peak(self) -> int:
        """Bytes that steps alone take above the level after the imports, at their peak."""
        self.memory.forget_peak()
        self.steps(2)
        return self._peak()

    def _peak(self) -> int:
        if not jax.devices()[0].memory_stats():
            return self.memory.peak()
        # A device's own peak cannot be forgotten, and holds what was tried while compiling.
        need = self.compiled.memory_analysis()
        return (
            need.argument_size_in_bytes
            + need.output_size_in_bytes
            + need.temp_size_in_bytes
            - need.alias_size_in_bytes
        )

    def ceiling(self, size: int) -> dict[str, float]:
        """The device's speed: multiply-adds of a square matmul, and bytes read and written."""
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(self.task["dtype"]))
        big = jnp.ones((64 * 2**20,), jnp.float32)
        multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: -x)
        matmul = _fastest(lambda: jax.block_until_ready(multiply(x)))
        return {
            "matmul_gflops": 2 * size**3 / matmul / 1e9,
            "copy_gbs": 2 * big.nbytes / _fastest(lambda: jax.block_until_ready(copy(big))) / 1e9,
        }

    def _forward(self, variables: Any, image: jax.Array) -> Any:
        inputs = preprocess(image, self.recipe.preprocess, self.recipe.dtype)
        return self.recipe.model.apply(variables, inputs, train=False)

    def _forward_flops(self) -> int:
        """Of the convolutions and matmuls for one image, a multiply and an add as two."""
        p = self.recipe.preprocess
        image = jax.ShapeDtypeStruct((1, p.size, p.size, p.channels), np.uint8)
        with ops.use_backend("flax"):  # whose convolutions are convolutions
            traced = jax.jit(self._forward).trace(self.state.variables(), image)
        return sum(_flops(equation) for equation in _equations(traced.jaxpr.jaxpr))


def _fastest(function: Any) -> float:
    return min(sides.seconds_of(function) for _ in range(6))


def _recipe(task: dict[str, Any]) -> Recipe:
    schedule = create_schedule("constant", LEARNING_RATE, steps_per_epoch=1000, epochs=1)
    options, parents = dict(task["options"]), _parents(task)
    if parents:
        options["num_parents"] = 2
    if "dtype" in models.model_options(task["model"]):
        options["dtype"] = task["dtype"]
    return Recipe(
        model=models.create_model(task["model"], task["classes"], **options),
        loss=create_loss(task["loss"], **({"parents": parents} if parents else {})),
        optimizer=create_optimizer("sgd", schedule, momentum=0.9),
        schedule=schedule,
        preprocess=Preprocess(task["size"], task["channels"], (0.5,), (0.25,)),
        augmentation=Augmentation(),
        num_classes=task["classes"],
        seed=0,
        steps_per_epoch=1000,
        dtype=jnp.dtype(task["dtype"]),
    )


def _draw_state(recipe: Recipe) -> TrainState:
    """A state of NumPy arrays: to compile the model's own initialisation takes 7 s for vgg13."""
    p, rng = recipe.preprocess, np.random.default_rng(0)
    shape = (p.size, p.size, p.channels)
    create = partial(
        create_state, recipe.model, recipe.optimizer, shape, seed=0, dtype=recipe.dtype
    )
    shapes = jax.eval_shape(create)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) < 2:  # biases, scales, variances
            return np.ones(leaf.shape, leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1])
        return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    drawn = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    return zeros.replace(**jax.tree.map(draw, drawn))


def _parents(task: dict[str, Any]) -> tuple[int, ...]:
    """A parent for each class of a hierarchical model."""
    return tuple(i % 2 for i in range(task["classes"])) if task["loss"] == "hierarchical" else ()


def _batch(task: dict[str, Any]) -> Batch:
    rng = np.random.default_rng(0)
    n, size = task["batch"], task["size"]
    label = rng.integers(0, task["classes"], n).astype(np.int32)
    if parents := _parents(task):
        label = np.stack([label, np.array(parents, np.int32)[label]], axis=1)
    return Batch(
        image=rng.integers(0, 256, (n, size, size, task["channels"]), np.uint8),
        label=label,
        mask=np.ones(n, bool),
        index=np.arange(n, dtype=np.int32),
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The operations of a program and of all that it calls; the body of a scan comes once."""
    for equation in jaxpr.eqns:
        yield equation
        for called in jax.tree.leaves(equation.params):
            inner = getattr(called, "jaxpr", called)  # a closed one holds it
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _flops(equation: Any) -> int:
    output = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive is jax.lax.conv_general_dilated_p:
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * output * math.prod(kernel) // features
    if equation.primitive is jax.lax.dot_general_p:
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * output * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    return 0


if __name__ == "__main__":
    sides.serve(FlaxclsSide)
