"""TrainState: everything that a training step changes, and nothing else."""

import enum
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxcls.freezing import EVERYTHING, Selection, partition


class Stream(enum.IntEnum):
    """Each use of randomness has a stream of its own, `fold_in(key(seed), stream)`."""

    INIT = 0
    DROPOUT = 1
    AUGMENT = 2


def stream_key(seed: int, stream: Stream) -> jax.Array:
    # Whatever JAX_DEFAULT_PRNG_IMPL says: only Threefry keeps the numbers of an example its own.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


class TrainState(flax.struct.PyTreeNode):
    """The state of a run between two steps.

    Attributes:
      step: int32 (), steps taken so far.
      params: the parameters, frozen ones too.
      batch_stats: running statistics of BatchNorm; {} where the model has none.
      opt_state: the optimizer's, for the parameters that are trained.
      ema: {"params", "batch_stats"} averaged over steps, of the parameters that are trained; or
        None.
      learning_rate_scale: float32 (), what reduce-on-plateau has made of the schedule, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    learning_rate_scale: Any

    def variables(self) -> dict[str, Any]:
        """Returns what evaluation uses: the averaged variables where there are any."""
        if self.ema is not None:
            averaged = flatten_dict(self.params) | flatten_dict(self.ema["params"])
            return {"params": unflatten_dict(averaged), "batch_stats": self.ema["batch_stats"]}
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    *,
    seed: int,
    ema: bool = False,
    plateau: bool = False,
    dtype: Any = jnp.float32,
    selection: Selection = EVERYTHING,
) -> TrainState:
    """Initialises a state; to be called under `jax.jit` or `jax.eval_shape`.

    Args:
      model: called as `model.init(key, images, train=False)`.
      optimizer: an Optax transformation.
      image_shape: (height, width, channels).
      seed: of the run.
      ema: keep an average of the parameters and of the running statistics.
      plateau: keep a scale of the learning rate that the loop lowers.
      dtype: of the images that the model sees.
      selection: which parameters are trained; the optimizer has a state for these alone.
    """
    images = jnp.zeros((1, *image_shape), dtype)
    variables = model.init(stream_key(seed, Stream.INIT), images, train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    trained, _ = partition(params, selection)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(trained),
        # A copy, since the step donates the state: one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, {"params": trained, "batch_stats": batch_stats})
        if ema
        else None,
        learning_rate_scale=jnp.ones((), jnp.float32) if plateau else None,
    )
