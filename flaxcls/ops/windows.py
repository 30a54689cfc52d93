"""The pixels that a sliding window meets, place by place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]


Sides = tuple[tuple[int, int], tuple[int, int]]


def sides(
    map_size: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: Padding
) -> Sides:
    """Padding in numbers, ((top, bottom), (left, right)), for a map of height and width."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(map_size, window, strides, padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def strided_slices(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    fill: float,
) -> list[jax.Array]:
    """What each place in the window sees as it slides over x, row by row of the window.

    Args:
      x: (N, H, W, C).
      window: height and width of the window.
      strides: its step in height and width.
      padding: `SAME`, `VALID`, or ((top, bottom), (left, right)).
      fill: value of the padding.

    Returns:
      One array (N, H', W', C) for each place in the window, where H' and W' count its positions.
    """
    padding = sides(x.shape[1:3], window, strides, padding)
    if any(side for pair in padding for side in pair):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    # One past the last row and column at which a window may start.
    bottom, right = (n - k + 1 for n, k in zip(x.shape[1:3], window, strict=True))
    return [
        x[:, i : i + bottom : strides[0], j : j + right : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
