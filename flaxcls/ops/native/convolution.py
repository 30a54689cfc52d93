"""Convolution, NHWC by HWIO, by the native operators, and the choice of an algorithm for each pass."""

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


class Algorithm(IntEnum):
    """How a pass is computed; the numbers are those of `passes.h`."""

    DIRECT = 0
    SMALL_MAPS = 1  # taps that fall outside the map are left out: tiles of pixels of several images
    WINOGRAD_2 = 2  # F(2x2, 3x3): 2.25 times fewer multiplications
    WINOGRAD_4 = 4  # F(4x4, 3x3): 4 times fewer; errors of 1e-5 instead of 1e-6


class Shape(NamedTuple):
    """The sizes of a convolution from which its algorithms are chosen."""

    images: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    inputs: int  # channels, of a group
    outputs: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]

    @property
    def winograd(self) -> bool:
        return self.kernel_size == (3, 3) and self.strides == (1, 1)

    @property
    def pixels(self) -> int:
        """Of the smaller map."""
        return min(np.prod(self.input_size), np.prod(self.output_size))

    @property
    def tiles(self) -> int:
        """Tiles of 4x4 outputs."""
        h, w = self.output_size
        return self.images * -(-h // 4) * -(-w // 4)


class Rule(NamedTuple):
    """One row of the choice: the algorithm where `applies` holds, and the measurement behind it."""

    algorithm: Algorithm
    applies: Callable[[Shape], bool]
    measured: str


# The first rule that applies decides, for each pass. Times are of one Zen 4 core.
RULES = (
    Rule(
        Algorithm.SMALL_MAPS,
        lambda s: s.pixels <= 4 and s.kernel_size != (1, 1) and s.images >= 6,
        "3x3, 512 to 512 channels, 64 maps of 2x2: 9.8 ms, F2 10.4, direct 16.9, F4 22",
    ),
    Rule(
        Algorithm.DIRECT,
        lambda s: not s.winograd,
        "5x5, 7x7, 1x1 and strides: 95 to 105 GFLOP/s of 110",
    ),
    Rule(
        Algorithm.DIRECT,
        lambda s: min(s.inputs, s.outputs) < 16,
        "3 to 64 channels, 64 maps of 32x32: 2.6 ms, F4 4.0; 1 to 32: 0.37 ms, F4 1.3",
    ),
    Rule(
        Algorithm.WINOGRAD_2,
        lambda s: s.tiles < 24,
        "too few tiles of 4x4 to share a transformed kernel",
    ),
    Rule(
        Algorithm.WINOGRAD_4,
        lambda s: True,
        "64 to 64 channels, 64 maps of 32x32: 18 ms, F2 27, direct 47; 16 to 16: 0.8, 1.6, 1.6",
    ),
)

# Tests force the algorithm of every pass here.
forced: Algorithm | None = None


def choose(shape: Shape, precision: Precision) -> Algorithm:
    """The algorithm of a pass of this shape; `high` precision keeps F(4x4, 3x3) out."""
    if forced is not None:
        return forced
    chosen = next(rule.algorithm for rule in RULES if rule.applies(shape))
    if precision == "high" and chosen is Algorithm.WINOGRAD_4:
        return Algorithm.WINOGRAD_2
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
    size = tuple(
        max(0, (n + sum(pads) - k) // step + 1)
        for n, pads, k, step in zip(
            x.shape[1:3], settings.padding, kernel.shape[:2], settings.strides, strict=True
        )
    )
    shape = (x.shape[0], *size, kernel.shape[3])
    return _call("conv_forward", x, kernel, shape, _shape(x, kernel, shape, settings), settings)


def _forward(x: jax.Array, kernel: jax.Array, settings: _Settings) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, settings), (x, kernel)


def _backward(settings: _Settings, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Two calls, without side effects: XLA drops the one whose result nobody uses.
    x, kernel = saved
    shape = _shape(x, kernel, dy.shape, settings)
    dx = _call("conv_input_gradient", dy, kernel, x.shape, shape, settings)
    dkernel = _call("conv_kernel_gradient", x, dy, kernel.shape, shape, settings)
    return dx, dkernel


_convolve.defvjp(_forward, _backward)


def _shape(x: jax.Array, kernel: jax.Array, y_shape: tuple[int, ...], settings: _Settings) -> Shape:
    return Shape(
        images=x.shape[0],
        input_size=x.shape[1:3],
        output_size=y_shape[1:3],
        inputs=kernel.shape[2],
        outputs=kernel.shape[3] // settings.groups,
        kernel_size=kernel.shape[:2],
        strides=settings.strides,
    )


def _call(
    target: str,
    a: jax.Array,
    b: jax.Array,
    result_shape: tuple[int, ...],
    shape: Shape,
    settings: _Settings,
) -> jax.Array:
    result = jax.ShapeDtypeStruct(result_shape, jnp.float32)
    return jax.ffi.ffi_call(f"flaxcls_{target}", result, vmap_method="sequential")(
        a,
        b,
        strides=np.asarray(settings.strides, np.int64),
        padding=np.asarray(settings.padding, np.int64).reshape(4),
        groups=np.int64(settings.groups),
        algorithm=np.int64(choose(shape, settings.precision)),
    )
