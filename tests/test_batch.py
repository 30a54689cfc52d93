"""Preprocessing against NumPy and Pillow, statistics against NumPy and Fashion-MNIST's own."""

import gzip
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxcls.batch import Batch, Preprocess, dataset_statistics, preprocess, resize
from flaxcls.errors import InputError

FASHION_MNIST = Path(__file__).parents[2] / "shared/data/fashion_mnist/train-images-idx3-ubyte.gz"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photos(n: int, h: int, w: int, c: int, seed: int = 0) -> np.ndarray:
    """Smooth noise over the whole range of uint8, so that resizing has something to average."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, h // 3 + 2, w // 3 + 2, c), np.uint8)
    return np.stack([_to_size(image, w, h) for image in coarse])


def _to_size(image: np.ndarray, w: int, h: int) -> np.ndarray:
    planes = [
        Image.fromarray(image[..., channel]).resize((w, h), Image.Resampling.BILINEAR)
        for channel in range(image.shape[-1])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_the_formula(channels):
    images = photos(4, 16, 16, channels)
    mean, std = IMAGENET if channels == 3 else ((0.286,), (0.353,))
    got = preprocess(images, Preprocess(16, channels, mean, std))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_grey_becomes_the_three_channels_of_the_network():
    images = photos(2, 8, 8, 1)
    got = preprocess(images, Preprocess(8, 3, *IMAGENET))
    expected = (np.repeat(images, 3, axis=-1) / 255 - IMAGENET[0]) / IMAGENET[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    one_number = preprocess(images, Preprocess(8, 3, (0.5,), (0.25,)))
    assert one_number.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(one_number[..., 0], one_number[..., 2])


@pytest.mark.parametrize(("channels", "stored"), [(1, 3), (3, 2), (1, 4)])
def test_channels_that_do_not_fit_are_named(channels, stored):
    images = np.zeros((1, 8, 8, stored), np.uint8)
    with pytest.raises(InputError, match=f"{stored} channels and the network takes {channels}"):
        preprocess(images, Preprocess(8, channels, (0.5,), (0.5,)))


@pytest.mark.parametrize(
    ("h", "w", "c", "size"), [(8, 8, 1, 32), (28, 28, 1, 224), (64, 48, 3, 40), (20, 50, 3, 32)]
)
def test_resizing_is_pillows_within_its_rounding(h, w, c, size):
    images = photos(3, h, w, c)
    got = np.asarray(jax.jit(partial(resize, size=size))(images))
    expected = np.stack([_to_size(image, size, size) for image in images])
    # Pillow rounds after each of its two passes; its float images are not rounded.
    assert np.abs(got - expected).max() <= 1.0 + 1e-3
    unrounded = np.stack([_to_size(image.astype(np.float32), size, size) for image in images])
    np.testing.assert_allclose(got, unrounded, rtol=1e-5, atol=1e-3)


def test_images_of_the_right_size_are_not_resampled():
    images = photos(2, 12, 12, 3)
    assert resize(images, 12) is images


def test_float64_stays_and_bfloat16_is_rounded_once():
    images = photos(2, 9, 9, 3)
    p = Preprocess(12, 3, *IMAGENET)
    single = preprocess(images, p)
    half = preprocess(images, p, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, single.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        double = preprocess(images, p, jnp.float64)
        assert double.dtype == jnp.float64
        assert preprocess(images, p).dtype == jnp.float32
        same_size = np.asarray(preprocess(images, Preprocess(9, 3, *IMAGENET), jnp.float64))
    np.testing.assert_allclose(double, single, rtol=1e-4, atol=1e-5)
    exact = (images / 255 - np.array(IMAGENET[0])) / np.array(IMAGENET[1])
    np.testing.assert_allclose(same_size, exact, rtol=1e-13, atol=1e-14)


def test_preprocess_is_a_static_argument():
    p = Preprocess(8, 3, list(IMAGENET[0]), np.array(IMAGENET[1]))
    assert p == Preprocess(8, 3, *IMAGENET)
    assert hash(p) == hash(Preprocess(8, 3, *IMAGENET))
    compiled = jax.jit(preprocess, static_argnums=(1, 2))
    assert compiled(np.zeros((1, 8, 8, 3), np.uint8), p).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, (0.5,), (0.5,)), "at least 1 pixel"),
        ((8, 2, (0.5,), (0.5,)), "channels is 2"),
        ((8, 3, (0.5, 0.5), (0.5,)), "mean has 2 numbers for 3"),
        ((8, 1, (0.5,), (0.5, 0.5, 0.5)), "std has 3 numbers for 1"),
        ((8, 1, (0.5,), (0.0,)), "must be positive"),
        ((8, 1, (float("nan"),), (0.5,)), "must be finite"),
    ],
)
def test_numbers_that_cannot_normalise_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Preprocess(*arguments)


def test_a_batch_without_boxes_passes_through_jit():
    batch = Batch(
        image=np.zeros((4, 8, 8, 1), np.uint8),
        label=np.arange(4, dtype=np.int32),
        mask=np.ones(4, bool),
        index=np.arange(4, dtype=np.int32),
    )
    out = jax.jit(lambda b: b.replace(label=b.label + 1))(batch)
    assert out.box is None
    assert out.label.tolist() == [1, 2, 3, 4]
    assert len(jax.tree.leaves(jax.tree.map(lambda x: x[:2], batch))) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_numpys_whatever_the_batches(channels):
    images = np.random.default_rng(0).integers(0, 256, (50, 17, 13, channels), np.uint8)
    images[..., 0] //= 3
    mean, std = dataset_statistics([images])
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)
    assert (mean, std) == dataset_statistics(iter(np.split(images[::-1], [1, 8, 40])))


def test_statistics_of_more_pixels_than_one_chunk():
    images = np.full((1, 2500, 2500, 1), 200, np.uint8)
    images[0, 0, 0, 0] = 0
    mean, std = dataset_statistics([images])
    assert mean[0] == pytest.approx(200 / 255 * (1 - 1 / 2500**2), rel=1e-14)
    assert std[0] == pytest.approx(images.std() / 255, rel=1e-9)


def test_statistics_of_nothing_or_of_mixed_channels_are_refused():
    with pytest.raises(InputError, match="no images"):
        dataset_statistics([])
    with pytest.raises(InputError, match="3 and 1 channels"):
        dataset_statistics([np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 1), np.uint8)])


def test_statistics_of_fashion_mnist():
    if not FASHION_MNIST.exists():
        pytest.skip(f"{FASHION_MNIST} is absent")
    pixels = np.frombuffer(gzip.decompress(FASHION_MNIST.read_bytes())[16:], np.uint8)
    images = pixels.reshape(60_000, 28, 28, 1)
    (mean,), (std,) = dataset_statistics(images[i : i + 5000] for i in range(0, 60_000, 5000))
    assert (round(mean, 5), round(std, 5)) == (0.28604, 0.35302)
