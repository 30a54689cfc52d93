"""The registry, and what every model promises: counts, starts, dtypes, errors, light imports."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxcls import models, ops
from flaxcls.errors import InputError
from flaxcls.models.layers import Layers
from flaxcls.models.local_attention_cnn import LocalAttention
from flaxcls.models.vgg import VGG, VGGClassifier

VGGS = ["vgg11", "vgg13", "vgg16", "vgg16c", "vgg19"]
SHOPEE = ["attention_cnn", "baseline_cnn", "local_attention_cnn"]
SMALLEST = dict.fromkeys([*VGGS, "vgg16_residual_cam", "residual_cam"], 32)
SMALLEST |= dict.fromkeys([*SHOPEE, "lenet", "like_vgg", "fashion_net1", "expanding_cnn"], 16)
SMALLEST |= {"fashion_net0": 12, "fashion_net2": 10, "ts_cnn": 27, "ai_inno_cnn": 24}
# Without a smallest size, or with another rule.
ANY_SIZE = ["googlenet", "hierarchical", "hierarchical_resnet18", "lstm_cnn"]
ANY_SIZE += ["resnet18", "resnet34", "resnet50"]
GREY = [
    "ai_inno_cnn",
    "fashion_net0",
    "fashion_net1",
    "fashion_net2",
    "lenet",
    "like_vgg",
    "ts_cnn",
]
# Where the layer of the logits is, if not in `head`.
HEADS = dict.fromkeys([*VGGS, "residual_cam", "vgg16_residual_cam"], ("classifier", "head"))
CALTECH = (256, 256, 3)
SKETCH = (28, 28, 1)
PHOTO = (224, 224, 3)


# With keys of the kind rbg in a third of the time that it takes to compile by default.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def abstract_variables(model, *shape):
    """The shapes and dtypes of the model's variables; nothing is computed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), key, images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_name_is_listed_and_made():
    assert models.list_models() == sorted(models.registry)
    assert models.list_models("vgg??") == [n for n in VGGS if n != "vgg16c"]
    assert models.list_models("resnext*") == []
    assert sorted([*SMALLEST, *ANY_SIZE]) == models.list_models()
    for name in models.list_models():
        for channels in (1, 3):
            assert abstract_variables(models.create_model(name, 2), 1, 32, 32, channels)


@pytest.mark.parametrize(
    ("name", "classes", "shape", "options", "params"),
    [
        ("baseline_cnn", 9, PHOTO, {}, 295_641),
        ("lstm_cnn", 9, PHOTO, {}, 295_961),
        ("lstm_cnn", 9, PHOTO, {"biases": 1}, 295_929),
        ("attention_cnn", 9, PHOTO, {}, 314_011),
        ("local_attention_cnn", 9, PHOTO, {}, 345_433),
        ("expanding_cnn", 3, CALTECH, {"depth": 1, "expansion": "add13"}, 67_111_139),
        ("expanding_cnn", 3, CALTECH, {"depth": 2, "expansion": "add13"}, 30_422_666),
        ("expanding_cnn", 3, CALTECH, {"depth": 3, "expansion": "add13"}, 11_054_586),
        ("expanding_cnn", 3, CALTECH, {"depth": 4, "expansion": "add13"}, 3_706_933),
        ("expanding_cnn", 3, CALTECH, {"depth": 1, "expansion": "double"}, 25_167_319),
        ("expanding_cnn", 3, CALTECH, {"depth": 2, "expansion": "double"}, 12_586_243),
        ("expanding_cnn", 3, CALTECH, {"depth": 3, "expansion": "double"}, 6_302_059),
        ("expanding_cnn", 3, CALTECH, {"depth": 4, "expansion": "double"}, 2_391_607),
        ("expanding_cnn", 3, CALTECH, {"depth": 1, "expansion": "triple"}, 37_750_465),
        ("expanding_cnn", 3, CALTECH, {"depth": 2, "expansion": "triple"}, 28_319_437),
        ("expanding_cnn", 3, CALTECH, {"depth": 3, "expansion": "triple"}, 21_296_467),
        ("expanding_cnn", 3, CALTECH, {"depth": 4, "expansion": "triple"}, 6_413_819),
        ("vgg11", 3, CALTECH, {}, 160_241_411),
        ("vgg13", 3, CALTECH, {}, 160_426_307),
        ("vgg16c", 3, CALTECH, {}, 161_019_971),
        ("vgg16", 3, CALTECH, {}, 165_738_563),
        ("vgg19", 3, CALTECH, {}, 171_050_819),
        ("googlenet", 3, CALTECH, {}, 5_986_899),
        # torchvision's table of weights, auxiliary heads left out.
        ("googlenet", 1000, PHOTO, {"variant": "torchvision"}, 6_624_904),
        ("hierarchical_resnet18", 37, PHOTO, {}, 11_176_512 + 287_783),
        ("resnet18", 37, PHOTO, {}, 11_195_493),
        ("resnet34", 1000, PHOTO, {}, 21_797_672),
        ("resnet50", 200, PHOTO, {}, 23_917_832),
        ("vgg16", 200, (32, 32, 3), {"pool_size": 7, "dropout": 0.5}, 135_088_392),
        ("vgg16", 10, PHOTO, {"pool_size": 7, "dropout": 0.5}, 134_309_962),
        ("vgg16_residual_cam", 10, PHOTO, {}, 134_315_092),
        ("lenet", 200, SKETCH, {}, 119_764),
        ("ts_cnn", 200, SKETCH, {}, 874_256),
        ("like_vgg", 200, SKETCH, {}, 1_319_976),
        ("ai_inno_cnn", 200, SKETCH, {}, 517_264),
        ("fashion_net0", 10, SKETCH, {}, 6_617_994),
        ("fashion_net1", 10, SKETCH, {}, 186_302),
        ("fashion_net2", 10, SKETCH, {}, 13_149_716),
    ],
)
def test_published_parameter_counts(name, classes, shape, options, params):
    variables = abstract_variables(models.create_model(name, classes, **options), 1, *shape)
    assert count(variables["params"]) == params


def test_without_batch_norm_there_are_no_statistics():
    model = models.create_model("vgg11", 3, batch_norm=False)
    variables = abstract_variables(model, 1, 32, 32, 3)
    assert list(variables) == ["params"]
    assert not [name for name in variables["params"]["trunk"] if name.startswith("norm")]


@pytest.mark.parametrize("name", models.list_models())
def test_the_last_layer_is_the_head(name):
    params = abstract_variables(models.create_model(name, 7), 1, 32, 32, 3)["params"]
    for part in HEADS.get(name, ("head",)):
        params = params[part]
    assert params["kernel"].shape[-1] == params["bias"].shape[0] == 7


def layers_of(tree, path=()):
    """Every (kernel, bias) below a tree of parameters."""
    if "kernel" in tree:
        yield path, tree["kernel"], tree["bias"]
    else:
        for name, child in tree.items():
            if isinstance(child, dict):
                yield from layers_of(child, (*path, name))


def start(name, **options):
    size, channels = (28, 1) if name in GREY else (32, 3)
    model = models.create_model(name, 10, **options)
    images = jnp.zeros((1, size, size, channels))
    return quick_jit(model.init)(jax.random.key(0, impl="rbg"), images)["params"]


def assert_fills(values, bound):
    """Uniform draws: none beyond the bound, the largest near it, their spread bound / sqrt(3)."""
    values = np.asarray(values)
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    if values.size > 1000:
        assert np.abs(values).max() > 0.99 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("init", "gain"), [("pytorch", 1.0), ("kaiming_uniform", 6**0.5)])
def test_uniform_starts_keep_their_bounds(init, gain):
    for _, kernel, bias in layers_of(start("fashion_net0", init=init)):
        fan_in = np.prod(kernel.shape[:-1])
        assert_fills(kernel, gain / fan_in**0.5)
        assert_fills(bias, 1 / fan_in**0.5)
        assert np.abs(bias).max() > 0.5 / fan_in**0.5


def test_torchvision_start_of_vgg():
    """Convolutions normal by fan-out, denses normal 0.01, biases 0: torchvision/models/vgg.py."""
    for path, kernel, bias in layers_of(start("vgg11", init="torchvision", head_width=128)):
        kernel = np.asarray(kernel)
        fan_out = kernel.shape[-1] * np.prod(kernel.shape[:-2])
        std = 0.01 if path[0] == "classifier" else (2 / fan_out) ** 0.5
        assert kernel.std() == pytest.approx(std, rel=0.06)
        # A truncated normal would end at 2.3 of its standard deviations.
        assert kernel.size < 1e5 or np.abs(kernel).max() > 3.5 * std
        assert not np.any(bias)


def test_flax_start_is_flax_linens():
    for _, kernel, bias in layers_of(start("lenet", init="flax")):
        fan_in = np.prod(kernel.shape[:-1])
        assert np.std(kernel) == pytest.approx(fan_in**-0.5, rel=0.1)
        assert not np.any(bias)


def test_torchvision_start_of_resnet_and_googlenet():
    """torchvision/models/resnet.py and googlenet.py; denses of the first are PyTorch's own."""
    params = start("resnet18")
    fan_out = 9 * 512
    kernel = np.asarray(params["trunk"]["stage4_block2"]["conv2"]["kernel"])
    assert kernel.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert np.abs(kernel).max() > 3.5 * (2 / fan_out) ** 0.5
    assert_fills(params["head"]["kernel"], 512**-0.5)
    assert_fills(params["head"]["bias"], 512**-0.5)

    params = start("googlenet", init="torchvision", variant="torchvision")
    for kernel in (
        params["trunk"]["inception5b"]["three"]["conv"]["kernel"],
        params["head"]["kernel"],
    ):
        assert np.std(kernel) == pytest.approx(0.01, rel=0.03)


def test_start_of_a_residual_cam_model():
    """The trunk's is its own, whatever the head's; what is asked for is each one's form of it."""
    params = start("residual_cam", trunk="like_vgg", head_width=64)
    conv = params["trunk"]["conv4"]
    assert_fills(conv["kernel"], (6 / (9 * 64)) ** 0.5)
    assert_fills(conv["bias"], (9 * 64) ** -0.5)
    for path, kernel, bias in layers_of(params["classifier"]):
        assert path[-1] == "head" or np.std(kernel) == pytest.approx(0.01, rel=0.05)
        assert not np.any(bias)

    params = start(
        "residual_cam", trunk="googlenet", variant="torchvision", init="torchvision", head_width=64
    )
    kernel = params["trunk"]["inception5b"]["three"]["conv"]["kernel"]
    assert np.std(kernel) == pytest.approx(0.01, rel=0.03)


def test_the_published_residual_cam_model_starts_as_torchvisions_vgg():
    options = {"trunk": "vgg11", "head_width": 16}
    by_default, asked = (
        start("residual_cam", **options),
        start("residual_cam", init="torchvision", **options),
    )
    jax.tree.map(np.testing.assert_array_equal, by_default, asked)
    assert not any(np.any(bias) for _, _, bias in layers_of(by_default))


def test_start_of_the_lstm_is_pytorchs():
    """All of torch.nn.LSTM's parameters are uniform in +-1/sqrt(hidden size)."""
    lstm = start("lstm_cnn")["lstm"]
    assert len(lstm) == 8
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(lstm)])
    assert_fills(values, 0.5)
    assert np.abs(values).max() > 0.45


def test_start_of_local_attention():
    """Kernels Kaiming-normal by fan-out, offsets from N(0, 1)."""
    attention = start("local_attention_cnn")["trunk"]["attention"]
    for name in ("query", "key", "value"):
        assert np.std(attention[name]["kernel"]) == pytest.approx((2 / 128) ** 0.5, rel=0.03)
    offsets = np.stack([attention["row_offsets"], attention["column_offsets"]])
    assert offsets.shape == (2, 3, 64)
    assert offsets.std() == pytest.approx(1, rel=0.15)


STARTS = {
    "torchvision": ["resnet18", "resnet50", "vgg11"],
    "kaiming_uniform": ["ai_inno_cnn", "like_vgg", "ts_cnn"],
    "pytorch": [*SHOPEE, "expanding_cnn", "fashion_net0", "fashion_net2", "googlenet", "lenet"],
}


@pytest.mark.parametrize(("name", "init"), [(n, init) for init in STARTS for n in STARTS[init]])
def test_models_start_as_published_by_default(name, init):
    assert models.create_model(name, 2) == models.create_model(name, 2, init=init)


@pytest.mark.parametrize(
    ("options", "images", "hidden", "stored"),
    [
        ({}, "float32", "float32", "float32"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16", "float32"),
        ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, "float32", "bfloat16", "bfloat16"),
        ({"param_dtype": "float64"}, "float32", "float64", "float64"),
        ({"dtype": jnp.float64, "param_dtype": jnp.float64}, "float64", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_dtypes_of_layers_parameters_statistics_and_logits(options, images, hidden, stored, train):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", "float64" in (hidden, images))
    try:
        model = models.create_model("vgg11", 4, head_width=8, **options)
        image = jax.ShapeDtypeStruct((2, 32, 32, 3), images)
        key = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(partial(model.init, train=False), key, image)
        logits, moved = jax.eval_shape(
            partial(
                model.apply,
                train=train,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=True,
            ),
            variables,
            image,
        )
    finally:
        jax.config.update("jax_enable_x64", before)
    at_least_float32 = jnp.promote_types(hidden, jnp.float32)
    assert logits.dtype == at_least_float32
    trunk = moved["intermediates"]["trunk"]
    assert trunk["conv5_2"]["__call__"][0].dtype == hidden
    assert trunk["norm5_2"]["__call__"][0].dtype == hidden
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {stored}
    statistics = [*jax.tree.leaves(variables["batch_stats"])]
    statistics += jax.tree.leaves(moved["batch_stats"])
    at_least_float32 = jnp.promote_types(stored, jnp.float32)
    assert {leaf.dtype for leaf in statistics} == {at_least_float32}


def test_backends_share_variables_and_agree():
    """Logits and statistics of training, on maps from 32x32 down to 2x2."""
    model = VGG(4, convs=(1, 1, 1, 1, 1), head_width=16, initialisation="flax")
    images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), images)

    def run(backend):
        with ops.use_backend(backend):
            # A new function each time: jit would keep the backend it was traced with.
            apply = partial(model.apply, train=True, mutable=["batch_stats"])
            step = jax.jit(lambda *args: apply(*args), compiler_options=ops.compiler_options())
            return step(variables, images)

    theirs = run("flax")
    for ours in (run("xla"), run("native")):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("name", [n for n in models.list_models() if n not in VGGS[1:]])
def test_bfloat16_and_captured_features(name):
    """Logits stay float32, and the final features can be had by name."""
    size, channels = (28, 1) if name in GREY else (32, 3)
    model = models.create_model(name, 3, dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    variables = abstract_variables(model, *image.shape)
    output, captured = jax.eval_shape(
        partial(model.apply, train=False, mutable=["intermediates"]), variables, image
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(output)} == {"float32"}
    assert set(variables) <= {"params", "batch_stats"}
    captured = captured["intermediates"]
    (features,) = captured.get("features") or captured["trunk"]["features"]
    assert features.dtype == jnp.bfloat16
    assert features.ndim == 4


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Seven convolutions leave keys and queries 3.5 % off, which the softmax of products enlarges.
    [("attention_cnn", 0.04), ("local_attention_cnn", 0.1), ("lstm_cnn", 0.04)],
)
def test_a_step_in_bfloat16_is_near_that_in_float32(name, tolerance):
    """Compiled, forward and backward: the models with more than convolutions and denses."""
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))

    def loss(params, stats, model):
        variables = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].mean(), logits

    def step(dtype):
        model = models.create_model(name, 3, dtype=dtype)

        @quick_jit
        def run(key):
            variables = model.init(key, images)
            grad = jax.grad(loss, has_aux=True)
            return grad(variables["params"], variables["batch_stats"], model)

        return run(jax.random.key(0, impl="rbg"))

    (gradients, logits), (_, exact) = step("bfloat16"), step("float32")
    assert np.abs(logits - exact).max() < tolerance * np.abs(exact).max()
    assert np.any(logits != exact)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", [n for n in models.list_models() if n not in VGGS[1:]])
def test_without_classes_a_model_gives_its_features(name):
    size, channels = (28, 1) if name in GREY else (32, 3)
    model = models.create_model(name, 0)
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    variables = abstract_variables(model, *image.shape)
    assert "head" not in variables["params"]
    features = jax.eval_shape(partial(model.apply, train=False), variables, image)
    assert features.ndim == 2


def test_hierarchical_logits_are_named():
    model = models.create_model("hierarchical", 7, trunk="like_vgg", num_parents=3)
    image = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    output = jax.eval_shape(model.apply, abstract_variables(model, *image.shape), image)
    assert output.child.shape == (2, 7)
    assert output.parent.shape == (2, 3)


def test_a_hierarchical_model_takes_the_options_of_its_trunk():
    options = {"trunk": "vgg11", "batch_norm": False, "head_width": 32, "num_parents": 3}
    model = models.create_model("hierarchical", 7, **options)
    params = abstract_variables(model, 1, 32, 32, 3)["params"]
    assert "norm1_1" not in params["trunk"]["trunk"]
    assert params["own"]["kernel"].shape == (32, 512)
    with pytest.raises(InputError, match=r"model\.head_width: 0 is not possible"):
        models.create_model("hierarchical", 7, trunk="vgg11", head_width=0)
    with pytest.raises(InputError, match=r"model\.batch_norm: hierarchical_resnet18 has no such"):
        models.create_model("hierarchical_resnet18", 7, batch_norm=False)


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({"trunk": "vgg11", "batch_norm": False}, "conv5_2", "norm5_2"),
        ({"trunk": "expanding_cnn", "depth": 2, "expansion": "double"}, "conv2", "conv3"),
        ({"trunk": "googlenet", "variant": "torchvision"}, "stem2", None),
        ({"trunk": "local_attention_cnn", "heads": 8}, "attention", None),
    ],
)
def test_a_residual_cam_model_takes_the_options_of_its_trunk(options, there, absent):
    """All of them: what its final map looks like is what that model's own does."""
    model = models.create_model("residual_cam", 7, head_width=16, **options)
    trunk = abstract_variables(model, 1, 32, 32, 3)["params"]["trunk"]
    own = models.create_model(options["trunk"], 0, **{k: options[k] for k in list(options)[1:]})
    assert trunk == abstract_variables(own, 1, 32, 32, 3)["params"]["trunk"]
    assert there in trunk
    assert absent not in trunk


def test_an_option_that_the_trunk_of_a_residual_cam_model_lacks_is_refused():
    with pytest.raises(InputError, match=r"model\.depth: 5 is not possible; give one of 1, 2, 3"):
        models.create_model("residual_cam", 3, trunk="expanding_cnn", depth=5)
    with pytest.raises(InputError, match=r"model\.depth: residual_cam has no such option"):
        models.create_model("residual_cam", 3, trunk="resnet18", depth=2)
    with pytest.raises(InputError, match=r"model\.trunk: 5 is not possible; give text"):
        models.create_model("residual_cam", 3, trunk=5)


def test_a_trunk_without_a_map_is_refused():
    with pytest.raises(InputError, match="attention_cnn has no final feature map"):
        abstract_variables(
            models.create_model("residual_cam", 3, trunk="attention_cnn"), 1, 32, 32, 3
        )


@pytest.mark.parametrize(
    ("options", "smallest"),
    [
        ({}, 32),
        ({"patch_size": 1}, 16),
        ({"patch_size": 3, "last_pool": False}, 24),
        ({"patch_size": 1, "last_pool": False}, 8),
    ],
)
def test_the_smallest_image_of_lstm_cnn_follows_from_its_patches(options, smallest):
    model = models.create_model("lstm_cnn", 3, **options)
    abstract_variables(model, 1, smallest, smallest, 3)
    for size in (smallest - 1, smallest // 2):
        message = f"model lstm_cnn: .*{size}x{size + 9} pixels.*it takes is {smallest}x{smallest}"
        with pytest.raises(InputError, match=message):
            abstract_variables(model, 1, size, size + 9, 3)


def test_maps_that_do_not_divide_into_patches_are_refused():
    model = models.create_model("lstm_cnn", 3)
    abstract_variables(model, 1, 40, 47, 3)
    message = "images of 40x48 pixels give maps of 2x3.*multiples of 32, as in 32x32, or at most 15"
    with pytest.raises(InputError, match=message):
        abstract_variables(model, 1, 40, 48, 3)
    with pytest.raises(InputError, match=r"shape \(40, 48, 3\); give them as"):
        abstract_variables(model, 40, 48, 3)


@pytest.mark.parametrize("heads", [None, 2])
def test_local_attentions_weights_are_what_it_sums_with(heads):
    layers = Layers("flax", dtype=None, param_dtype=jnp.float32)
    module = LocalAttention(4, heads, layers)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, 6))
    variables = module.init(jax.random.key(0), x)
    assert list(variables) == ["params"]
    result, captured = module.apply(variables, x, mutable=["intermediates"])
    (weights,) = captured["intermediates"]["attention"]
    assert weights.shape == (2, 5, 3, 3, 3, heads or 4)
    np.testing.assert_allclose(weights.sum((3, 4)), 1, rtol=1e-5)
    values = jnp.pad(
        x @ variables["params"]["value"]["kernel"][0, 0], [(0, 0), (1, 1), (1, 1), (0, 0)]
    )
    weights = jnp.repeat(weights, 4 // weights.shape[-1], axis=-1)
    expected = sum(
        weights[:, :, :, i, j] * values[:, i : i + 5, j : j + 3] for i in range(3) for j in range(3)
    )
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_local_attentions_weights_are_kept_where_they_are_asked_for_alone(monkeypatch):
    model = models.create_model("local_attention_cnn", 3, heads=8)
    variables = abstract_variables(model, 2, 32, 32, 3)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def collections(*mutable):
        apply = partial(model.apply, train=True, mutable=list(mutable))
        return jax.eval_shape(apply, variables, image)[1]

    captured = collections("batch_stats", "intermediates")["intermediates"]
    (weights,) = captured["trunk"]["attention"]["attention"]
    assert weights.shape == (2, 4, 4, 3, 3, 8)
    monkeypatch.setattr("flaxcls.models.local_attention_cnn.attention_weights", None)
    assert set(collections("batch_stats")) == {"batch_stats"}
    with pytest.raises(TypeError, match="not callable"):
        collections("intermediates", "batch_stats")


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(InputError, match="128 channels do not divide into 3 heads"):
        abstract_variables(models.create_model("local_attention_cnn", 3, heads=3), 1, 32, 32, 3)


def test_torchvisions_googlenet_has_a_smallest_image():
    model = models.create_model("googlenet", 3, variant="torchvision")
    abstract_variables(model, 1, 15, 15, 3)
    with pytest.raises(InputError, match=r"14x14 pixels.*15x15"):
        abstract_variables(model, 1, 14, 14, 3)


def test_dropout_acts_in_training_only():
    layers = Layers("flax", dtype=None, param_dtype=jnp.float32)
    classifier = VGGClassifier(4, head_width=64, dropout=0.5, layers=layers)
    features = jax.random.normal(jax.random.key(1), (2, 512))
    variables = classifier.init(jax.random.key(0, impl="rbg"), features, train=False)

    def logits(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return classifier.apply(variables, features, train=train, rngs=rngs)

    assert np.any(logits(0, train=True) != logits(1, train=True))
    np.testing.assert_array_equal(logits(0, train=True), logits(0, train=True))
    np.testing.assert_array_equal(logits(0, train=False), logits(1, train=False))


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_image_works_and_one_pixel_less_is_refused(name):
    size = SMALLEST[name]
    model = models.create_model(name, 3)
    abstract_variables(model, 1, size, size, 1)
    with pytest.raises(InputError, match=f"{size - 1}x{size + 9} pixels.*{size}x{size}"):
        abstract_variables(model, 1, size - 1, size + 9, 1)


def test_a_single_image_without_a_batch_is_refused():
    with pytest.raises(InputError, match=r"shape \(28, 28, 1\); give them as \(N, H, W, C\)"):
        abstract_variables(models.create_model("lenet", 3), 28, 28, 1)


@pytest.mark.parametrize(
    ("name", "classes", "options", "message"),
    [
        ("vg13", 3, {}, "model.name: no model 'vg13'; did you mean 'vgg13'?"),
        ("", 3, {}, "model.name: no model ''"),
        ("vgg13", 3, {"dropuot": 0.1}, "model.dropuot: vgg13 has no such option; it takes"),
        ("lenet", 3, {"dropout": 0.1}, "model.dropout: lenet has no such option; it takes init"),
        ("vgg13", 3, {"convs": (1, 1, 1, 1, 1)}, "model.convs: vgg13 has no such option"),
        ("vgg13", -1, {}, "model.num_classes: -1 is not possible; give a whole number"),
        ("vgg13", 2.5, {}, "model.num_classes: 2.5 is not possible"),
        ("vgg13", 3, {"dropout": 1.0}, "model.dropout: 1.0 is not possible"),
        ("vgg13", 3, {"dropout": -0.1}, "model.dropout: -0.1 is not possible"),
        ("vgg13", 3, {"dropout": float("nan")}, "model.dropout: nan is not possible"),
        ("vgg13", 3, {"head_width": 0}, "model.head_width: 0 is not possible"),
        ("vgg13", 3, {"pool_size": 0}, "model.pool_size: 0 is not possible; give None or"),
        ("vgg13", 3, {"batch_norm": "no"}, "model.batch_norm: 'no' is not possible; give True"),
        ("vgg13", 3, {"init": "xavier"}, "give one of flax, pytorch, kaiming_uniform, torchvision"),
        (
            "expanding_cnn",
            3,
            {"depth": 5},
            "model.depth: 5 is not possible; give one of 1, 2, 3, 4",
        ),
        ("expanding_cnn", 3, {"depth": True}, "model.depth: True is not possible"),
        ("expanding_cnn", 3, {"expansion": "add"}, "give one of add13, double, triple"),
        ("googlenet", 3, {"variant": "v3"}, "give one of published, torchvision"),
        ("lstm_cnn", 3, {"biases": 3}, "model.biases: 3 is not possible; give one of 1, 2"),
        ("local_attention_cnn", 3, {"heads": 0}, "give None or a whole number of at least 1"),
        (
            "hierarchical_resnet18",
            3,
            {"trunk": "vgg11"},
            "model.trunk: hierarchical_resnet18 has no",
        ),
        ("vgg13", 3, {"dtype": "float31"}, "model.dtype: 'float31' is no floating dtype"),
        ("vgg13", 3, {"dtype": "int32"}, "model.dtype: 'int32' is no floating dtype"),
        ("vgg13", 3, {"param_dtype": None}, "model.param_dtype: None is no floating dtype"),
        ("vgg13", 3, {"dtype": "float64"}, "model.dtype: float64 needs jax_enable_x64"),
    ],
)
def test_bad_options_are_refused_by_name(name, classes, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        models.create_model(name, classes, **options)


def test_importing_models_is_light():
    heavy = "grain orbax tensorflow tensorflow_datasets cv2 matplotlib ml_collections torch clu"
    code = f"import sys, flaxcls.models; print([m for m in '{heavy}'.split() if m in sys.modules])"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.strip() == "[]"


class Users(nn.Module):
    """A user's own model, with options of every type."""

    num_classes: int
    scale: float = 1.0
    count: int = 16
    sizes: tuple[int, ...] = (3,)
    width: int | None = None

    def __call__(self, images, train=False):
        raise NotImplementedError


def test_options_of_a_users_model_are_what_their_defaults_are(monkeypatch):
    monkeypatch.setitem(models.registry, "users", None)  # taken out again after the test
    models.register("users", Users)
    model = models.create_model("users", 3, scale=-2.5, sizes=(1, 2), width=5)
    assert (model.scale, model.sizes, model.width) == (-2.5, (1, 2), 5)
    for option, value, wanted in [
        ("scale", "large", "a finite number"),
        ("scale", float("nan"), "a finite number"),
        ("count", 0, "a whole number of at least 1"),
        ("count", 2**40, "a whole number of at least 1"),
        ("sizes", 3, "a tuple"),
    ]:
        with pytest.raises(InputError, match=f"model.{option}: .* is not possible; give {wanted}"):
            models.create_model("users", 3, **{option: value})


@pytest.mark.parametrize("name", ["hierarchical", "residual_cam"])
def test_an_unknown_trunk_is_named(name):
    with pytest.raises(InputError, match=r"model\.trunk: no model 'resnet81'.*resnet18"):
        models.create_model(name, 3, trunk="resnet81")
