"""Each augmentation against an independent expectation, and the promises about randomness."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flaxcls.augment import Augmentation, _hash, _rotate, augment, draw_boxes
from flaxcls.batch import Batch, Preprocess, preprocess
from flaxcls.errors import InputError

CLASSES = 10
STREAM = jax.random.key(7)
EVERYTHING_BUT_MIXING = Augmentation(
    random_resized_crop=True,
    horizontal_flip=0.5,
    vertical_flip=0.5,
    rotation=20,
    translation=0.1,
    crop_padding=2,
    erasing=0.5,
)
MOVING = Augmentation(vertical_flip=0.5, crop_padding=2)
ERASING = Augmentation(erasing=0.8, erasing_value=999.0)
MOVING_AND_ERASING = replace(MOVING, erasing=0.8, erasing_value=999.0)
BOTH = Augmentation(mixup=1.0, cutmix=1.0)
# Leaves pixel values as they are, so that the geometry can be read off the result.
PIXELS = (1 / 255,)


def batch_of(n: int, size: int, c: int = 1, *, seed: int = 0, least: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        image=rng.integers(least, 256, (n, size, size, c), np.uint8),
        label=rng.integers(0, CLASSES, n).astype(np.int32),
        mask=np.ones(n, bool),
        index=rng.permutation(10 * n)[:n].astype(np.int32),
    )


@cache
def _compiled(augmentation: Augmentation, p: Preprocess, dtype=jnp.float32):
    def run(batch, key, epoch, step):
        return augment(
            batch,
            key=key,
            epoch=epoch,
            step=step,
            augmentation=augmentation,
            preprocess=p,
            num_classes=CLASSES,
            dtype=dtype,
        )

    return jax.jit(run)


def run(batch, augmentation, *, epoch=0, step=0, key=STREAM, p=None, dtype=jnp.float32):
    _, h, _, c = batch.image.shape
    p = p or Preprocess(h, c, (0.0,), PIXELS)
    images, labels = _compiled(augmentation, p, dtype)(batch, key, epoch, step)
    return np.asarray(images), np.asarray(labels)


def take(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda x: x[rows], batch)


def with_boxes(batch: Batch) -> Batch:
    return batch.replace(box=draw_boxes(3, 0, batch.index, 1.0))


def close_to_share(hits: np.ndarray, share: float) -> bool:
    return abs(hits.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(hits))


# What each one does.


@pytest.mark.parametrize("stored", [16, 11])
def test_everything_off_is_preprocess_and_costs_nothing(stored):
    batch, p = batch_of(8, stored, 3), Preprocess(16, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    plain = jax.jit(lambda b: preprocess(b.image, p))
    images, labels = _compiled(Augmentation(), p)(batch, STREAM, 3, 4)
    np.testing.assert_array_equal(images, plain(batch))
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, batch.label)
    costs = [
        f.lower(*arguments).compile().cost_analysis()["flops"]
        for f, arguments in (
            (plain, (batch,)),
            (_compiled(Augmentation(), p), (batch, STREAM, 3, 4)),
        )
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("stored", [16, 8])
def test_flips_mirror_their_share_of_the_images_and_nothing_else(stored):
    batch = batch_of(1500, stored)
    p = Preprocess(16, 1, (0.5,), (0.5,))
    plain = run(batch, Augmentation(), p=p)[0]
    got = run(batch, Augmentation(horizontal_flip=0.3, vertical_flip=0.6), p=p)[0]
    variants = np.stack([plain, plain[:, :, ::-1], plain[:, ::-1], plain[:, ::-1, ::-1]])
    same = (variants == got).all((2, 3, 4))
    assert (same.sum(0) == 1).all()
    horizontal, vertical = same[1] | same[3], same[2] | same[3]
    assert close_to_share(horizontal, 0.3)
    assert close_to_share(vertical, 0.6)
    assert close_to_share(horizontal & vertical, 0.18)


def test_crop_padding_cuts_every_window_of_the_padded_image_equally_often():
    padding, n = 2, 1500
    batch = batch_of(n, 9, 3)
    got = run(batch, Augmentation(crop_padding=padding))[0].round()
    padded = np.pad(batch.image, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    seen = np.zeros((5, 5), int)
    for dy in range(5):
        for dx in range(5):
            window = padded[:, dy : dy + 9, dx : dx + 9]
            seen[dy, dx] = (window == got).all((1, 2, 3)).sum()
    assert seen.sum() == n
    chi_square = ((seen - n / 25) ** 2 / (n / 25)).sum()
    assert chi_square < 51  # 24 degrees of freedom: p = 0.001


def test_translation_moves_by_whole_pixels_up_to_its_share_with_black_behind():
    n, size, most = 1000, 12, 3
    batch = batch_of(n, size, least=1)
    got = run(batch, Augmentation(translation=0.25))[0].round()
    padded = np.pad(batch.image, ((0, 0), (size,) * 2, (size,) * 2, (0, 0)))
    moves = []
    for dy in range(-most, most + 1):
        for dx in range(-most, most + 1):
            window = padded[:, size - dy : 2 * size - dy, size - dx : 2 * size - dx]
            moves += [(dy, dx)] * int((window == got).all((1, 2, 3)).sum())
    assert len(moves) == n
    down = np.array(moves)[:, 0]
    assert (down.min(), down.max()) == (-most, most)
    # Rounding a uniform number of -3 to 3: the ends get half a share.
    assert close_to_share(down == most, 1 / 12)
    assert close_to_share(down == 0, 1 / 6)


@pytest.mark.parametrize("size", [15, 16])
def test_rotation_shift_and_flips_are_scipys_affine_transform(size):
    n = 12
    images = batch_of(n, size, 2).image.astype(np.float32)
    rng = np.random.default_rng(1)
    angle = rng.uniform(-np.pi, np.pi, n).astype(np.float32)
    shift, flips = rng.integers(-3, 4, (n, 2)), rng.random((n, 2)) < 0.5
    got = jax.jit(_rotate)(images, angle, shift, flips)
    centre = np.full(2, (size - 1) / 2)
    for i in range(n):
        cosine, sine = np.cos(angle[i]), np.sin(angle[i])
        mirror = np.diag(np.where(flips[i], -1.0, 1.0))
        matrix = mirror @ np.array([[cosine, sine], [-sine, cosine]])
        offset = centre + matrix @ (shift[i] - centre)
        for channel in range(2):
            expected = ndimage.affine_transform(
                images[i, ..., channel], matrix, offset, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(got[i, ..., channel], expected, atol=2e-3)


def test_rotation_turns_evenly_up_to_its_angle():
    n, size, most = 800, 33, 40
    bar = np.zeros((n, size, size, 1), np.uint8)
    bar[:, 16, 4:29] = 255
    got = run(batch_of(n, size).replace(image=bar), Augmentation(rotation=most))[0][..., 0]
    y, x = np.mgrid[:size, :size] - size // 2
    angle = np.rad2deg(
        np.arctan2(2 * (got * x * y).sum((1, 2)), (got * (x**2 - y**2)).sum((1, 2))) / 2
    )
    assert np.abs(angle).max() < most + 0.5
    assert np.abs(angle).max() > 0.97 * most
    assert abs(angle.mean()) < 4 * most / np.sqrt(3 * n)
    assert angle.std() == pytest.approx(most / np.sqrt(3), rel=0.06)


@pytest.mark.parametrize(("stored", "size"), [(20, 20), (20, 48), (48, 20)])
def test_random_resized_crop_is_pillows_resize_of_the_box(stored, size):
    n = 24
    coarse = batch_of(n, 6, 3).image
    images = np.stack([np.asarray(Image.fromarray(i).resize((stored, stored))) for i in coarse])
    batch = with_boxes(batch_of(n, stored, 3).replace(image=images))
    p = Preprocess(size, 3, (0.0,), PIXELS)
    got = run(batch, Augmentation(random_resized_crop=True), p=p)[0]
    for i, (y, x, h, w) in enumerate(batch.box.astype(float) * stored):
        expected = Image.fromarray(images[i]).resize(
            (size, size),
            Image.Resampling.BILINEAR,
            box=(x, y, min(x + w, stored), min(y + h, stored)),
        )
        # Pillow rounds after each of its two passes.
        assert np.abs(got[i] - np.asarray(expected)).max() <= 1.05


def test_flips_and_padding_act_on_the_crop():
    batch = with_boxes(batch_of(16, 20))
    crop = Augmentation(random_resized_crop=True)
    plain = run(batch, crop)[0]
    flipped = run(batch, replace(crop, horizontal_flip=1.0))[0]
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], atol=1e-3)
    moved = run(batch, replace(crop, crop_padding=3))[0]
    padded = np.pad(plain, ((0, 0), (3, 3), (3, 3), (0, 0)))
    for i in range(16):
        windows = np.lib.stride_tricks.sliding_window_view(padded[i, ..., 0], (20, 20))
        assert np.abs(windows - moved[i, ..., 0]).max((2, 3)).min() < 1e-3


def test_whole_image_boxes_change_nothing():
    batch = batch_of(4, 16, 3)
    batch = batch.replace(box=np.tile(np.float32([0, 0, 1, 1]), (4, 1)))
    got = run(batch, Augmentation(random_resized_crop=True))[0]
    np.testing.assert_allclose(got, batch.image, atol=1e-3)


def test_images_cropped_while_decoding_are_not_cropped_again():
    batch = batch_of(4, 16, 3)
    got = run(batch, Augmentation(random_resized_crop=True))[0]
    np.testing.assert_array_equal(got, run(batch, Augmentation())[0])


def erased_rectangles(got: np.ndarray, value: float) -> np.ndarray:
    """(top, left, height, width) for each image of one channel; all 0 where nothing is erased."""
    found = np.zeros((len(got), 4), int)
    for i, erased in enumerate(got[..., 0] == np.float32(value)):
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        if len(rows):
            found[i] = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert erased.sum() == found[i, 2] * found[i, 3], "not one full rectangle"
    return found


def test_erasing_sets_one_rectangle_of_the_asked_area_and_ratio_after_normalisation():
    n, size, value = 2000, 32, 0.4914
    batch = batch_of(n, size)
    p = Preprocess(size, 1, (0.1307,), (0.3081,))
    recipe = Augmentation(
        erasing=0.5, erasing_area=(0.02, 0.4), erasing_ratio=(0.3, 3.3), erasing_value=value
    )
    got, plain = run(batch, recipe, p=p)[0], run(batch, Augmentation(), p=p)[0]
    found = erased_rectangles(got, value)
    erased = found[:, 2] > 0
    assert close_to_share(erased, 0.5)
    np.testing.assert_array_equal(got[~erased], plain[~erased])
    untouched = got != np.float32(value)
    np.testing.assert_array_equal(got[untouched], plain[untouched])
    top, left, height, width = found[erased].T
    assert max(height.max(), width.max()) < size
    # Sides are rounded to whole pixels: half a pixel either way.
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * size**2).all()
    assert ((height - 0.5) * (width - 0.5) <= 0.4 * size**2).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 3.3).all()
    reference = np.array([_torchvision_erasing(i, size, (0.02, 0.4), (0.3, 3.3)) for i in range(n)])
    expected = (reference[:, 2] * reference[:, 3]).mean()
    assert (height * width).mean() == pytest.approx(expected, rel=0.06)
    assert (top + height / 2).mean() == pytest.approx(size / 2, rel=0.05)
    assert (left + width / 2).mean() == pytest.approx(size / 2, rel=0.05)


def _torchvision_erasing(seed, size, area, ratio):
    """RandomErasing.get_params, as its documentation describes it."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        erased = size * size * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        h, w = round(np.sqrt(erased * aspect)), round(np.sqrt(erased / aspect))
        if h < size and w < size:
            return rng.integers(0, size - h + 1), rng.integers(0, size - w + 1), h, w
    return 0, 0, 0, 0


def test_erasing_that_never_fits_leaves_the_image():
    batch = batch_of(32, 8)
    recipe = Augmentation(erasing=1.0, erasing_area=(1.0, 1.0), erasing_ratio=(1.0, 1.0))
    np.testing.assert_array_equal(run(batch, recipe)[0], run(batch, Augmentation())[0])


def test_mixup_mixes_images_and_labels_with_the_reversed_batch():
    batch, shares = batch_of(6, 8, 3), []
    plain, hot = run(batch, Augmentation())[0], np.eye(CLASSES, dtype=np.float32)[batch.label]
    for step in range(300):
        images, labels = run(batch, Augmentation(mixup=0.4), step=step)
        assert labels.dtype == np.float32
        own = (images - plain[::-1])[0, 0, 0, 0] / (plain - plain[::-1])[0, 0, 0, 0]
        np.testing.assert_allclose(images, own * plain + (1 - own) * plain[::-1], atol=0.1)
        np.testing.assert_allclose(labels, own * hot + (1 - own) * hot[::-1], atol=1e-3)
        shares.append(own)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.09)
    assert np.var(shares) == pytest.approx(1 / 7.2, rel=0.2)


def test_cutmix_pastes_one_rectangle_and_labels_follow_its_area():
    batch, shares = batch_of(6, 16), []
    plain, hot = run(batch, Augmentation())[0], np.eye(CLASSES, dtype=np.float32)[batch.label]
    differs = (plain != plain[::-1]).all(0)[..., 0]
    for step in range(200):
        images, labels = run(batch, Augmentation(cutmix=1.0), step=step)
        pasted = (images == plain[::-1]) & (plain != plain[::-1])
        assert ((images == plain) | (images == plain[::-1])).all()
        rows, columns = pasted.any((0, 2, 3)), pasted.any((0, 1, 3))
        rectangle = rows[:, None] & columns[None, :]
        assert (pasted[..., 0].any(0) | ~differs)[rectangle].all()
        own = 1 - rectangle.mean()
        np.testing.assert_allclose(labels, own * hot + (1 - own) * hot[::-1], atol=1e-6)
        shares.append(own)
    # Beta(1, 1) is uniform; rectangles over the border lose a part, so the rest is more than half.
    assert 0.5 < np.mean(shares) < 0.8
    assert np.min(shares) < 0.4


def test_of_mixup_and_cutmix_a_batch_gets_one_and_a_half_each():
    batch = batch_of(6, 16)
    plain = run(batch, Augmentation())[0]
    cut = []
    for step in range(200):
        images = run(batch, BOTH, step=step)[0]
        cut.append(((images == plain) | (images == plain[::-1])).all())
    assert close_to_share(np.array(cut), 0.5)


# The promises about randomness.


def test_an_example_looks_the_same_in_any_batch():
    batch = with_boxes(batch_of(24, 16, 3))
    whole = run(batch, EVERYTHING_BUT_MIXING, epoch=2)[0]
    order = np.random.default_rng(0).permutation(24)
    shuffled = run(take(batch, order), EVERYTHING_BUT_MIXING, epoch=2)[0]
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-3)  # of 255
    some = run(take(batch, order[:5]), EVERYTHING_BUT_MIXING, epoch=2)[0]
    np.testing.assert_allclose(some, whole[order[:5]], atol=1e-3)


def test_without_interpolation_an_example_is_bitwise_the_same_in_any_batch():
    batch = batch_of(24, 16, 3)
    whole = run(batch, MOVING_AND_ERASING)[0]
    order = np.random.default_rng(0).permutation(24)[:7]
    np.testing.assert_array_equal(run(take(batch, order), MOVING_AND_ERASING)[0], whole[order])


def test_epochs_indices_and_streams_differ_and_repeat():
    batch = with_boxes(batch_of(24, 16, 3))
    first = run(batch, EVERYTHING_BUT_MIXING, epoch=0)[0]
    np.testing.assert_array_equal(run(batch, EVERYTHING_BUT_MIXING, epoch=0, step=9)[0], first)
    for changed in (
        run(batch, EVERYTHING_BUT_MIXING, epoch=1),
        run(batch.replace(index=batch.index + 1000), EVERYTHING_BUT_MIXING, epoch=0),
        run(batch, EVERYTHING_BUT_MIXING, epoch=0, key=jax.random.key(8)),
    ):
        assert ((changed[0] != first).mean((1, 2, 3)) > 0.1).all()


def test_turning_one_kind_on_leaves_the_draws_of_the_others():
    batch = batch_of(24, 16, 3)
    moved, erased = run(batch, MOVING)[0], run(batch, ERASING)[0]
    both = run(batch, MOVING_AND_ERASING)[0]
    gone = both == ERASING.erasing_value
    assert gone.any((1, 2, 3)).sum() > 12
    np.testing.assert_array_equal(gone, erased == ERASING.erasing_value)
    np.testing.assert_array_equal(both[~gone], moved[~gone])


def test_a_new_epoch_or_step_compiles_nothing():
    batch = batch_of(6, 16)
    run(batch, BOTH)
    compiled = _compiled(BOTH, Preprocess(16, 1, (0.0,), PIXELS), jnp.float32)
    before = compiled._cache_size()
    for epoch, step in ((0, 1), (1, 5), (2, 70_000)):
        run(batch, BOTH, epoch=epoch, step=step)
    assert compiled._cache_size() == before > 0


def test_padding_rows_are_harmless():
    batch = with_boxes(batch_of(24, 16, 3))
    real = np.arange(24) < 20
    blank = jax.tree.map(lambda x: np.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0), batch)
    padded = jax.tree.map(lambda new, old: new.astype(old.dtype), blank, batch)
    images, _ = run(padded, EVERYTHING_BUT_MIXING)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(images[:20], run(batch, EVERYTHING_BUT_MIXING)[0][:20])


def test_padding_rows_are_never_a_partner():
    batch = batch_of(6, 16).replace(mask=np.arange(6) < 4)
    alone = slice(0, 2)  # rows whose partner, counted from the end, is padding
    mixed = 0
    for step in range(20):
        images, labels = run(batch, BOTH, step=step)
        np.testing.assert_allclose(images[alone], batch.image[alone], rtol=1e-6)
        np.testing.assert_array_equal(labels[alone], np.eye(CLASSES)[batch.label[alone]])
        mixed += (np.abs(images[2] - batch.image[2]) > 1).any()
    assert mixed > 10


def test_float64_has_the_draws_of_float32_and_its_own_precision():
    batch = with_boxes(batch_of(24, 16, 3))
    single, _ = run(batch, EVERYTHING_BUT_MIXING)
    with jax.enable_x64(True):
        double, _ = run(batch, EVERYTHING_BUT_MIXING, dtype=jnp.float64)
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, atol=0.05)  # of 255
    assert (double != double.astype(np.float32)).any()


def test_float64_labels_stay_when_mixing():
    p = Preprocess(16, 1, (0.0,), PIXELS)
    with jax.enable_x64(True):
        outputs = jax.eval_shape(_compiled(BOTH, p, jnp.float64), batch_of(6, 16), STREAM, 0, 0)
    assert [out.dtype for out in outputs] == [np.float64, np.float64]


def test_bfloat16_is_rounded_at_the_end_only():
    batch = batch_of(8, 16)
    recipe = Augmentation(rotation=10)
    half = run(batch, recipe, dtype=jnp.bfloat16)[0]
    np.testing.assert_array_equal(half, run(batch, recipe)[0].astype(jnp.bfloat16))


EIGHT_DEVICES = """
import json, re, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flaxcls.batch import Preprocess
sys.path.insert(0, "tests")
from test_augment import EVERYTHING_BUT_MIXING, STREAM, _compiled, batch_of, replace, with_boxes

batch, p = with_boxes(batch_of(16, 12, 3)), Preprocess(12, 3, (0.5,), (0.25,))
mesh = Mesh(np.array(jax.devices()), ("data",))
sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
f = _compiled(replace(EVERYTHING_BUT_MIXING, mixup=0.5), p)
compiled = f.lower(sharded, STREAM, 1, 2).compile()
one, many = f(batch, STREAM, 1, 2), compiled(sharded, STREAM, 1, 2)
collective = r"(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\\("
print(json.dumps({
    "devices": many[0].sharding.num_devices,
    "difference": [float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(one, many)],
    "collectives": sorted(set(re.findall(collective, compiled.as_text()))),
}))
"""


def test_eight_devices_give_what_one_gives_and_gather_nothing():
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["devices"] == 8
    assert max(report["difference"]) < 1e-5
    # Only the partner comes from another device.
    assert report["collectives"] == ["collective-permute"]


# Boxes.


@pytest.mark.parametrize("aspect", [1.0, 0.6, 1.5])
@pytest.mark.parametrize(("area", "ratio"), [((0.08, 1), (3 / 4, 4 / 3)), ((0.5, 0.6), (1, 1))])
def test_boxes_lie_inside_with_the_asked_area_and_ratio(aspect, area, ratio):
    n = 20_000
    box = draw_boxes(1, 2, np.arange(n), aspect, area=area, ratio=ratio)
    assert (box.shape, box.dtype) == ((n, 4), np.float32)
    assert (box >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= 1).all()
    h, w = box[:, 2].astype(float), box[:, 3].astype(float)
    fallback = (box[:, 2:].max(1) == 1) & np.isclose(box[:, 0], (1 - h) / 2, atol=1e-6)
    fallback &= np.isclose(box[:, 1], (1 - w) / 2, atol=1e-6)
    assert fallback.mean() < 0.05
    drawn = ~fallback
    assert (h * w)[drawn].min() > area[0] - 1e-5
    assert (h * w)[drawn].max() < area[1] + 1e-5
    assert (w / h * aspect)[drawn].min() > ratio[0] - 1e-5
    assert (w / h * aspect)[drawn].max() < ratio[1] + 1e-5


@pytest.mark.parametrize("aspect", [1.0, 1.5])
def test_boxes_are_distributed_as_torchvisions(aspect):
    n = 4000
    rng = np.random.default_rng(0)
    height, width = 4000, round(4000 * aspect)  # large, so that torchvision's pixels matter little
    expected = np.array(
        [_torchvision_crop(rng, height, width, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)]
    ) / (height, width, height, width)
    got = draw_boxes(0, 0, np.arange(10 * n), aspect)
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(got[:, column], quantiles),
            np.quantile(expected[:, column], quantiles),
            atol=0.03,
        )
    np.testing.assert_allclose(np.cov(got.T), np.cov(expected.T), atol=0.004)


def _torchvision_crop(rng, height, width, area, ratio):
    """RandomResizedCrop.get_params for images that need no fallback, as documented."""
    while True:
        target = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


def test_boxes_that_never_fit_become_the_centre_of_the_nearest_ratio():
    boxes = draw_boxes(0, 0, np.arange(3), np.array([8.0, 0.125, 1.0]), area=(0.9, 1.0))
    wide = 4 / 3 / 8
    np.testing.assert_allclose(boxes[0], [0, (1 - wide) / 2, 1, wide], atol=1e-6)
    np.testing.assert_allclose(boxes[1], [(1 - wide) / 2, 0, wide, 1], atol=1e-6)


def test_a_box_depends_on_seed_epoch_and_index_alone():
    index = np.array([5, 70_000, 0, 123], np.int32)
    aspect = np.array([1.0, 1.5, 0.7, 2.0])
    boxes = draw_boxes(11, 3, index, aspect)
    np.testing.assert_array_equal(draw_boxes(11, 3, index[::-1], aspect[::-1]), boxes[::-1])
    np.testing.assert_array_equal(draw_boxes(11, 3, index[2:3], aspect[2:3]), boxes[2:3])
    for other in (draw_boxes(12, 3, index, aspect), draw_boxes(11, 4, index, aspect)):
        assert (other != boxes).all(1).all()
    assert len(np.unique(draw_boxes(11, 3, np.arange(50_000), 1.0)[:, 2])) > 49_000
    assert draw_boxes(0, 0, np.arange(0), 1.0).shape == (0, 4)


def test_the_generator_is_splitmix64():
    # The first outputs for the seed 1234567, known from the algorithm's published test vectors.
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _hash(state).tolist() == expected


# What is refused.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizontal_flip", 1.5),
        ("horizontal_flip", True),
        ("vertical_flip", -0.1),
        ("erasing", float("nan")),
        ("rotation", 200),
        ("translation", 2),
        ("crop_padding", -1),
        ("crop_padding", 1.5),
        ("crop_area", (0.5, 0.2)),
        ("crop_area", (0.1, 1.2)),
        ("crop_ratio", (0.0, 1.0)),
        ("crop_ratio", (1.0, float("inf"))),
        ("erasing_area", (0.1, 0.2, 0.3)),
        ("erasing_ratio", (-1, 1)),
        ("erasing_value", float("inf")),
        ("mixup", -1),
        ("cutmix", float("inf")),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"augment.{field} is "):
        Augmentation(**{field: value})


def test_batches_that_do_not_fit_are_refused():
    batch = batch_of(4, 8)
    with pytest.raises(InputError, match="crop boxes"):
        run(with_boxes(batch), Augmentation())
    with pytest.raises(InputError, match="images of 8 pixels"):
        run(batch, Augmentation(crop_padding=8))
    with pytest.raises(InputError, match="one label an image"):
        run(batch.replace(label=np.zeros((4, 2), np.int32)), Augmentation(mixup=0.2))
    with pytest.raises(InputError, match="step"):
        run(batch, Augmentation(mixup=0.2), step=None)
    with pytest.raises(InputError, match="index"):
        run(batch.replace(index=None), Augmentation(horizontal_flip=0.5))
    with pytest.raises(InputError, match="labels"):
        run(batch.replace(label=None), Augmentation(horizontal_flip=0.5))
