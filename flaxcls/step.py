"""The training step and the evaluation step: pure functions, compiled over a mesh.

Everything between the bytes of a batch and the new parameters is here, on one screen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from flaxcls import ops
from flaxcls.augment import Augmentation, augment
from flaxcls.batch import Batch, Preprocess, preprocess
from flaxcls.freezing import EVERYTHING, Selection, frozen_statistics, join, partition, rate_factors
from flaxcls.losses import Loss, total
from flaxcls.metrics import MetricState
from flaxcls.rematerialisation import rematerialised
from flaxcls.state import Stream, TrainState, stream_key


class Resident(flax.struct.PyTreeNode):
    """A split that lives on the device, so that a step is sent indices only.

    Attributes:
      image: uint8 (N, H, W, C).
      label: int32 (N,), or (N, 2) as (child, parent).
    """

    image: jax.Array
    label: jax.Array


class Totals(flax.struct.PyTreeNode):
    """What the progress bar reads: a copy that the next step does not take over.

    Attributes:
      learning_rate: float (), of the step just taken.
      metrics: the running metrics without their confusion matrix.
    """

    learning_rate: Any
    metrics: MetricState


class Recipe(NamedTuple):
    """What a training step does, all of it fixed when the step is compiled.

    Attributes:
      model: a flax module; `apply(variables, images, train=...)` gives logits (N, C).
      loss: (logits, labels) to a `Loss`.
      optimizer: an Optax transformation.
      schedule: step to learning rate, for the log; the optimizer applies it.
      preprocess: normalisation and final size of the images.
      augmentation: what training does to images besides.
      num_classes: C.
      seed: of the run.
      steps_per_epoch: so that the step knows the epoch, which augmentation is keyed by.
      accumulate: micro-batches a step.
      ema_decay: of the averaged parameters; only with a state that holds them.
      sum_loss: minimise the sum over the batch, not the mean.
      dtype: of the images that the model sees.
      selection: which parameters are trained.
      rates: (pattern, factor) of the learning rate, by parameter path; the first match counts.
      remat: patterns over the paths of modules that the backward pass computes again.
    """

    model: nn.Module
    loss: Callable[[jax.Array, jax.Array], Loss]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    preprocess: Preprocess
    augmentation: Augmentation
    num_classes: int
    seed: int
    steps_per_epoch: int
    accumulate: int = 1
    ema_decay: float = 0.0
    sum_loss: bool = False
    dtype: Any = jnp.float32
    selection: Selection = EVERYTHING
    rates: tuple[tuple[str, float], ...] = ()
    remat: tuple[str, ...] = ()


def train_step(
    recipe: Recipe,
    state: TrainState,
    metrics: MetricState,
    batch: Batch,
    resident: Resident | None = None,
) -> tuple[TrainState, MetricState, Totals]:
    """Takes one optimizer step.

    Returns:
      The new state, the metrics with this batch added, and their scalars for the progress bar.
    """
    batch = gather(batch, resident)
    images, targets = augment(
        batch,
        key=stream_key(recipe.seed, Stream.AUGMENT),
        epoch=state.step // recipe.steps_per_epoch,
        step=state.step,
        augmentation=recipe.augmentation,
        preprocess=recipe.preprocess,
        num_classes=recipe.num_classes,
        dtype=recipe.dtype,
    )
    examples = Examples(images, targets, batch.label, batch.mask)
    key = jax.random.fold_in(stream_key(recipe.seed, Stream.DROPOUT), state.step)
    backward = _backward if recipe.accumulate == 1 else _backward_in_parts
    gradients, batch_stats, metrics = backward(recipe, state, metrics, examples, key)
    new_state = _apply_gradients(recipe, state, gradients, batch_stats)
    learning_rate = jnp.asarray(recipe.schedule(state.step))
    if state.learning_rate_scale is not None:
        learning_rate = learning_rate * state.learning_rate_scale
    return new_state, metrics, Totals(learning_rate, metrics.replace(confusion_matrix=None))


class Examples(NamedTuple):
    """Augmented examples: images (N, H, W, C), targets, integer labels (N,) and mask (N,)."""

    images: jax.Array
    targets: jax.Array
    labels: jax.Array
    mask: jax.Array


def _backward(
    recipe: Recipe, state: TrainState, metrics: MetricState, examples: Examples, key: jax.Array
) -> tuple[Any, Any, MetricState]:
    """Returns gradients, running statistics and metrics of one forward and backward pass."""
    trained, frozen = partition(state.params, recipe.selection)

    def objective(trained):
        params = join(trained, frozen)
        value, weight, outputs = _forward(recipe, params, state.batch_stats, examples, key)
        return value if recipe.sum_loss else value / weight, outputs

    gradients, (logits, loss, batch_stats) = jax.grad(objective, has_aux=True)(trained)
    metrics = metrics.update(logits, examples.labels, loss, examples.mask, state.step)
    return gradients, batch_stats, metrics


def _backward_in_parts(
    recipe: Recipe, state: TrainState, metrics: MetricState, examples: Examples, key: jax.Array
) -> tuple[Any, Any, MetricState]:
    """As `_backward`, micro-batch after micro-batch; sums are divided once, at the end."""
    trained, frozen = partition(state.params, recipe.selection)

    def accumulate(carry, micro):
        gradients, weight, batch_stats, metrics = carry
        index, examples = micro

        def objective(trained):
            params = join(trained, frozen)
            micro_key = jax.random.fold_in(key, index)
            value, weight, outputs = _forward(recipe, params, batch_stats, examples, micro_key)
            return value, (weight, *outputs)

        more, outputs = jax.grad(objective, has_aux=True)(trained)
        more_weight, logits, loss, batch_stats = outputs
        metrics = metrics.update(logits, examples.labels, loss, examples.mask, state.step)
        gradients = jax.tree.map(jnp.add, gradients, more)
        return (gradients, weight + more_weight, batch_stats, metrics), None

    parts = recipe.accumulate
    zeros = jax.tree.map(jnp.zeros_like, trained)
    weight = jnp.zeros((), jnp.promote_types(recipe.dtype, jnp.float32))
    (gradients, weight, batch_stats, metrics), _ = jax.lax.scan(
        accumulate,
        (zeros, weight, state.batch_stats, metrics),
        (jnp.arange(parts), jax.tree.map(lambda x: _split(x, parts), examples)),
    )
    if not recipe.sum_loss:
        gradients = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradients)
    return gradients, batch_stats, metrics


def _forward(recipe: Recipe, params: Any, batch_stats: Any, examples: Examples, key: jax.Array):
    """Returns the sum of the losses, that of their weights, and (logits, loss, batch_stats)."""
    with rematerialised(recipe.remat), frozen_statistics(recipe.selection):
        logits, updates = recipe.model.apply(
            {"params": params, "batch_stats": batch_stats},
            examples.images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
    loss = recipe.loss(logits, examples.targets)
    value, weight = total(loss, examples.mask)
    return value, weight, (logits, loss, updates.get("batch_stats", {}))


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(N, ...) to (parts, N / parts, ...), strided so that no example leaves its device."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _apply_gradients(recipe: Recipe, state: TrainState, gradients, batch_stats) -> TrainState:
    trained, frozen = partition(state.params, recipe.selection)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, trained)
    if recipe.rates:
        factors = rate_factors(trained, recipe.rates)
        updates = jax.tree.map(lambda u, factor: u * factor, updates, factors)
    if state.learning_rate_scale is not None:
        # Every optimizer here multiplies by the learning rate last, so scaling its update is exact.
        updates = jax.tree.map(lambda u: u * state.learning_rate_scale.astype(u.dtype), updates)
    trained = optax.apply_updates(trained, updates)
    ema = state.ema
    if ema is not None:
        # The cap lets an average of few steps follow the parameters (TensorFlow's num_updates).
        decay = jnp.minimum(recipe.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(
            lambda old, new: old + (1 - decay).astype(old.dtype) * (new - old),
            ema,
            {"params": trained, "batch_stats": batch_stats},
        )
    return state.replace(
        step=state.step + 1,
        params=join(trained, frozen),
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
    )


def eval_step(
    recipe: Recipe,
    variables: Any,
    metrics: MetricState,
    batch: Batch,
    resident: Resident | None = None,
) -> tuple[MetricState, jax.Array]:
    """Evaluates one batch, padding masked out.

    Returns:
      The metrics with this batch added, and the logits (N, C).
    """
    batch = gather(batch, resident)
    images = preprocess(batch.image, recipe.preprocess, recipe.dtype)
    logits: Any = recipe.model.apply(variables, images, train=False)
    loss = recipe.loss(logits, batch.label)
    return metrics.update(logits, batch.label, loss, batch.mask, jnp.zeros((), jnp.int32)), logits


def gather(batch: Batch, resident: Resident | None) -> Batch:
    """Fills in images and labels from a split on the device; a complete batch stays as it is."""
    if resident is None:
        return batch
    return batch.replace(image=resident.image[batch.index], label=resident.label[batch.index])


def compile_train_step(recipe: Recipe, state_sharding: Any, replicated: Any, steps: int = 1):
    """Compiles `train_step`, or a scan over `steps` of them, with state and metrics donated.

    Args:
      recipe: what the step does.
      state_sharding: a sharding for each leaf of the state.
      replicated: the sharding of metrics.
      steps: with more than one, the batch's arrays are (steps, N, ...).

    Returns:
      A function of (state, metrics, batch, resident) as `train_step`'s.
    """

    def several(state, metrics, batches, resident):
        def body(carry, batch):
            state, metrics = carry
            state, metrics, totals = train_step(recipe, state, metrics, batch, resident)
            return (state, metrics), totals

        (state, metrics), totals = jax.lax.scan(body, (state, metrics), batches)
        return state, metrics, jax.tree.map(lambda x: x[-1], totals)

    return jax.jit(
        partial(train_step, recipe) if steps == 1 else several,
        donate_argnums=(0, 1),
        out_shardings=(state_sharding, replicated, replicated),
        compiler_options=ops.compiler_options(),
    )


def compile_eval_step(recipe: Recipe, replicated: Any):
    """Compiles `eval_step` with the metrics donated; logits come back whole on every process."""
    return jax.jit(
        partial(eval_step, recipe),
        donate_argnums=1,
        out_shardings=(replicated, replicated),
        compiler_options=ops.compiler_options(),
    )
