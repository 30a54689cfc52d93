"""Augmentation of a batch inside the compiled step, and the boxes of random resized crops.

An example's randomness is keyed by its epoch and its index alone, so it looks the same in any batch
order, batch size or device count; only the partner of mixup and cutmix belongs to the batch. Each
kind of augmentation draws from a fold of its own, so turning one on leaves the others as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log, radians
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxcls.batch import Batch, Preprocess, normalize, resize, separable
from flaxcls.errors import InputError

# What is folded into an example's key for each kind; changing a number changes every run.
_HORIZONTAL_FLIP, _VERTICAL_FLIP, _CROP, _ROTATION, _TRANSLATION, _ERASING, _MIXING = range(7)

# torchvision's number of tries before a box that does not fit is given up.
_ATTEMPTS = 10

# An example's random numbers: (kind, count) -> float32 (N, count), uniform in [0, 1).
Draw = Callable[[int, int], jax.Array]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order; the default does nothing.

    random_resized_crop: cut out a random box and bring it to size. The box comes from `draw_boxes`:
        an area within `crop_area` (least and greatest part of the image), a ratio width / height
        within `crop_ratio`.
    horizontal_flip, vertical_flip: probabilities.
    rotation: degrees at most, either way; bilinear, black outside.
    translation: part of the side at most, either way along each axis; whole pixels, black outside.
    crop_padding: black pixels put around the image before a random crop of the old size.
    erasing: probability of setting a rectangle to `erasing_value`, after normalisation; its area is
        within `erasing_area`, its ratio height / width within `erasing_ratio`.
    mixup, cutmix: alpha of the Beta distribution, 0 is off; with both, a batch gets one of them.

    Raises InputError for numbers out of range.
    """

    random_resized_crop: bool = False
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    crop_padding: int = 0
    erasing: float = 0.0
    erasing_area: tuple[float, float] = (0.02, 0.33)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)
    erasing_value: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip", "erasing"):
            _require(name, getattr(self, name), 0, 1, "a probability")
        _require("rotation", self.rotation, 0, 180, "degrees")
        _require("translation", self.translation, 0, 1, "a part of the image's side")
        for name in ("mixup", "cutmix"):
            _require(name, getattr(self, name), 0, float("inf"), "the alpha of a Beta distribution")
        if self.crop_padding < 0 or self.crop_padding != int(self.crop_padding):
            raise InputError(
                f"augment.crop_padding is {self.crop_padding}; give a whole number of pixels, "
                "0 for none"
            )
        if not isfinite(self.erasing_value):
            raise InputError(f"augment.erasing_value is {self.erasing_value}; it must be finite")
        for name, greatest in (
            ("crop_area", 1.0),
            ("crop_ratio", float("inf")),
            ("erasing_area", 1.0),
            ("erasing_ratio", float("inf")),
        ):
            bounds = tuple(float(value) for value in getattr(self, name))
            if (
                len(bounds) != 2
                or not 0 < bounds[0] <= bounds[1] <= greatest
                or not isfinite(bounds[1])
            ):
                limit = "at most 1" if greatest == 1 else "finite"
                raise InputError(
                    f"augment.{name} is {bounds}; give its least and its greatest value, "
                    f"in this order, above 0 and {limit}"
                )
            object.__setattr__(self, name, bounds)

    @property
    def mixes(self) -> bool:
        """Whether labels become soft."""
        return self.mixup > 0 or self.cutmix > 0


def _require(name: str, value: float, least: float, greatest: float, unit: str) -> None:
    # True would silently be a probability of 1.
    if isinstance(value, bool) or not (least <= value <= greatest and isfinite(value)):
        upper = f" to {greatest:g}" if isfinite(greatest) else " or more"
        raise InputError(f"augment.{name} is {value}; give {unit}, {least:g}{upper}")


def augment(
    batch: Batch,
    *,
    key: jax.Array,
    epoch: ArrayLike,
    augmentation: Augmentation,
    preprocess: Preprocess,
    num_classes: int,
    step: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Augments and preprocesses the images of a batch; jit-able, `augmentation` static.

    batch: image uint8 (N, H, W, C), label int32 (N,) or (N, 2), index int32 (N,); box float32
        (N, 4) where the device is to crop. With random_resized_crop and no box the images are
        taken as cropped already. Padding rows (mask false) are never mixed into real ones.
    key: the augmentation stream. epoch: int. step: int, keys what a batch shares when mixing.

    Returns images dtype (N, size, size, channels), computed in at least float32, and labels: the
    batch's, or float (N, num_classes) when mixing. Raises InputError for what does not fit
    together.
    """
    if batch.label is None:
        raise InputError("augmentation is for training: give the batch labels")
    compute = jnp.promote_types(dtype, jnp.float32)
    epoch_key = jax.random.fold_in(key, epoch)
    draw = _per_example(epoch_key, batch.index)
    images = _geometry(batch, draw, augmentation, preprocess.size, compute)
    images = normalize(images, preprocess, compute)
    if augmentation.erasing:
        images = _erase(images, draw(_ERASING, 3 + 2 * _ATTEMPTS), augmentation)
    labels = batch.label
    if augmentation.mixes:
        if step is None:
            raise InputError("mixup and cutmix draw their numbers once a step: pass step=")
        step_key = jax.random.fold_in(jax.random.fold_in(epoch_key, step), _MIXING)
        images, labels = _mix(images, labels, batch.mask, step_key, augmentation, num_classes)
    return images.astype(dtype), labels


def _per_example(epoch_key: jax.Array, index: jax.Array | None) -> Draw:
    if index is None:
        raise InputError("augmentation is keyed by the example's index: give the batch one")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(epoch_key, index)

    def draw(kind: int, count: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, kind), (count,), jnp.float32)

        return jax.vmap(one)(keys)

    return draw


def _geometry(
    batch: Batch, draw: Draw, augmentation: Augmentation, size: int, dtype: DTypeLike
) -> jax.Array:
    """Crop, flips, shifts and rotation: (N, size, size, C) in pixel values, uint8 or dtype.

    Each says where in the cropped, resized image an output pixel comes from; they are composed
    first, so that the image is read once.
    """
    if batch.box is not None and not augmentation.random_resized_crop:
        raise InputError("the batch has crop boxes, but augment.random_resized_crop is off")
    if augmentation.crop_padding >= size:
        raise InputError(
            f"augment.crop_padding is {augmentation.crop_padding} for images of {size} pixels; "
            "it must be smaller"
        )
    shift, flips = _shift(draw, augmentation, size), _flips(draw, augmentation)
    if augmentation.rotation:
        image = _crop(batch, size, dtype)
        turn = 2 * draw(_ROTATION, 1)[:, 0].astype(dtype) - 1
        return _rotate(image, radians(augmentation.rotation) * turn, shift, flips)
    if shift is None and flips is None:
        return _crop(batch, size, dtype)
    position = jnp.broadcast_to(jnp.arange(size)[:, None], (len(batch.image), size, 2))
    if shift is not None:
        position = position + shift[:, None]
    if flips is not None:
        position = jnp.where(flips[:, None], size - 1 - position, position)
    return _crop(batch, size, dtype, position)


def _flips(draw: Draw, augmentation: Augmentation) -> jax.Array | None:
    """Bool (N, 2), (vertical, horizontal), or None where neither can happen."""
    if not (augmentation.horizontal_flip or augmentation.vertical_flip):
        return None
    vertical = draw(_VERTICAL_FLIP, 1) < augmentation.vertical_flip
    horizontal = draw(_HORIZONTAL_FLIP, 1) < augmentation.horizontal_flip
    return jnp.concatenate([vertical, horizontal], axis=1)


def _shift(draw: Draw, augmentation: Augmentation, size: int) -> jax.Array | None:
    """Int32 (N, 2): how far below and right of an output pixel its source lies, or None."""
    shift = None
    if augmentation.crop_padding:
        choices = 2 * augmentation.crop_padding + 1
        start = jnp.floor(draw(_CROP, 2) * choices).astype(jnp.int32)
        shift = start - augmentation.crop_padding
    if augmentation.translation:
        moved = augmentation.translation * size * (2 * draw(_TRANSLATION, 2) - 1)
        moved = jnp.round(moved).astype(jnp.int32)
        shift = -moved if shift is None else shift - moved
    return shift


def _crop(
    batch: Batch, size: int, dtype: DTypeLike, position: jax.Array | None = None
) -> jax.Array:
    """The batch's boxes, or whole images, brought to size, then read at `position`.

    position: int32 (N, size, 2), the row and column of the resized image that becomes each output
    row and column, 0 outside; None reads every pixel where it is.
    Returns (N, size, size, C) in pixel values: uint8 where nothing was interpolated, else dtype.
    """
    if batch.box is None:
        image = resize(batch.image, size, dtype)
        return image if position is None else _take(image, position)
    if position is None:
        position = jnp.broadcast_to(jnp.arange(size)[:, None], (len(batch.image), size, 2))
    _, h, w, _ = batch.image.shape
    box = batch.box.astype(dtype)
    rows = _box_weights(box[:, 0], box[:, 2], position[:, :, 0], h, size)
    columns = _box_weights(box[:, 1], box[:, 3], position[:, :, 1], w, size)
    return separable(batch.image, rows, columns)


def _box_weights(
    start: jax.Array, length: jax.Array, position: jax.Array, old: int, new: int
) -> jax.Array:
    """Weights of `old` pixels for each position in the box brought to `new` pixels, (N, P, old).

    Antialiased bilinear, that of Pillow's `Image.resize(box=...)`: pixels just outside the box
    count where the filter reaches them. Rows of positions outside 0..new - 1 are 0.
    """
    scale = (length * (old / new))[:, None]
    centre = start[:, None] * old + (position.astype(scale.dtype) + 0.5) * scale
    distance = jnp.abs(jnp.arange(old) + 0.5 - centre[:, :, None])
    weights = jnp.maximum(0, 1 - distance / jnp.maximum(scale, 1)[:, :, None])
    total = weights.sum(axis=2, keepdims=True)
    inside = (position >= 0) & (position < new)
    # A padding row's empty box reaches no pixel; it becomes 0, not NaN.
    return jnp.where(inside[:, :, None], weights / jnp.maximum(total, 1e-6), 0)


def _take(image: jax.Array, position: jax.Array) -> jax.Array:
    """image[n, rows, columns], 0 where a position (int32 (N, P, 2)) lies outside."""
    rows, columns = position[:, :, None, 0], position[:, None, :, 1]
    _, h, w, _ = image.shape
    inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    taken = jnp.take_along_axis(image, rows[..., None], axis=1, mode="clip")
    taken = jnp.take_along_axis(taken, columns[..., None], axis=2, mode="clip")
    return jnp.where(inside[..., None], taken, 0)


def _rotate(
    image: jax.Array, angle: jax.Array, shift: jax.Array | None, flips: jax.Array | None
) -> jax.Array:
    """Rotation about the centre, shift and flips in one bilinear sampling, 0 outside.

    image: (N, S, S, C) of any dtype. angle: float (N,), radians. shift: int32 (N, 2), as `_shift`
    gives it, along the axes of the result. Returns angle's dtype (N, S, S, C).
    """
    n, size, _, c = image.shape
    centre = (size - 1) / 2
    axis = jnp.arange(size, dtype=angle.dtype) - centre
    y, x = axis[None, :, None], axis[None, None, :]
    if shift is not None:
        y, x = y + shift[:, 0, None, None], x + shift[:, 1, None, None]
    cosine, sine = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    y, x = cosine * y + sine * x, cosine * x - sine * y
    if flips is not None:
        y = jnp.where(flips[:, 0, None, None], -y, y)
        x = jnp.where(flips[:, 1, None, None], -x, x)
    # A ring of zeros makes every tap outside the image one of them.
    y, x = jnp.clip(y + (centre + 1), 0, size + 1), jnp.clip(x + (centre + 1), 0, size + 1)
    y0, x0 = jnp.floor(y), jnp.floor(x)
    down, right = (y - y0)[..., None], (x - x0)[..., None]
    width = size + 2
    pixels = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, width * width, c)
    corner = (y0.astype(jnp.int32) * width + x0.astype(jnp.int32)).reshape(n, size * size, 1)

    def tap(below: int, beside: int) -> jax.Array:
        at = corner + (below * width + beside)
        taken = jnp.take_along_axis(pixels, at, axis=1, mode="clip")
        return taken.reshape(n, size, size, c).astype(angle.dtype)

    upper = tap(0, 0) * (1 - right) + tap(0, 1) * right
    lower = tap(1, 0) * (1 - right) + tap(1, 1) * right
    return upper * (1 - down) + lower * down


def _erase(image: jax.Array, uniform: jax.Array, augmentation: Augmentation) -> jax.Array:
    """One rectangle an image set to a constant (Zhong et al. 2020), by torchvision's rules.

    image: float (N, H, W, C). uniform: float32 (N, 3 + 2 * _ATTEMPTS). Where no try gives a
    rectangle smaller than the image on both sides, the image stays.
    """
    _, h, w, _ = image.shape
    area = _between(uniform[:, 3 : 3 + _ATTEMPTS], augmentation.erasing_area) * (h * w)
    low, high = augmentation.erasing_ratio
    ratio = jnp.exp(_between(uniform[:, 3 + _ATTEMPTS :], (log(low), log(high))))
    height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (height < h) & (width < w)
    tries = jnp.arange(_ATTEMPTS)
    first = tries == jnp.where(fits, tries, _ATTEMPTS).min(axis=1, keepdims=True)
    height = jnp.where(first, height, 0).sum(axis=1, keepdims=True)
    width = jnp.where(first, width, 0).sum(axis=1, keepdims=True)
    top = jnp.floor(uniform[:, 1:2] * (h - height + 1))
    left = jnp.floor(uniform[:, 2:3] * (w - width + 1))
    height = jnp.where(uniform[:, :1] < augmentation.erasing, height, 0)
    rows = (jnp.arange(h) >= top) & (jnp.arange(h) < top + height)
    columns = (jnp.arange(w) >= left) & (jnp.arange(w) < left + width)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, augmentation.erasing_value, image)


def _between(uniform: Any, bounds: Any) -> Any:
    return bounds[0] + uniform * (bounds[1] - bounds[0])


def _mix(
    image: jax.Array,
    label: jax.Array,
    mask: jax.Array | None,
    key: jax.Array,
    augmentation: Augmentation,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with the batch in reverse, as in timm.

    One lambda and one rectangle a batch. Returns image's dtype (N, H, W, C) and (N, num_classes).
    """
    if label.ndim != 1:
        raise InputError(
            f"mixup and cutmix mix one label an image and these have {label.shape[1]}; set "
            "augment.mixup and augment.cutmix to 0"
        )
    n, h, w, _ = image.shape
    choice_key, share_key, centre_key = jax.random.split(key, 3)
    alphas = augmentation.mixup, augmentation.cutmix
    cut = jax.random.bernoulli(choice_key) if all(alphas) else jnp.asarray(alphas[1] > 0)
    alpha = jnp.where(cut, alphas[1], alphas[0]).astype(jnp.float32)
    share = jax.random.beta(share_key, alpha, alpha, (), jnp.float32)
    own = jnp.where(cut, 1 - _rectangle(1 - share, centre_key, h, w), share)
    share = jnp.where(cut, own.mean(), share)
    mixed = jnp.ones((n,), bool) if mask is None else jnp.flip(mask)
    own = jnp.where(mixed[:, None, None], own, 1).astype(image.dtype)[..., None]
    share = jnp.where(mixed, share, 1).astype(image.dtype)[:, None]
    target = jax.nn.one_hot(label, num_classes, dtype=image.dtype)
    return (
        image * own + jnp.flip(image, 0) * (1 - own),
        target * share + jnp.flip(target, 0) * (1 - share),
    )


def _rectangle(area: jax.Array, key: jax.Array, h: int, w: int) -> jax.Array:
    """Float32 (h, w): 1 in a rectangle of that part of the image, about a random centre, else 0."""
    side = jnp.sqrt(area)
    centre = jnp.floor(jax.random.uniform(key, (2,), jnp.float32) * jnp.array([h, w]))
    half_height, half_width = jnp.floor(h * side) // 2, jnp.floor(w * side) // 2
    rows, columns = jnp.arange(h), jnp.arange(w)
    rows = (rows >= centre[0] - half_height) & (rows < centre[0] + half_height)
    columns = (columns >= centre[1] - half_width) & (columns < centre[1] + half_width)
    return (rows[:, None] & columns[None, :]).astype(jnp.float32)


def draw_boxes(
    seed: int,
    epoch: int,
    index: np.ndarray,
    aspect: np.ndarray,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of random resized crops, by torchvision's RandomResizedCrop, in continuous units.

    seed, epoch: int. index: int (N,), positions in the split. aspect: float (N,) or one number,
    width / height of the original images. area: least and greatest part of the image; ratio: of
    the box's width / height in pixels, log-uniform.

    Returns float32 (N, 4), y0, x0, height, width relative to the original, within [0, 1]. A box
    depends on (seed, epoch, index, aspect) alone. After 10 tries that do not fit, the greatest
    centred box of the nearest allowed ratio.
    """
    index = np.asarray(index)
    aspect = np.broadcast_to(np.asarray(aspect, np.float64), index.shape)
    state = np.array([seed % 2**64], np.uint64)
    for part in (np.array([epoch]), index):
        state = _hash(_hash(state) + part.astype(np.uint64) * _STRIDE)
    height, width = np.empty(index.shape), np.empty(index.shape)
    pending = np.arange(len(index))
    for attempt in range(_ATTEMPTS):
        scale = _between(_uniform(state[pending], 2 * attempt), area)
        shape = np.exp(_between(_uniform(state[pending], 2 * attempt + 1), np.log(ratio)))
        shape /= aspect[pending]
        height[pending], width[pending] = np.sqrt(scale / shape), np.sqrt(scale * shape)
        pending = pending[(height[pending] > 1) | (width[pending] > 1)]
    height[pending] = np.minimum(1, aspect[pending] / ratio[0])
    width[pending] = np.minimum(1, ratio[1] / aspect[pending])
    y, x = _uniform(state, 2 * _ATTEMPTS), _uniform(state, 2 * _ATTEMPTS + 1)
    y[pending] = x[pending] = 0.5
    size = np.stack([height, width], axis=1).astype(np.float32)
    # The space left is taken in float32 as well, so that no sum exceeds 1 by rounding.
    start = np.minimum(np.stack([y, x], axis=1) * (1 - size), 1 - size, dtype=np.float32)
    return np.concatenate([start, size], axis=1)


_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def _hash(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014, figure 16) of uint64 values."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniform(state: np.ndarray, number: int) -> np.ndarray:
    """The draw of that number from each generator: float64 in [0, 1), 53 random bits."""
    bits = _hash(state + np.array([number + 1], np.uint64) * _STRIDE) >> np.uint64(11)
    return bits * 2.0**-53
