"""2-D convolution, NHWC by HWIO."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.custom_derivatives import SymbolicZero

from flaxcls.ops.backend import implementation, precision, use_native
from flaxcls.ops.channels import spread
from flaxcls.ops.native import convolution
from flaxcls.ops.windows import Padding, Sides, sides, strided_slices


class Conv(nn.Module):
    """Convolution with the parameters, names and results of `flax.linen.Conv`.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel.
      strides: step of the window in height and width.
      padding: `SAME`, `VALID`, or ((top, bottom), (left, right)).
      use_bias: whether to add a bias to each channel.
      dtype: dtype of the computation; None: what input and parameters promote to.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of `kernel` (kernel height, kernel width, input channels, features).
      bias_init: initialiser of `bias` (features,).
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (N, H, W, C) -> (N, H', W', features)."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, self.strides, self.padding)
        return y if bias is None else y + spread(bias, y)


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = (1, 1), padding: Padding = "SAME"
) -> jax.Array:
    """x (N, H, W, C) by kernel (kernel height, kernel width, C, O) -> (N, H', W', O)."""
    if use_native() and x.dtype in (jnp.float32, jnp.bfloat16):
        around = sides(x.shape[1:3], kernel.shape[:2], strides, padding)
        return convolution.convolve(x, kernel, strides, around, precision=precision())
    if implementation() == "cpu":
        windows = _small_map_windows(x.shape[1:3], kernel.shape[:2], strides, padding)
        if windows:
            return _convolve_small_map(x, kernel, windows)
        if x.dtype == jnp.float64:
            return _convolve_patches(x, kernel, strides, padding)
        around = sides(x.shape[1:3], kernel.shape[:2], strides, padding)
        if x.dtype == jnp.float32 and _shares_windows(x, kernel, strides, around):
            return _convolve_few_channels(x, kernel, around)
    return _convolve_plain(x, kernel, strides, padding)


def _convolve_plain(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# The part of the map that an output sees, and the part of the kernel that lies on it.
_Window = tuple[tuple[slice, slice], tuple[slice, slice]]


def _small_map_windows(
    map_size: Sequence[int], kernel_size: Sequence[int], strides: Sequence[int], padding: Padding
) -> list[list[_Window]]:
    """Returns the windows of the outputs, row by row, or none where the map is not small.

    Small are maps of which a centred kernel of stride 1 covers the whole from every pixel, and
    those with at most 4 outputs from at most 16 pixels.
    """
    around = sides(map_size, kernel_size, strides, padding)
    lines = []
    for n, k, stride, (before, after) in zip(map_size, kernel_size, strides, around, strict=True):
        starts = range(-before, n + after - k + 1, stride)
        seen = [(max(0, start), min(n, start + k)) for start in starts]
        if any(last <= first for first, last in seen):
            return []  # an output that sees padding alone
        lines.append(
            [
                (slice(first, last), slice(first - start, last - start))
                for start, (first, last) in zip(starts, seen, strict=True)
            ]
        )
    rows, columns = lines
    whole = all(
        window == slice(0, n) for n, line in zip(map_size, lines, strict=True) for window, _ in line
    )
    few = len(rows) * len(columns) <= 4 and map_size[0] * map_size[1] <= 16
    if not rows or not columns or not (whole or few):
        return []
    return [[((i, j), (ki, kj)) for j, kj in columns] for i, ki in rows]


def _convolve_small_map(x: jax.Array, kernel: jax.Array, windows: list[list[_Window]]) -> jax.Array:
    """Convolution of a map so small that each output can have a matmul of its own.

    x (N, H, W, C) by kernel (kernel height, kernel width, C, O) -> (N, H', W', O). The matmul is
    one of what the output sees with the part of the kernel that lies on it; nothing is multiplied
    by padding. With its gradients, 3x3, 512 to 512 channels, batch 64, on 2x2 maps: 2,155 ms as a
    convolution, 21 ms as one matmul on padded patches, 12 ms so. The input gradient alone of
    stride 2, 256 to 512 channels, batch 32, from 4x4 to 2x2: 567 ms as a convolution, 15 ms so.
    """

    def output(window: _Window) -> jax.Array:
        seen, part = window
        pixels = x[:, *seen]
        return pixels.reshape(x.shape[0], math.prod(pixels.shape[1:])) @ kernel[part].reshape(
            -1, kernel.shape[-1]
        )

    return jnp.stack([jnp.stack([output(w) for w in row], axis=1) for row in windows], axis=1)


def _convolve_patches(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """`convolve` as one matmul on patches.

    XLA:CPU runs float64 convolutions in a plain loop: with its gradients, 3x3, 512 to 512
    channels, batch 16, on 4x4 maps: 6,990 ms as a convolution, 75 ms so. float32 gains nothing.
    """
    rows, columns, _, features = kernel.shape
    slices = strided_slices(x, (rows, columns), strides, padding, fill=0.0)
    return jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, features)


# Of the windows that `_convolve_few_channels` writes down, in numbers: 64 MB.
_MOST_SHARED = 2**24


def _shares_windows(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Sides
) -> bool:
    """Whether `_convolve_few_channels` takes the convolution: few channels, a step of 1, no more
    memory than it is worth, and padding that adds. A batch of any size may be too large."""
    n, h, w, c = x.shape
    if not isinstance(n, int):
        return False
    rows, columns, _, _ = kernel.shape
    together = _together(c)
    written = n * h * (w / together) * rows * (together + columns - 1) * c
    adds = min(min(pair) for pair in padding) >= 0
    return c <= 3 and tuple(strides) == (1, 1) and columns > 1 and adds and written <= _MOST_SHARED


def _together(channels: int) -> int:
    """How many outputs share a window."""
    return 4 if channels == 1 else 2


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve_few_channels(x: jax.Array, kernel: jax.Array, padding: Sides) -> jax.Array:
    """Convolution of stride 1 whose outputs are made several side by side by one matmul.

    x (N, H, W, C) by kernel (kernel height, kernel width, C, O) -> (N, H', W', O). A convolution of
    images of 1 or 3 channels has too little to multiply: neighbours share their windows instead,
    and the kernel is repeated, shifted, with zeros around it. 5x5 of 64x28x28x1 to 32 channels:
    0.9 ms for 1.9; 3x3 of 32x128x128x3 to 9: 10 ms for 18. Its derivatives are the convolution's,
    which are the faster ones: 0.8 ms for 3.7 and 9 for 24.
    """
    together = _together(x.shape[-1])
    (top, bottom), (left, right) = padding
    n, h, w, c = x.shape
    rows, columns, _, features = kernel.shape
    height, width = h + top + bottom - rows + 1, w + left + right - columns + 1
    if height < 1 or width < 1:
        return _convolve_plain(x, kernel, (1, 1), padding)
    blocks, seen = -(-width // together), together + columns - 1
    beyond = -(-(columns - 1) // together)  # blocks to the right that a block's windows reach
    missing = (blocks + beyond) * together - w - left
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, max(0, missing)), (0, 0)))
    x = x[:, :, : (blocks + beyond) * together]
    x = x.reshape(n, h + top + bottom, blocks + beyond, together * c)
    lines = jnp.concatenate([x[:, :, i : i + blocks] for i in range(beyond + 1)], axis=-1)
    lines = lines[..., : seen * c]
    patches = jnp.concatenate([lines[:, i : i + height] for i in range(rows)], axis=-1)
    shifted = [
        jnp.pad(kernel, ((0, 0), (i, together - 1 - i), (0, 0), (0, 0))) for i in range(together)
    ]
    matrix = jnp.stack(shifted, axis=3).reshape(rows * seen * c, together * features)
    return (patches @ matrix).reshape(n, height, blocks * together, features)[:, :, :width]


@partial(_convolve_few_channels.defjvp, symbolic_zeros=True)
def _few_channels_jvp(padding, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve_few_channels(x, kernel, padding)
    pairs = [(dx, kernel), (x, dkernel)]
    known = [p for p in pairs if not any(isinstance(a, SymbolicZero) for a in p)]
    if not known:
        return y, jnp.zeros_like(y)
    return y, sum(_convolve_plain(*pair, (1, 1), padding) for pair in known)
