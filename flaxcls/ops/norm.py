"""Batch normalisation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from flaxcls.ops.backend import use_native
from flaxcls.ops.channels import channel_mean
from flaxcls.ops.native.batchnorm import batch_norm, batch_norm_inference
from flaxcls.ops.normalise import normalise


class BatchNorm(nn.Module):
    """Normalisation with the parameters, statistics, names and results of `flax.linen.BatchNorm`.

    Statistics are computed in at least float32. The running variance is that of the batch as it
    is (biased, flax's); PyTorch's carries n / (n - 1). With float64 parameters the running
    statistics are float64 from the start, where flax's would turn so at the first step.

    What often follows, a residual, ReLU and a pool, can be asked for in the call. On CPU all of it
    then is one native operator (`native/batchnorm.py`), where one is to be had: in training, with
    its gradient, 64x32x32x64 with ReLU and pool takes 9 ms instead of 42, one thread. It has no
    derivatives but the first, backwards, and in training none of the running statistics.

    Attributes:
      momentum: share of the old running statistics that each step keeps.
      epsilon: added to the variance.
      dtype: dtype of the result; None: what input and parameters promote to.
      param_dtype: dtype of `scale` and `bias`.

    Source: Ioffe and Szegedy 2015, algorithms 1 and 2.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool,
        *,
        residual: jax.Array | None = None,
        relu: bool = False,
        pool: bool = False,
    ) -> jax.Array:
        """Normalise x (..., C); then, in this order, add, apply ReLU and pool.

        Args:
          x: (..., C).
          use_running_average: false in training.
          residual: added to the normalised x; of its shape.
          relu: whether ReLU follows.
          pool: whether a max pool of 2x2 windows follows; x then is (N, H, W, C).

        Returns:
          The shape of x; (N, H // 2, W // 2, C) with a pool.
        """
        shape = (x.shape[-1],)
        stats_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)

        def move_running(mean: jax.Array, var: jax.Array) -> None:
            if self.is_initializing():
                return
            for running, new in ((running_mean, mean), (running_var, var)):
                moved = self.momentum * running.value + (1 - self.momentum) * new
                running.value = moved.astype(running.value.dtype)

        then: dict[str, Any] = {"residual": residual, "relu": relu, "pool": pool}
        channels = (scale, bias, running_mean.value, running_var.value)
        if _native_takes(x, channels, residual, dtype):
            scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
            if use_running_average:
                mean, var = (s.value.astype(jnp.float32) for s in (running_mean, running_var))
                return batch_norm_inference(x, scale, bias, mean, var, self.epsilon, **then)
            y, mean, var = batch_norm(x, scale, bias, self.epsilon, **then)
            move_running(mean, var)
            return y
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = _moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
            move_running(mean, var)
        return normalise(x, scale, bias, mean, var, epsilon=self.epsilon, dtype=dtype, **then)


def _native_takes(
    x: jax.Array, channels: Sequence[jax.Array], residual: jax.Array | None, dtype: Any
) -> bool:
    """Whether the native operators compute what is asked for; `dtype` is the result's."""
    narrow = all(jnp.promote_types(p.dtype, jnp.float32) == jnp.float32 for p in channels)
    same = residual is None or (residual.dtype, residual.shape) == (x.dtype, x.shape)
    known = x.dtype == dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    return x.ndim > 1 and known and narrow and same and use_native()


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance (C,) of x (..., C)."""
    mean = channel_mean(x)
    # E[x^2] - E[x]^2 needs one pass over x; rounding may take it below zero.
    return mean, jnp.maximum(0.0, channel_mean(x * x) - mean * mean)
