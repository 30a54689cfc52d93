"""2-D convolution, NHWC by HWIO."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from flaxcls.ops.backend import implementation, precision, use_native
from flaxcls.ops.channels import spread
from flaxcls.ops.native import convolution
from flaxcls.ops.windows import Padding, strided_slices


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
        sides = padding
        if isinstance(sides, str):
            sides = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, sides)
        rows, columns = sides
        return convolution.convolve(x, kernel, strides, (rows, columns), precision=precision())
    if implementation() == "cpu":
        windows = _small_map_windows(x.shape[1:3], kernel.shape[:2], strides, padding)
        if windows:
            return _convolve_small_map(x, kernel, windows)
        if x.dtype == jnp.float64:
            return _convolve_patches(x, kernel, strides, padding)
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
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(map_size, kernel_size, strides, padding)
    lines = []
    for n, k, stride, (before, after) in zip(map_size, kernel_size, strides, padding, strict=True):
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
        return pixels.reshape(len(x), -1) @ kernel[part].reshape(-1, kernel.shape[-1])

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
