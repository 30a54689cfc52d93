"""The batch that crosses every room, and what turns its bytes into a network's input.

Images stay uint8 until they are on the device: a quarter of the traffic, and the conversion fuses
into the first operation that reads it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from flaxcls.errors import InputError

# Pixels histogrammed at a time: np.bincount copies them to int64, so this is 32 MB.
_CHUNK = 1 << 22


# NumPy's on the host, JAX's inside a step.
Array: TypeAlias = Any


class Batch(struct.PyTreeNode):
    """Examples on their way to a step; every array has N, the batch, as its first axis.

    image: uint8 (N, H, W, C).
    label: int32 (N,), or (N, 2) as (child, parent).
    mask: bool (N,), false on rows that only fill the batch up.
    index: int32 (N,), the example's position in its split; augmentation is keyed by it.
    box: float32 (N, 4), y0, x0, height, width relative to `image`, where the device is to crop.

    Any may be None where it is not needed: image and label where the device gathers them by index,
    box where nothing is cropped or decoding has done it.
    """

    image: Array = None
    label: Array = None
    mask: Array = None
    index: Array = None
    box: Array = None


@dataclass(frozen=True)
class Preprocess:
    """What every image goes through, in training, validation and prediction alike.

    size: side of the network's square input, pixels.
    channels: 1 or 3.
    mean, std: of pixels in [0, 1]; one number for all channels or one for each.

    Raises InputError for numbers that no image could be prepared with.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.size < 1:
            raise InputError(f"image size is {self.size}; it must be at least 1 pixel")
        if self.channels not in (1, 3):
            raise InputError(f"channels is {self.channels}; choose 1 (grey) or 3 (colour)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise InputError(
                    f"normalize.{name} has {len(values)} numbers for {self.channels} channels; "
                    "give one number, or one a channel"
                )
            if not np.isfinite(values).all():
                raise InputError(f"normalize.{name} is {values}; it must be finite numbers")
        if min(self.std) <= 0:
            raise InputError(
                f"normalize.std is {self.std}; it must be positive (0 means that a channel has the "
                "same value in every pixel: check the images, or give the numbers yourself)"
            )


def preprocess(image: jax.Array, p: Preprocess, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Resizes, brings to the network's channels and standardises.

    image: uint8 (N, H, W, C), C = 1 or p.channels. Returns dtype (N, size, size, channels),
    computed in at least float32. Raises InputError for other channels.
    """
    return normalize(resize(image, p.size, dtype), p, dtype)


def resize(image: jax.Array, size: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Bilinear with antialiasing, the definition of Pillow's `Image.resize(..., BILINEAR)`.

    image: (N, H, W, C). Returns it as it is where H = W = size, otherwise at least float32
    (N, size, size, C) in pixel values, which Pillow would have rounded twice.
    """
    _, h, w, _ = image.shape
    if (h, w) == (size, size):
        return image
    compute = jnp.promote_types(dtype, jnp.float32)
    rows, columns = (jnp.asarray(_resize_weights(old, size), compute) for old in (h, w))
    return separable(image, rows, columns)


def normalize(image: jax.Array, p: Preprocess, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(pixel / 255 - mean) / std, one channel becoming as many as the network wants.

    image: (N, H, W, C) in pixel values 0 to 255, C = 1 or p.channels. Returns dtype
    (N, H, W, channels), computed in at least float32. Raises InputError for other channels.
    """
    n, h, w, c = image.shape
    if c not in (1, p.channels):
        other = ", or give the network 3 channels" if c == 3 else ""
        raise InputError(
            f"images have {c} channels and the network takes {p.channels}; "
            f"decode them with {p.channels}{other}"
        )
    compute = jnp.promote_types(dtype, jnp.float32)
    pixels = image.astype(compute) / 255
    scaled = (pixels - np.asarray(p.mean, compute)) / np.asarray(p.std, compute)
    return jnp.broadcast_to(scaled, (n, h, w, p.channels)).astype(dtype)


def separable(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Each output row a weighted sum of input rows, then the same for columns.

    image: (N, H, W, C) of any dtype. rows: float (P, H) or (N, P, H), columns: (Q, W) or (N, Q, W).
    Returns the weights' dtype (N, P, Q, C).
    """
    batched = "n" if rows.ndim == 3 else ""
    # HIGHEST: tensor cores would round pixels of 0 to 255 to 8 or 11 bits.
    narrow = jnp.einsum(
        f"nhwc,{batched}qw->nhqc", image.astype(columns.dtype), columns, precision="highest"
    )
    return jnp.einsum(f"nhqc,{batched}ph->npqc", narrow, rows, precision="highest")


def _resize_weights(old: int, new: int) -> np.ndarray:
    """Float64 (new, old); row i weighs the old pixels that make the new pixel i, sum 1."""
    scale = old / new
    support = max(scale, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1 - np.abs(np.arange(old) + 0.5 - centre) / support)
    return weights / weights.sum(axis=1, keepdims=True)


def dataset_statistics(
    image_batches: Iterable[np.ndarray],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel over all pixels.

    image_batches: uint8 (N, H, W, C) arrays, one C throughout; they are read once, in order.
    Returns (mean, std), C numbers each, of pixels in [0, 1]. Sums are exact integers, so neither
    order nor batch size changes a bit. Raises InputError without a single pixel.
    """
    counts = np.zeros((0, 256), np.int64)
    for image in image_batches:
        channels = image.shape[-1]
        if len(counts) == 0:
            counts = np.zeros((channels, 256), np.int64)
        if len(counts) != channels:
            raise InputError(
                f"images have {len(counts)} and {channels} channels; bring them all to one number"
            )
        pixels = image.reshape(-1, channels)
        for start in range(0, len(pixels), _CHUNK):
            for channel in range(channels):
                part = pixels[start : start + _CHUNK, channel]
                counts[channel] += np.bincount(part, minlength=256)
    total = int(counts[0].sum()) if len(counts) else 0
    if total == 0:
        raise InputError("no images to take mean and std from; give normalize numbers instead")
    levels = np.arange(256)
    mean, std = [], []
    for histogram in counts:
        # Python integers, since total * second overflows int64 from 12 million pixels on.
        first = int(histogram @ levels)
        second = int(histogram @ levels**2)
        mean.append(first / total / 255)
        std.append(sqrt(total * second - first * first) / total / 255)
    return tuple(mean), tuple(std)
