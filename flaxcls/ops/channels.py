"""Sums over everything but the channels, and their transpose, in the form the device runs fast."""

import jax
import jax.numpy as jnp

from flaxcls.ops.backend import implementation


def channel_mean(x: jax.Array) -> jax.Array:
    """x (..., C) -> its mean over all axes but the last, (C,).

    XLA:CPU reduces leading axes at a third to a tenth of the speed of a matmul with ones
    (64x32x32x64: 6.5 ms against 2.1).
    """
    if implementation() != "cpu":
        return x.mean(tuple(range(x.ndim - 1)))
    pixels = x.size // x.shape[-1]
    ones = jnp.ones((1, pixels), x.dtype)
    return (ones @ x.reshape(pixels, -1))[0] / pixels


def spread(channels: jax.Array, x: jax.Array) -> jax.Array:
    """channels (C,) in a form that broadcasts against x (..., C), of the dtype of `channels`.

    On CPU it is a matmul with ones, which XLA turns into a plain broadcast; but its gradient, a
    sum over all pixels, then is a matmul too, with the gain that `channel_mean` names.
    """
    if implementation() != "cpu":
        return channels
    ones = jnp.ones((x.size // x.shape[-1], 1), channels.dtype)
    return (ones @ channels[None]).reshape(x.shape)
