"""Native convolution, NHWC by HWIO, and the choice of an algorithm for each of its passes."""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.ops.native.build import native

Pads = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))
Precision = Literal["default", "high"]
Dims = tuple[int, ...]


class Algorithm(IntEnum):
    """How a pass is computed; the numbers are those of `passes.h`."""

    DIRECT = 0
    SMALL_MAPS = 1  # taps that fall outside the map are left out: tiles of pixels of several images
    WINOGRAD_2 = 2  # F(2x2, 3x3): 2.25 times fewer multiplications; F(2x2, 5x5): 2.8 times
    WINOGRAD_4 = 4  # F(4x4, 3x3): 4 times fewer; errors of 1e-5 instead of 1e-6


class Pass(NamedTuple):
    """What an algorithm is chosen from.

    Attributes:
      images: N.
      size: height and width of the maps that the pass writes, or, for the kernel's gradient, of
        the outputs.
      inputs: channels that the pass reads, of a group.
      taps: 3 or 5 where the kernel has so many a side and the strides are 1, else 0.
      pixels: of the smaller of the two maps.
      inside: share of the kernel's taps, over all outputs, that do not fall on padding.
    """

    images: int
    size: tuple[int, int]
    inputs: int
    taps: int
    pixels: int
    inside: float

    @property
    def tiles(self) -> int:
        """Tiles of 4x4 outputs."""
        h, w = self.size
        return self.images * -(-h // 4) * -(-w // 4)


class Rule(NamedTuple):
    """A row of the choice: an algorithm, where it applies, and the measurement behind it."""

    algorithm: Algorithm
    applies: Callable[[Pass], bool]
    measured: str


# The first rule that applies decides. Times are of one Zen 4 core, forward; gradients are alike.
RULES = (
    Rule(
        Algorithm.WINOGRAD_2,
        lambda p: p.taps == 5 and p.inputs >= 16 and p.pixels > 16 and p.tiles > 8,
        "5x5, 96 to 192 channels, 64 maps of 11x11: 20 ms, direct 32; 64 to 64, 14x14: 5.6 and "
        "11.8; 6 to 16, 12x12: direct leads; one map of 8x8: 0.13 and 0.10; maps of 4x4: as below",
    ),
    Rule(
        Algorithm.SMALL_MAPS,
        lambda p: p.taps == 3 and p.pixels <= 4 and p.images >= 6,
        "512 to 512 channels, 64 maps of 2x2: 8 ms, F2 10, direct 14, F4 20; 3x3: F4 leads",
    ),
    Rule(
        Algorithm.SMALL_MAPS,
        lambda p: p.taps != 3 and p.pixels <= 64 and p.inside < 0.85 and p.images >= 6,
        "5x5, 64 to 64 channels, 64 maps of 4x4: 1.0 ms, direct 1.9; 7x7: 4.3 and 6.1; "
        "3x3 from 8x8 to 4x4, 128 to 256, 32 maps: 2.5 and 2.9",
    ),
    Rule(
        Algorithm.DIRECT,
        lambda p: p.taps != 3,
        "1x1, 5x5, 7x7 and strides from 16 channels on: 85 to 110 GFLOP/s of 110",
    ),
    Rule(
        Algorithm.DIRECT,
        lambda p: p.inputs < 8,
        "3 to 64 channels, 64 maps of 32x32: 2.6 ms, F4 4.0; 8 to 64, 16x16: 1.5 and 0.8",
    ),
    Rule(
        Algorithm.WINOGRAD_2,
        lambda p: p.tiles < 8,
        "64 to 64 channels, one map of 8x8: 0.030 ms, F4 0.034; of 16x16: 0.094 and 0.075",
    ),
    Rule(
        Algorithm.WINOGRAD_4,
        lambda p: True,
        "64 to 64 channels, 64 maps of 32x32: 18 ms, F2 27, direct 47; 16 to 16: 0.8, 1.6, 1.6",
    ),
)

# Tests force the algorithm of every pass here.
forced: Algorithm | None = None


def choose(each: Pass, precision: Precision) -> Algorithm:
    """The algorithm of a pass; `high` precision keeps those of six points a side out."""
    if forced is not None:
        return forced
    chosen = next(rule.algorithm for rule in RULES if rule.applies(each))
    if precision == "high" and chosen is Algorithm.WINOGRAD_4:
        return Algorithm.WINOGRAD_2
    if precision == "high" and chosen is Algorithm.WINOGRAD_2 and each.taps == 5:
        return Algorithm.DIRECT
    return chosen


class _Settings(NamedTuple):
    strides: tuple[int, int]
    padding: Pads
    groups: int
    precision: Precision


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: Pads = ((0, 0), (0, 0)),
    groups: int = 1,
    precision: Precision = "default",
) -> jax.Array:
    """The convolution of images with a kernel, on CPU; differentiable once.

    Args:
      x: images (N, H, W, C), float32, or bfloat16, which is computed in float32.
      kernel: (kernel height, kernel width, C / groups, O), of the dtype of `x`.
      strides: step of the window in height and width.
      padding: ((top, bottom), (left, right)), none negative.
      groups: parts of the channels that are convolved each for itself.
      precision: `high` gives errors of about 1e-6 of the largest value in every pass; `default`,
        1e-5, and up to twice the speed.

    Returns:
      (N, H', W', O), of the dtype of `x`.

    Raises:
      RuntimeError: the native operators cannot be used here.
      TypeError: `x` and `kernel` are not both float32 or both bfloat16.
      ValueError: the shapes do not fit.
    """
    if not native().usable:
        raise RuntimeError(native().said)
    if x.dtype != kernel.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(
            f"native convolution: x is {x.dtype} and kernel {kernel.dtype}; "
            "both must be float32 or both bfloat16"
        )
    if x.shape[-1] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"native convolution: x {x.shape} and kernel {kernel.shape} do not fit "
            f"in {groups} group(s)"
        )
    (top, bottom), (left, right) = padding
    settings = _Settings(
        (int(strides[0]), int(strides[1])),
        ((int(top), int(bottom)), (int(left), int(right))),
        groups,
        precision,
    )
    y = _convolve(x.astype(jnp.float32), kernel.astype(jnp.float32), settings)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    h, w = (
        max(0, (n + sum(pads) - k) // step + 1)
        for n, pads, k, step in zip(
            x.shape[1:3], settings.padding, kernel.shape[:2], settings.strides, strict=True
        )
    )
    y = jax.ShapeDtypeStruct((x.shape[0], h, w, kernel.shape[3]), jnp.float32)
    forward = _pass(x.shape, kernel.shape, y.shape, settings)
    return _call("conv_forward", x, kernel, y, forward, settings)


def _forward(x: jax.Array, kernel: jax.Array, settings: _Settings) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, settings), (x, kernel)


def _backward(settings: _Settings, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Two calls, without side effects: XLA drops the one whose result nobody uses.
    x, kernel = saved
    like_forward = _pass(x.shape, kernel.shape, dy.shape, settings)
    backwards = like_forward._replace(size=x.shape[1:3], inputs=kernel.shape[3] // settings.groups)
    dx = _call("conv_input_gradient", dy, kernel, x, backwards, settings)
    dkernel = _call("conv_kernel_gradient", x, dy, kernel, like_forward, settings)
    return dx, dkernel


_convolve.defvjp(_forward, _backward)


def _pass(x: Dims, kernel: Dims, y: Dims, settings: _Settings) -> Pass:
    """The forward pass of these shapes."""
    inside = 1.0
    for axis in range(2):
        inside *= _share_inside(
            x[1 + axis],
            kernel[axis],
            y[1 + axis],
            settings.strides[axis],
            settings.padding[axis][0],
        )
    return Pass(
        images=x[0],
        size=(y[1], y[2]),
        inputs=kernel[2],
        taps=kernel[0] if kernel[:2] in ((3, 3), (5, 5)) and settings.strides == (1, 1) else 0,
        pixels=min(x[1] * x[2], y[1] * y[2]),
        inside=inside,
    )


def _share_inside(size: int, kernel: int, outputs: int, stride: int, before: int) -> float:
    """Along one axis, the share of taps that fall inside the map."""
    if not outputs:
        return 1.0
    seen = np.arange(outputs)[:, None] * stride + np.arange(kernel) - before
    return float(np.mean((seen >= 0) & (seen < size)))


def _call(
    target: str, a: jax.Array, b: jax.Array, like: Any, each: Pass, settings: _Settings
) -> jax.Array:
    """Runs a target on `a` and `b`; its result has the shape of `like`."""
    result = jax.ShapeDtypeStruct(like.shape, jnp.float32)
    return jax.ffi.ffi_call(f"flaxcls_{target}", result, vmap_method="sequential")(
        a,
        b,
        strides=np.asarray(settings.strides, np.int64),
        padding=np.asarray(settings.padding, np.int64).reshape(4),
        groups=np.int64(settings.groups),
        algorithm=np.int64(choose(each, settings.precision)),
    )
