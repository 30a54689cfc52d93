"""Pooling over height and width of (N, H, W, C)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from flaxcls.ops.backend import implementation, use_native
from flaxcls.ops.native import pooling
from flaxcls.ops.windows import Padding, strided_slices


def max_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Maximum over windows; the gradient goes to the first maximum of a window, as in PyTorch.

    Args:
      x: (N, H, W, C).
      window: height and width of the window.
      strides: its step in height and width; None: the window, so that windows do not overlap.
      padding: `SAME`, `VALID`, or ((top, bottom), (left, right)); padding never wins.

    Returns:
      (N, H', W', C), dtype of `x`.
    """
    strides = strides or window
    if use_native() and _native_is_faster(x, window, strides):
        return pooling.max_pool(x, window, strides, padding)
    if implementation() == "cpu" and strides != (1, 1):
        return _max_of_slices(x, window, strides, padding)
    return nn.max_pool(x, window, strides, padding)


def _native_is_faster(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> bool:
    """With its gradient the native pool takes, against the fastest form of XLA, one thread:

    3x3/2, 32x56x56x64: 15 ms for 36; 3x3/1, 32x14x14x192: 8 ms for 87. In bfloat16, which XLA:CPU
    converts number by number, 2x2/2 of 64x32x32x64 takes 5 ms for 63; in float32 they are even.
    """
    if math.prod(window) > pooling.MOST_PLACES:
        return False
    overlap = any(size > step for size, step in zip(window, strides, strict=True))
    return x.dtype == jnp.bfloat16 or (x.dtype == jnp.float32 and overlap)


def _max_of_slices(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """`max_pool` as the maximum of strided slices, one for each place in the window.

    With its gradient it takes 1/20 of `nn.max_pool` for 2x2/2 windows and 1/4 for 3x3/2; nothing
    is gained at stride 1. The gradient of `nn.max_pool` is a select-and-scatter, slow on CPU.
    """
    slices = strided_slices(x, window, strides, padding, fill=-jnp.inf)
    best = slices[0]
    for other in slices[1:]:
        # Not jnp.maximum, which halves the gradient where both are equal, as zeros after a ReLU
        # often are. A NaN on either side stays.
        best = jnp.where((best >= other) | jnp.isnan(best), best, other)
    return best


def avg_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Mean over windows, in which padding counts as zeros.

    Args:
      x: (N, H, W, C).
      window: height and width of the window.
      strides: its step in height and width; None: the window.
      padding: `SAME`, `VALID`, or ((top, bottom), (left, right)).

    Returns:
      (N, H', W', C), dtype of `x`.
    """
    return nn.avg_pool(x, window, strides or window, padding)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Mean over `size` by `size` nearly equal regions: PyTorch's AdaptiveAvgPool2d.

    Region i of n covers floor(i H / n) to ceil((i + 1) H / n): regions overlap where `size` does
    not divide the map, and repeat pixels where the map is smaller than `size`.

    Args:
      x: (N, H, W, C).
      size: height and width of the result.

    Returns:
      (N, size, size, C), dtype of `x`.
    """
    h, w = x.shape[1:3]
    if (h, w) == (size, size):
        return x
    # At full precision: a GPU would round these factors to TF32.
    return jnp.einsum(
        "nhwc,ph,qw->npqc",
        x,
        jnp.asarray(_region_means(h, size), x.dtype),
        jnp.asarray(_region_means(w, size), x.dtype),
        precision=lax.Precision.HIGHEST,
    )


def _region_means(pixels: int, size: int) -> np.ndarray:
    """float64 (size, pixels): row i averages the pixels of region i."""
    means = np.zeros((size, pixels))
    for i in range(size):
        region = slice(i * pixels // size, math.ceil((i + 1) * pixels / size))
        means[i, region] = 1 / (region.stop - region.start)
    return means
