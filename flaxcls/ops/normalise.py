"""A batch normalised by given statistics, and what often follows, by XLA's operators."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from flaxcls.ops.channels import spread
from flaxcls.ops.pool import max_pool


def normalise(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    residual: jax.Array | None,
    *,
    epsilon: float,
    relu: bool,
    pool: bool,
    dtype: Any,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias; then add, apply ReLU and pool.

    Args:
      x: (..., C), computed in at least float32.
      scale: (C,); `bias`, `mean` and the variance `var` likewise.
      residual: added before ReLU; shape of `x`.
      epsilon: added to the variance.
      relu: whether to apply ReLU.
      pool: whether to take the maximum over windows of 2x2, at the end; `x` must be (N, H, W, C).
      dtype: of the result.

    Returns:
      The shape of `x`, or (N, H // 2, W // 2, C) with a pool.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    slope = lax.rsqrt(var + epsilon) * scale
    # Around a constant, which changes neither value nor any derivative, the gradient needs
    # two sums over the pixels instead of three.
    origin = lax.stop_gradient(mean)
    offset = bias - (mean - origin) * slope
    y = ((wide - origin) * spread(slope, x) + spread(offset, x)).astype(dtype)
    if residual is not None:
        y = y + residual
    if relu:
        y = nn.relu(y)
    return max_pool(y, (2, 2)) if pool else y
