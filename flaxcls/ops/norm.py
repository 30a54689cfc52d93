"""Batch normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jax import lax

from flaxcls.ops.channels import channel_mean, spread


class BatchNorm(nn.Module):
    """Normalisation with the parameters, statistics, names and results of `flax.linen.BatchNorm`.

    Statistics are computed in at least float32. The running variance is that of the batch as it
    is (biased, flax's); PyTorch's carries n / (n - 1). With float64 parameters the running
    statistics are float64 from the start, where flax's would turn so at the first step.

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
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """x (..., C) -> the same shape; `use_running_average` is false in training."""
        shape = (x.shape[-1],)
        stats_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = _moments(wide)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    moved = self.momentum * running.value + (1 - self.momentum) * new
                    running.value = moved.astype(running.value.dtype)
        slope = lax.rsqrt(var + self.epsilon) * scale
        # Around a constant, which changes neither value nor any derivative, the gradient needs
        # two sums over the pixels instead of three.
        origin = lax.stop_gradient(mean)
        offset = bias - (mean - origin) * slope
        y = (wide - origin) * spread(slope, x) + spread(offset, x)
        return y.astype(canonicalize_dtype(x, scale, bias, dtype=self.dtype))


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance (C,) of x (..., C)."""
    mean = channel_mean(x)
    # E[x^2] - E[x]^2 needs one pass over x; rounding may take it below zero.
    return mean, jnp.maximum(0.0, channel_mean(x * x) - mean * mean)
