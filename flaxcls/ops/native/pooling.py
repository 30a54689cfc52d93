"""Max pooling by the native operators."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxcls.ops.windows import Padding

MOST_PLACES = 255  # in a window: the place of a maximum is kept as a byte


class _Window(NamedTuple):
    """What the compiled functions are told beside their arrays.

    Attributes:
      size: height and width.
      strides: step in height and width.
      padding: top, bottom, left, right.
    """

    size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]

    def call(self, name: str, results: Any, *arrays: jax.Array) -> Any:
        operator = jax.ffi.ffi_call(f"flaxcls_{name}", results, vmap_method="sequential")
        window, strides, padding = (np.array(numbers, np.int64) for numbers in self)
        return operator(*arrays, window=window, strides=strides, padding=padding)


def max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Maximum over windows; the gradient goes to the first maximum of a window, as in PyTorch.

    To be called only where `build.native().usable`. There are first derivatives only, and
    backwards only.

    Args:
      x: (N, H, W, C), float32 or bfloat16.
      window: height and width of the window, whose product is at most `MOST_PLACES`.
      strides: its step in height and width.
      padding: `SAME`, `VALID`, or ((top, bottom), (left, right)); padding never wins.

    Returns:
      (N, H', W', C), dtype of `x`.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    (top, bottom), (left, right) = padding
    return _max_pool(x, _Window((*window,), (*strides,), (top, bottom, left, right)))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x, window):
    return _forward(x, window)[0]


def _forward(x, window):
    n, h, w, c = x.shape
    top, bottom, left, right = window.padding
    free = (h + top + bottom - window.size[0], w + left + right - window.size[1])
    pooled = (max(0, f // s + 1) for f, s in zip(free, window.strides, strict=True))
    shape = (n, *pooled, c)
    results = (jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, jnp.uint8))
    y, winner = window.call("max_pool_forward", results, x)
    # An array of no elements tells the backward pass the shape of x.
    return y, (winner, jnp.zeros((0, h, w), x.dtype))


def _backward(window, saved, gradient):
    winner, like = saved
    n, c = winner.shape[0], winner.shape[-1]
    shape = (n, *like.shape[1:], c)
    dx = jax.ShapeDtypeStruct(shape, like.dtype)
    return (window.call("max_pool_backward", dx, gradient, winner),)


_max_pool.defvjp(_forward, _backward)
