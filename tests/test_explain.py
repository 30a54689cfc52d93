"""Heat maps: the identities and references that they satisfy, and that they find the object."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flaxcls import models, ops
from flaxcls.analysis import feature_maps
from flaxcls.analysis.explain import (
    METHODS,
    Box,
    Explainer,
    available,
    bounding_box,
    draw_box,
    overlay,
    place_heat,
)
from flaxcls.batch import Preprocess
from flaxcls.data.decode import ImageSpec, decode
from flaxcls.errors import InputError

GRADIENTS = ("grad_cam", "grad_cam_pp", "occlusion")
POOLED = ("cam", *GRADIENTS)
FACTOR = ("grad_cam", "grad_cam_pp", "cam", "occlusion")  # the mean's layer is one factor of two
# What each registered model can be explained by, on images of 64x64 or 28x28 pixels.
EXPECTED = {
    "ai_inno_cnn": GRADIENTS,
    "attention_cnn": ("grad_cam", "grad_cam_pp", "attention", "occlusion"),
    "baseline_cnn": POOLED,
    "expanding_cnn": GRADIENTS,
    "fashion_net0": GRADIENTS,
    "fashion_net1": GRADIENTS,
    "fashion_net2": FACTOR,
    "googlenet": POOLED,
    "hierarchical": GRADIENTS,
    "hierarchical_resnet18": GRADIENTS,
    "lenet": GRADIENTS,
    "like_vgg": GRADIENTS,
    "local_attention_cnn": ("cam", "grad_cam", "grad_cam_pp", "attention", "occlusion"),
    "lstm_cnn": POOLED,
    "residual_cam": FACTOR,
    "resnet18": POOLED,
    "resnet34": POOLED,
    "resnet50": POOLED,
    "ts_cnn": GRADIENTS,  # its last map is a single pixel at 28x28
    "vgg11": GRADIENTS,
    "vgg13": GRADIENTS,
    "vgg16": GRADIENTS,
    "vgg16c": GRADIENTS,
    "vgg16_residual_cam": FACTOR,
    "vgg19": GRADIENTS,
}
GREY = {
    *("ai_inno_cnn", "fashion_net0", "fashion_net1", "fashion_net2", "lenet", "like_vgg", "ts_cnn")
}
CLASSES = 5


class Pooled(nn.Module):
    """A user's own model that sows nothing, with a map of a fourth of the image's sides."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, features in enumerate((16, 32, 64)):
            x = ops.Conv(features, (3, 3))(x)
            x = ops.BatchNorm()(x, use_running_average=not train, relu=True, pool=i > 0)
        return ops.Dense(self.num_classes)(x.mean((1, 2)))


class Perceptron(nn.Module):
    """A model without a map, though not without an array of four axes."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = (x * 2 - 1).reshape(len(x), -1)
        return ops.Dense(self.num_classes)(nn.relu(ops.Dense(16)(x)))


class TwoPaths(nn.Module):
    """Its logits see more than the map that it sows, whose gradient flax's `perturb` gives too."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(ops.Conv(8, (3, 3))(x))
        y = self.perturb("map", ops.max_pool(x, (2, 2)))
        self.sow("intermediates", "features", y)
        joined = jnp.concatenate([y.mean((1, 2)) ** 2, x.max((1, 2))], axis=-1)
        return ops.Dense(self.num_classes)(nn.relu(ops.Dense(16)(joined)))


def make(name: str, seed: int = 0, dtype: str = "float32", **options: Any) -> tuple:
    """A registered model, random variables without zeros, and its preprocessing."""
    if name.startswith("vgg") or "residual" in name:
        options = {"head_width": 32} | options
    model = models.create_model(name, CLASSES, param_dtype=dtype, **options)
    grey = name in GREY or options.get("trunk") in GREY
    p = Preprocess(28 if grey else 64, 1 if grey else 3, (0.5,), (0.25,))
    return model, draw_variables(model, p, seed, dtype), p


def draw_variables(model: nn.Module, p: Preprocess, seed: int = 0, dtype: str = "float32") -> Any:
    images = jax.ShapeDtypeStruct((1, p.size, p.size, p.channels), dtype)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        wide = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if path[-1].key == "kernel" else 0.1
        return rng.normal(0, wide, leaf.shape).astype(dtype)

    kept = {k: v for k, v in shapes.items() if k in ("params", "batch_stats")}
    return jax.tree_util.tree_map_with_path(draw, kept)


def pixels(n: int, p: Preprocess, seed: int = 0) -> np.ndarray:
    """Smooth random images uint8 (N, S, S, C)."""
    noise = np.random.default_rng(seed).normal(size=(n, p.size, p.size, p.channels))
    smooth = ndimage.gaussian_filter(noise, (0, p.size / 16, p.size / 16, 0))
    return (127 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def as_seen(images: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return ((images.astype(np.float64) / 255 - 0.5) / 0.25).astype(dtype)


def outputs_of(model: nn.Module, variables: Any, images: np.ndarray, name: str) -> np.ndarray:
    """What the model's layer of this name returns."""
    _, captured = model.apply(
        variables,
        as_seen(images),
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == name,
    )
    (output,) = captured["intermediates"][name]["__call__"]
    return np.asarray(output)


def test_every_registered_model_is_in_the_table_of_what_it_can_be_explained_by():
    assert set(EXPECTED) == set(models.list_models())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_is_explained_by_the_methods_that_fit_it(name):
    model, variables, p = make(name)
    assert available(model, variables, p) == EXPECTED[name]


@pytest.mark.parametrize("name", ["ai_inno_cnn", "fashion_net2", "local_attention_cnn", "ts_cnn"])
def test_every_image_has_a_map_and_the_models_own_logits(name):
    model, variables, p = make(name)
    images = pixels(3, p)
    maps = Explainer(model, variables, p, batch_size=2)(images)
    assert_whole(maps, 3, p)
    logits = model.apply(variables, as_seen(images), train=False)
    np.testing.assert_allclose(maps.logits, logits, atol=1e-4 * np.abs(logits).max())


def test_a_hierarchical_models_classes_are_explained():
    model, variables, p = make("hierarchical", trunk="lenet")
    maps = Explainer(model, variables, p, batch_size=2)(pixels(2, p))
    assert_whole(maps, 2, p)
    logits, _ = model.apply(variables, as_seen(pixels(2, p)), train=False)
    np.testing.assert_allclose(maps.logits, logits, atol=1e-4 * np.abs(logits).max())


def assert_whole(maps, n, p):
    assert maps.heat.shape == (n, p.size, p.size)
    assert maps.heat.dtype == maps.raw.dtype == np.float32
    assert maps.raw.shape[0] == maps.logits.shape[0] == n
    assert maps.raw.ndim == 3
    assert maps.classes.dtype == np.int64
    assert maps.heat.min() >= 0
    tops = maps.heat.max((1, 2))
    assert (np.isclose(tops, 1) | (tops == 0)).all()


CAMS = {
    "baseline_cnn": ("baseline_cnn", {}, "head"),
    "fashion_net2": ("fashion_net2", {}, "cam_head"),
    "residual_cam": ("residual_cam", {"trunk": "like_vgg", "pool_size": 2}, "cam_head"),
    "resnet18": ("resnet18", {}, "head"),
}


@pytest.mark.parametrize("case", CAMS)
def test_the_mean_of_a_raw_cam_is_the_pooled_layers_output_less_its_bias(case):
    name, options, layer = CAMS[case]
    model, variables, p = make(name, **options)
    images = pixels(4, p)
    outputs = outputs_of(model, variables, images, layer)
    explainer = Explainer(model, variables, p, method="cam", batch_size=4)
    bias = variables["params"][layer]["bias"]
    for k in range(CLASSES):
        maps = explainer(images, np.full(4, k))
        expected = outputs[:, k] - bias[k]
        np.testing.assert_allclose(
            maps.raw.mean((1, 2)), expected, rtol=1e-5, atol=1e-5 * np.abs(outputs).max()
        )


def test_a_cam_of_a_product_speaks_for_the_class_whatever_the_signs_of_its_factors():
    """Negative times negative: both factors with the other sign are the same model."""
    model, variables, p = make("fashion_net2")
    images = pixels(4, p)
    both = {name: jax.tree.map(np.negative, variables["params"][name]) for name in LAST_LAYERS}
    mirrored = {"params": {**variables["params"], **both}}
    ours, theirs = (
        Explainer(model, v, p, method="cam", batch_size=4)(images) for v in (variables, mirrored)
    )
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5)
    np.testing.assert_allclose(ours.raw, -theirs.raw, rtol=1e-5)
    np.testing.assert_allclose(ours.heat, theirs.heat, atol=1e-5)


LAST_LAYERS = ("cam_head", "head")

# Twin in test_parity_models, the submodule of it that gives the map, the layer of its mean.
TWINS = {
    "fashion_net2": ("trunk", "cam_head"),
    "residual_cam on like_vgg": ("pool", "cam_head"),
    "lenet": ("trunk", None),
    "baseline_cnn": ("trunk", "head"),
    "resnet18": ("trunk", "head"),
    "googlenet": ("trunk", "head"),
    "vgg16_residual_cam": ("pool", "cam_head"),
    "vgg11, pooled": ("pool", None),
}
SLOW_TWINS = ("resnet18", "googlenet", "vgg16_residual_cam", "vgg11, pooled")
# Normalised after the ReLU, so that the map has negative values: there Grad-CAM++ is not defined.
NOT_RECTIFIED = ("baseline_cnn",)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW_TWINS else ()) for c in TWINS]
)
def test_cam_and_grad_cam_are_pytorchs(case):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from parity import nchw
    from test_parity_models import MODELS, pair

    submodule, layer = TWINS[case]
    _, _, size, channels, _ = MODELS[case]
    model, variables, twin, _ = pair(case, 2, "float32")
    p = Preprocess(size, channels, (0.5,), (0.25,))
    images, classes = pixels(4, p), np.array([0, 1, 4, 2])

    kept = {}
    twin.eval().get_submodule(submodule).register_forward_hook(
        lambda module, inputs, output: kept.update(map=output)
    )
    logits = twin(nchw(as_seen(images)))
    features = kept["map"]
    chosen = logits[torch.arange(4), torch.from_numpy(classes)]
    (gradient,) = torch.autograd.grad(chosen.sum(), features)
    expected = {"grad_cam": (gradient.mean((2, 3), keepdim=True) * features).sum(1)}
    if layer is not None:
        kernel = twin.get_submodule(layer).weight[classes]
        expected["cam"] = torch.einsum("nc,nchw->nhw", kernel, features)
    if case not in NOT_RECTIFIED:
        # Equations 10 and 19 less the factor exp(logit) of the whole map.
        total = features.sum((2, 3), keepdim=True)
        alpha = gradient**2 / (2 * gradient**2 + total * gradient**3).clamp(min=1e-30)
        alpha = torch.where(gradient > 0, alpha, 0)
        weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
        expected["grad_cam_pp"] = (weights * features).sum(1)
    for method, theirs in expected.items():
        maps = Explainer(model, variables, p, method=method, batch_size=4)(images, classes)
        np.testing.assert_array_equal(maps.classes, classes)
        theirs = theirs.detach()
        np.testing.assert_allclose(maps.raw, theirs, atol=1e-4 * theirs.abs().max())
        if method == "cam":
            theirs = theirs * sign_of_factor(twin, layer, features, logits, classes)
        theirs = theirs.relu()[:, None]
        heat = enlarged_by_pytorch(theirs, size, *MIDDLES.get(case, (None, None)))[:, 0]
        heat /= heat.amax((1, 2), keepdim=True).clamp(min=1e-30)
        np.testing.assert_allclose(maps.heat, heat, atol=2e-4)


# Of networks whose maps do not cover the image evenly: the middle of what the first pixel of the
# map sees, and the distance to the next, by hand. lenet: 5x5, pool, 5x5, pool without padding.
MIDDLES = {"lenet": (7.5, 4), "fashion_net2": (4.5, 2), "resnet18": (0, 32), "googlenet": (0, 32)}


def enlarged_by_pytorch(maps, size, first=None, step=None):
    """(N, 1, h, h) -> (N, 1, size, size)."""
    import torch

    if first is None:
        return torch.nn.functional.interpolate(maps, (size, size), mode="bilinear")
    # From -1, the middle of the first pixel, to 1, that of the last.
    place = (torch.arange(size) - first) / step / (maps.shape[-1] - 1) * 2 - 1
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1).expand(
        len(maps), -1, -1, -1
    )
    return torch.nn.functional.grid_sample(
        maps, grid.float(), mode="bilinear", padding_mode="border", align_corners=True
    )


class Strided(nn.Module):
    """Strides, dilation, padding and its lack, and two paths to one map."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ops.Conv(4, (7, 5), strides=(2, 3), padding=((3, 3), (0, 1)))(x)
        x = ops.avg_pool(x, (3, 3), strides=(1, 2), padding=((1, 1), (1, 1)))
        y = nn.Conv(4, (3, 3), padding="VALID", kernel_dilation=2)(x)
        y = jnp.concatenate([y, x[:, 2:-2, 2:-2]], axis=-1)
        return ops.Dense(self.num_classes)(nn.Conv(8, (1, 1))(y).mean((1, 2)))


def test_a_maps_pixels_lie_in_the_middle_of_what_they_see():
    """By which pixels of the image change them."""
    model, p = Strided(3), Preprocess(64, 1, (0.5,), (0.25,))
    variables = draw_variables(model, p)
    cut = feature_maps.trace(model, variables, p, jnp.float32, 1).cut
    places = feature_maps.places(model, variables, p, cut)
    images = jnp.asarray(as_seen(pixels(1, p)))
    for i, j in ((4, 3), (10, 4)):
        gradient = jax.grad(lambda x: cut.trunk(variables, x)[0][0, i, j].sum())(images)  # noqa: B023
        for axis, place, k in zip((1, 2), places, (i, j), strict=True):
            seen = np.flatnonzero(np.asarray(gradient)[0].any(axis=2 - axis)[..., 0])
            assert 0 < seen[0] < seen[-1] < 63
            assert place.first + k * place.step == (seen[0] + seen[-1]) / 2


def sign_of_factor(twin, layer, features, logits, classes):
    """Of what the pooled layer's output is multiplied by, (N, 1, 1)."""
    ratio = logits / twin.get_submodule(layer)(features.mean((2, 3)))
    return ratio.detach()[range(len(classes)), classes].sign()[:, None, None]


def test_grad_cam_of_a_model_with_a_second_path_is_that_of_flaxs_own_perturbation():
    model, p = TwoPaths(3), Preprocess(12, 1, (0.5,), (0.25,))
    variables = draw_variables(model, p)
    images, classes = pixels(4, p), np.array([0, 1, 2, 0])
    zeros = {"perturbations": {"map": jnp.zeros((4, 6, 6, 8))}}

    def score(perturbations):
        logits, captured = model.apply(
            {**variables, **perturbations}, as_seen(images), mutable=["intermediates"]
        )
        return logits[np.arange(4), classes].sum(), captured["intermediates"]["features"][0]

    gradient, features = jax.grad(score, has_aux=True)(zeros)
    weights = gradient["perturbations"]["map"].mean((1, 2), keepdims=True)
    expected = (weights * features).sum(-1)
    assert available(model, variables, p) == GRADIENTS
    maps = Explainer(model, variables, p, method="grad_cam", batch_size=4)(images, classes)
    np.testing.assert_allclose(maps.raw, expected, atol=1e-5 * np.abs(expected).max())


def test_a_users_model_that_sows_nothing_is_cut_at_its_last_map():
    model, p = Pooled(3), Preprocess(32, 3, (0.5,), (0.25,))
    variables = draw_variables(model, p)
    assert available(model, variables, p) == POOLED
    traced = feature_maps.trace(model, variables, p, jnp.float32, 2)
    assert traced.cut.features.shape == (2, 8, 8, 64)
    images = pixels(3, p)
    maps = Explainer(model, variables, p, batch_size=2)(images)
    outputs = np.asarray(model.apply(variables, as_seen(images)))
    assert maps.raw.shape == (3, 8, 8)
    bias = variables["params"]["Dense_0"]["bias"]
    expected = (outputs - bias)[np.arange(3), maps.classes]
    np.testing.assert_allclose(maps.raw.mean((1, 2)), expected, rtol=1e-4)


def test_a_model_without_a_map_is_explained_by_occlusion_alone():
    model, p = Perceptron(3), Preprocess(8, 1, (0.0,), (1.0,))
    variables = draw_variables(model, p)
    assert available(model, variables, p) == ("occlusion",)
    explainer = Explainer(model, variables, p, batch_size=2)
    assert explainer.method == "occlusion"
    assert_whole(explainer(pixels(3, p)), 3, p)
    with pytest.raises(InputError, match=r"grad_cam cannot explain.*no feature map.*occlusion"):
        Explainer(model, variables, p, method="grad_cam")


def test_what_hides_a_place_is_the_mean_colour_and_the_fall_is_in_log_probability():
    """Every patch of two images hidden by hand."""
    model, p = Pooled(3), Preprocess(20, 3, (0.5,), (0.25,))
    variables = draw_variables(model, p)
    images = pixels(2, p)
    maps = Explainer(model, variables, p, method="occlusion", batch_size=2)(images)

    def log_probabilities(inputs):
        return np.asarray(jax.nn.log_softmax(model.apply(variables, inputs)))

    seen, expected = as_seen(images), np.empty((2, 10, 10))
    whole = log_probabilities(seen)
    assert maps.raw.shape == expected.shape
    for i in range(10):
        for j in range(10):
            # Whatever 5 pixels around the middle of two touch.
            hidden = seen.copy()
            rows, columns = (slice(max(0, 2 * k - 2), 2 * k + 4) for k in (i, j))
            hidden[:, rows, columns] = 0
            fall = whole - log_probabilities(hidden)
            expected[:, i, j] = fall[np.arange(2), maps.classes]
    np.testing.assert_allclose(maps.raw, expected, atol=1e-4 * np.abs(expected).max())


def test_attention_is_the_mean_of_what_the_model_sows():
    model, variables, p = make("attention_cnn")
    images = pixels(2, p)
    maps = Explainer(model, variables, p, method="attention", batch_size=2)(images)
    _, captured = model.apply(variables, as_seen(images), mutable=["intermediates"])
    fine, coarse = (captured["intermediates"][f"attention{i}"][0] for i in (1, 2))
    coarse = jax.image.resize(coarse * 16 * 16, fine.shape, "bilinear")
    expected = (fine * 32 * 32 + coarse) / 2
    np.testing.assert_allclose(maps.raw, expected, rtol=1e-4)
    assert maps.heat.min() < 1e-3


def test_local_attention_is_what_each_place_gets_from_its_neighbours():
    model, variables, p = make("local_attention_cnn")
    images = pixels(2, p)
    maps = Explainer(model, variables, p, method="attention", batch_size=2)(images)
    _, captured = model.apply(variables, as_seen(images), mutable=["intermediates"])
    weights = np.asarray(captured["intermediates"]["trunk"]["attention"]["attention"][0]).mean(-1)
    expected = np.zeros((2, 8, 8))
    for y, x, i, j in np.ndindex(8, 8, 3, 3):
        if 0 <= y + i - 1 < 8 and 0 <= x + j - 1 < 8:
            expected[:, y + i - 1, x + j - 1] += weights[:, y, x, i, j]
    expected /= expected.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(maps.raw, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import localisation

        yield localisation


P = Preprocess(48, 3, (0.5,), (0.25,))


@pytest.fixture(scope="module")
def trained(benchmark):
    """A small model that tells four textures apart, wherever they are."""
    model = Pooled(benchmark.CLASSES)
    scenes = benchmark.make_scenes(800, P.size, seed=1)
    return model, benchmark.train(model, scenes, P, epochs=8, batch_size=50)


@pytest.fixture(scope="module")
def scenes(benchmark):
    return benchmark.make_scenes(200, P.size, seed=2)


@pytest.mark.parametrize("method", POOLED)
def test_the_map_lies_on_the_object(benchmark, trained, scenes, method):
    model, variables = trained
    if method == "occlusion":
        scenes = benchmark.Scenes(*(array[:50] for array in scenes))
    found = benchmark.measure(Explainer(model, variables, P, method=method), scenes)
    print(found)
    assert found["correct"] >= 0.9
    assert found["hits"] >= 0.9
    if method != "occlusion":  # its patch is as large as the object
        assert found["iou"][0.5] >= 0.4


@pytest.mark.parametrize("method", ["cam", "grad_cam"])
def test_random_weights_destroy_the_map(trained, scenes, method):
    """The sanity check of Adebayo et al. 2018: a map that depends on the image alone explains no
    model."""
    model, variables = trained
    by_trained = Explainer(model, variables, P, method=method)(scenes.images)
    assert hits(by_trained.heat, scenes.masks) >= 0.9
    found, alike = [], []
    for seed in range(4):
        random = draw_variables(model, P, seed=seed)
        by_random = Explainer(model, random, P, method=method)(scenes.images, by_trained.classes)
        found.append(hits(by_random.heat, scenes.masks))
        pairs = zip(by_trained.raw, by_random.raw, strict=True)
        alike += [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    assert np.mean(found) <= 0.4
    assert abs(np.mean(alike)) < 0.2


def hits(heats, masks):
    tops = heats.reshape(len(heats), -1).argmax(1)
    return masks.reshape(len(masks), -1)[np.arange(len(masks)), tops].mean()


def test_a_map_is_the_same_in_any_batch(trained, scenes):
    model, variables = trained
    images, classes = scenes.images[:5], np.array([3, 0, 1, 2, 3])
    whole = Explainer(model, variables, P, batch_size=5)(images, classes)
    for batch_size in (1, 2, 32):
        explainer = Explainer(model, variables, P, batch_size=batch_size)
        for ours, theirs in zip(explainer(images, classes), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    one = explainer(images[2:3], classes[2:3])
    np.testing.assert_allclose(one.heat[0], whole.heat[2], atol=1e-4)


def test_images_of_another_size_and_grey_ones_are_brought_to_the_models(trained, scenes):
    model, variables = trained
    explainer = Explainer(model, variables, P)
    large = scenes.images[:2].repeat(2, 1).repeat(2, 2)
    maps = explainer(large)
    assert_whole(maps, 2, P)
    whole = explainer(scenes.images[:2])
    assert (maps.classes == whole.classes).all()
    assert np.abs(maps.heat - whole.heat).max() < 0.3
    grey = scenes.images[:2].mean(-1, keepdims=True).astype(np.uint8)
    for ours, theirs in zip(explainer(grey), explainer(grey.repeat(3, -1)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_precisions(x64, method):
    model, variables, p = make("local_attention_cnn", dtype="float64")
    images, classes = pixels(2, p), np.array([1, 2])
    double = Explainer(model, variables, p, method=method, dtype=jnp.float64, batch_size=2)
    expected = double(images, classes)
    assert expected.logits.dtype == np.float64
    single = jax.tree.map(np.float32, variables)
    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 0.35)):
        kind = model.clone(param_dtype=jnp.float32, dtype=dtype)
        explainer = Explainer(kind, single, p, method=method, dtype=dtype, batch_size=2)
        assert explainer.method == method
        maps = explainer(images, classes)
        assert_whole(maps, 2, p)
        assert np.abs(maps.heat - expected.heat).max() < tolerance


def test_what_cannot_be_explained_is_said(trained, scenes):
    model, variables = trained
    images = scenes.images[:2]
    with pytest.raises(InputError, match="no method 'gradcam'; did you mean 'grad_cam'"):
        Explainer(model, variables, P, method="gradcam")
    with pytest.raises(InputError, match=r"attention cannot explain.*choose cam or grad_cam or"):
        Explainer(model, variables, P, method="attention")
    with pytest.raises(InputError, match="batch_size is 0"):
        Explainer(model, variables, P, batch_size=0)
    explainer = Explainer(model, variables, P, batch_size=2)
    for wrong in (4, -1, 2**40):
        with pytest.raises(InputError, match=f"class {wrong} cannot be explained.*0 to 3"):
            explainer(images, np.array([0, wrong]))
    for classes in (np.array([0]), np.array([0.0, 1.0]), np.zeros((2, 1), int), [None, None]):
        with pytest.raises(InputError, match="give a whole number for each of the 2 images"):
            explainer(images, classes)
    for wrong in (images[0], images.astype(np.float32), list(images), images[:, :, :, :0]):
        with pytest.raises(InputError):
            explainer(wrong)
    with pytest.raises(InputError, match="no images"):
        explainer(images[:0])
    with pytest.raises(InputError, match="2 channels"):
        explainer(images[..., :2])


def test_a_class_that_nothing_speaks_for_has_an_empty_map_and_no_box():
    model, p = Pooled(2), Preprocess(16, 1, (0.5,), (0.25,))
    variables = draw_variables(model, p)
    kernel = -np.abs(variables["params"]["Dense_0"]["kernel"])
    variables["params"]["Dense_0"]["kernel"] = kernel
    maps = Explainer(model, variables, p, batch_size=2)(pixels(2, p))
    assert not maps.heat.any()
    assert (maps.raw < 0).any()
    assert bounding_box(maps.heat[0]) is None


def test_a_box_is_that_of_the_largest_connected_part():
    cv2 = pytest.importorskip("cv2", reason="the reference is OpenCV")
    rng = np.random.default_rng(0)
    for _ in range(50):
        heat = ndimage.gaussian_filter(rng.uniform(size=(40, 60)), 2.5).astype(np.float32)
        heat -= heat.min()
        threshold = rng.uniform(0.4, 0.9)
        above = (heat >= threshold * heat.max()).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        boxes = {tuple(row[:4]) for row in stats[1:][sizes == sizes.max()]}
        x0, y0, x1, y1 = bounding_box(heat, threshold)
        assert (x0, y0, x1 - x0, y1 - y0) in boxes
    whole = bounding_box(np.ones((3, 5)))
    assert whole == Box(0, 0, 5, 3)
    assert bounding_box(np.full((4, 4), np.nan)) is None
    assert bounding_box(np.zeros((4, 4))) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_turns_hot_places_red_and_leaves_the_image_recognisable(channels):
    image = np.full((30, 50, channels), 120, np.uint8)
    heat = np.zeros((6, 10), np.float32)
    heat[2:4, 6:9] = 1
    laid = overlay(image, heat)
    assert laid.shape == (30, 50, 3)
    assert laid.dtype == np.uint8
    red = laid[..., 0].astype(int) - laid[..., 2]
    assert red[12:17, 33:42].min() > 80
    assert red[:, :20].max() < 0
    np.testing.assert_array_equal(overlay(image, heat, 0.0), image.repeat(3 // channels, -1))
    assert (image == 120).all()
    laid = overlay(image, np.array([[np.nan, 2.0], [-1.0, np.inf]]))
    assert laid.shape == (30, 50, 3)


@pytest.mark.parametrize("label", ["", "cat 97 %", "\u732b \U0001f408", "caf\udce9", "<b>&" * 40])
def test_a_box_is_drawn_with_any_label(label):
    image = np.full((64, 80, 1), 60, np.uint8)
    drawn = draw_box(image, Box(10, 20, 50, 60), label)
    assert drawn.shape == (64, 80, 3)
    assert (drawn[20, 30:50] == 255).all()
    assert (drawn[59, 10:50] == 255).all()
    assert (drawn[30:50, 49] == 255).all()
    assert (drawn[30:55, 15:45] == 60).all()
    assert (image == 60).all()
    drawn = draw_box(image, Box(0, 0, 80, 64), label)
    assert drawn.shape == (64, 80, 3)


@pytest.mark.parametrize("fraction", [1.0, 0.8])
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (90, 90)])
def test_a_map_goes_back_to_where_the_model_saw_it(tmp_path, shape, resize, order, fraction):
    """An image decoded as the model sees it, placed back, is the image where that shows it."""
    height, width = shape
    noise = np.random.default_rng(0).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 12)
    photo = (150 + 40 * smooth / np.abs(smooth).max()).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    spec = ImageSpec(64, 1, resize, fraction, order)
    square = decode(tmp_path / "photo.png", spec)[..., 0]
    placed = place_heat(square.astype(np.float32), spec, width, height)
    assert placed.shape == (height, width)
    assert placed.dtype == np.float32
    seen = placed > 0
    y, x = np.nonzero(seen)
    assert seen[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
    assert seen.mean() == pytest.approx(share_seen(spec, width, height), abs=0.03)
    inner = ndimage.binary_erosion(seen, iterations=4)
    assert np.abs(placed - photo)[inner].max() < 8


def share_seen(spec, width, height):
    """Of the photo's pixels."""
    fraction = spec.crop_fraction
    if spec.resize == "squash":
        return fraction**2
    short, long = sorted((width, height))
    if spec.resize == "crop":
        return fraction**2 * short / long
    if spec.crop_order == "before":
        return fraction**2
    return min(1, fraction * long / short) * fraction
