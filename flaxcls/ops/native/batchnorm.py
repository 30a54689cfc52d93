"""Batch normalisation, with what follows it, by the native operators."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxcls.ops.normalise import normalise


class _Fusion(NamedTuple):
    """What the compiled functions are told beside their arrays."""

    epsilon: float
    residual: bool
    relu: bool
    pool: bool

    def call(self, name: str, results: Any, *arrays: jax.Array) -> Any:
        attributes = self._asdict() | {"epsilon": np.float32(self.epsilon)}
        operator = jax.ffi.ffi_call(f"flaxcls_{name}", results, vmap_method="sequential")
        return operator(*arrays, **attributes)


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    *,
    residual: jax.Array | None = None,
    relu: bool = False,
    pool: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise by the batch's statistics; then add, apply ReLU and pool, in one pass.

    To be called only where `build.native().usable`. No gradient passes through the statistics that
    are returned, which are for running averages; that of `y` takes into account that they depend
    on `x`. There are first derivatives only, and backwards only.

    Args:
      x: (..., C), float32 or bfloat16; computed in float32.
      scale: (C,), float32; `bias` likewise.
      epsilon: added to the variance.
      residual: added before ReLU; shape and dtype of `x`.
      relu: whether to apply ReLU.
      pool: whether to take the maximum over windows of 2x2, at the end; `x` must be (N, H, W, C),
        and the last row or column of an odd map is dropped.

    Returns:
      y, shape of `x`, or (N, H // 2, W // 2, C) with a pool, in the dtype of `x`; mean and biased
      variance (C,), float32.

    Source: Ioffe and Szegedy 2015, algorithm 1.
    """
    fusion = _Fusion(float(epsilon), residual is not None, bool(relu), bool(pool))
    y, mean, var = _batch_norm(x, scale, bias, residual, fusion)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _batch_norm(x, scale, bias, residual, fusion):
    return _forward(x, scale, bias, residual, fusion)[0]


def _forward(x, scale, bias, residual, fusion):
    channels = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    y = _result(x, fusion)
    winner = jax.ShapeDtypeStruct(y.shape if fusion.pool else (0,), jnp.uint8)
    added = _nothing(x) if residual is None else residual
    y, mean, mean_rest, var, winner = fusion.call(
        "batch_norm_forward", (y, channels, channels, channels, winner), x, added, scale, bias
    )
    masked_by_y = fusion.residual and fusion.relu and not fusion.pool
    saved_y = y if masked_by_y else _nothing(x)
    return (y, mean, var), (x, saved_y, winner, scale, bias, mean, mean_rest, var)


def _backward(fusion, saved, gradients):
    x, y, winner, scale, *_ = saved
    gradient = gradients[0]  # those of mean and var are not defined
    masked = fusion.residual and (fusion.relu or fusion.pool)
    map_like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    channels = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    dx, dresidual, dscale, dbias = fusion.call(
        "batch_norm_backward",
        (map_like, map_like if masked else _nothing(x), channels, channels),
        *(x, y, gradient, winner, *saved[3:]),
    )
    if not masked:
        dresidual = gradient if fusion.residual else None
    return dx, dscale, dbias, dresidual


_batch_norm.defvjp(_forward, _backward)


def batch_norm_inference(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
    *,
    residual: jax.Array | None = None,
    relu: bool = False,
    pool: bool = False,
) -> jax.Array:
    """Normalise by given statistics; then add, apply ReLU and pool, in one pass.

    To be called only where `build.native().usable`. It has first derivatives, backwards, which
    are those of XLA's operators.

    Args:
      x, scale, bias, epsilon, residual, relu, pool: see `batch_norm`.
      mean: (C,), float32; `var` likewise.

    Returns:
      What `batch_norm` returns first.

    Source: Ioffe and Szegedy 2015, algorithm 2.
    """
    fusion = _Fusion(float(epsilon), residual is not None, bool(relu), bool(pool))
    return _inference(x, scale, bias, mean, var, residual, fusion)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _inference(x, scale, bias, mean, var, residual, fusion):
    added = _nothing(x) if residual is None else residual
    return fusion.call("batch_norm_inference", _result(x, fusion), x, added, scale, bias, mean, var)


def _inference_forward(x, scale, bias, mean, var, residual, fusion):
    arrays = (x, scale, bias, mean, var, residual)
    return _inference(*arrays, fusion), arrays


def _inference_backward(fusion, arrays, gradient):
    x, *_ = arrays
    then = {"epsilon": fusion.epsilon, "relu": fusion.relu, "pool": fusion.pool}
    return jax.vjp(partial(normalise, **then, dtype=x.dtype), *arrays)[1](gradient)


_inference.defvjp(_inference_forward, _inference_backward)


def _nothing(x: jax.Array) -> jax.Array:
    """In place of an array that the fusion does not need."""
    return jnp.zeros((0,), x.dtype)


def _result(x: jax.Array, fusion: _Fusion) -> jax.ShapeDtypeStruct:
    if not fusion.pool:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    n, h, w, c = x.shape
    return jax.ShapeDtypeStruct((n, h // 2, w // 2, c), x.dtype)
