"""Means over everything but the channels, and their transpose, in the form the device runs fast."""

import math

import jax
import jax.numpy as jnp

from flaxcls.ops.backend import implementation


def channel_mean(x: jax.Array) -> jax.Array:
    """x (N, ..., C) -> its mean over all axes but the last, (C,).

    XLA:CPU sums leading axes slowly: BatchNorm of 64x32x32x64 with its gradients takes 39 ms so,
    and 11 ms where the sum over N is a matmul with ones. A matmul over all pixels at once would be
    no faster, but adds them one after the other: an error of 1e-5 instead of 2e-7.
    """
    if implementation() != "cpu":
        return x.mean(tuple(range(x.ndim - 1)))
    n, c = x.shape[0], x.shape[-1]
    pixels = math.prod(x.shape[1:-1])
    over_examples = jnp.ones((1, n), x.dtype) @ x.reshape(n, pixels * c)
    return over_examples.reshape(pixels, c).sum(0) / (n * pixels)


def spread(channels: jax.Array, x: jax.Array) -> jax.Array:
    """channels (C,) in a form that broadcasts against x (N, ..., C), of the dtype of `channels`.

    On CPU it is a matmul with ones, which XLA turns into a plain broadcast; but its gradient, a
    sum over all pixels, then is in the form of `channel_mean`.
    """
    if implementation() != "cpu":
        return channels
    n, c = x.shape[0], x.shape[-1]
    pixels = math.prod(x.shape[1:-1])
    example = jnp.broadcast_to(channels, (pixels, c)).reshape(1, pixels * c)
    return (jnp.ones((n, 1), channels.dtype) @ example).reshape(x.shape)
