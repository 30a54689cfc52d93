"""Pooling over height and width of (N, H, W, C)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from flaxcls.ops.backend import implementation, use_native
from flaxcls.ops.native import pooling
from flaxcls.ops.windows import Padding, sides, strided_slices


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
    if use_native() and _native_is_faster(x, window):
        return pooling.max_pool(x, window, strides, padding)
    if implementation() == "cpu" and _overlaps(window, strides):
        rows, columns = sides(x.shape[1:3], window, strides, padding)
        # The first row that holds the maximum, and in it the first place: the order of PyTorch.
        x = _max_of_slices(x, (1, window[1]), (1, strides[1]), ((0, 0), columns))
        return _max_of_slices(x, (window[0], 1), (strides[0], 1), (rows, (0, 0)))
    if implementation() == "cpu":
        return _max_of_slices(x, window, strides, padding)
    return nn.max_pool(x, window, strides, padding)


def _native_is_faster(x: jax.Array, window: tuple[int, int]) -> bool:
    """In bfloat16, which XLA:CPU converts number by number: 2x2/2 of 64x32x32x64 takes, with its
    gradient, 5 ms for 63. In float32 they are even."""
    return x.dtype == jnp.bfloat16 and math.prod(window) <= pooling.MOST_PLACES


def _overlaps(window: tuple[int, int], strides: tuple[int, int]) -> bool:
    return any(size > step for size, step in zip(window, strides, strict=True))


def _max_of_slices(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """`max_pool` as the maximum of strided slices, one for each place in the window.

    With its gradient it takes 1/20 of `nn.max_pool` for 2x2/2 windows: that of `nn.max_pool` is a
    select-and-scatter, slow on CPU. Windows that overlap take the columns first and then the rows,
    with its gradient 4 ms for 38 (3x3/1 of 32x14x14x192) and 10 for 13 (3x3/2 of 32x56x56x64).
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
