"""Every published network gives its PyTorch twin's logits, statistics and gradients."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flaxcls import models

torch = pytest.importorskip("torch", reason="the reference is PyTorch, which is not installed")

import reference_models as twins  # noqa: E402
import reference_torch as reference  # noqa: E402
from parity import (  # noqa: E402
    assert_same_gradients,
    logits_of,
    nchw,
    random_variables,
    relative_error,
)

CLASSES = 5


def vgg(name, convs, options, size=32, **trunk):
    """A VGG with a narrow head, and its twin with `trunk`, as a row of MODELS."""
    options = {"head_width": 64} | options
    pool_size = options.get("pool_size")
    return name, options, size, 3, lambda n: reference.VGG(n, convs, 64, pool_size, **trunk)


# Name, options, size of the images, their channels, twin. Training has 16 images, which leaves 64
# values a channel to BatchNorms of 2x2 maps; dropout is off, since its masks cannot agree.
MODELS = {
    "vgg11": vgg("vgg11", (1, 1, 2, 2, 2), {}),
    "vgg11, pooled": vgg("vgg11", (1, 1, 2, 2, 2), {"pool_size": 7}, size=64),
    "vgg11 without BatchNorm": vgg(
        "vgg11", (1, 1, 2, 2, 2), {"batch_norm": False}, batch_norm=False
    ),
    "vgg13": vgg("vgg13", (2, 2, 2, 2, 2), {}),
    "vgg16c": vgg("vgg16c", (2, 2, 3, 3, 3), {}, pointwise_last=True),
    "vgg16": vgg("vgg16", (2, 2, 3, 3, 3), {}),
    "vgg19": vgg("vgg19", (2, 2, 4, 4, 4), {}),
    "lenet": ("lenet", {}, 28, 1, lambda n: reference.TwoConvs(n, 6, 16, 5, 256)),
    "fashion_net0": ("fashion_net0", {}, 28, 1, lambda n: reference.TwoConvs(n, 32, 64, 3, 4096)),
    "baseline_cnn": ("baseline_cnn", {}, 32, 3, twins.baseline_cnn),
    "lstm_cnn": ("lstm_cnn", {}, 32, 3, twins.LSTMCNN),
    "lstm_cnn without its pool": (
        "lstm_cnn",
        {"last_pool": False},
        32,
        3,
        lambda n: twins.LSTMCNN(n, last_pool=False),
    ),
    "attention_cnn": ("attention_cnn", {}, 32, 3, twins.AttentionCNN),
    "local_attention_cnn": ("local_attention_cnn", {}, 32, 3, twins.local_attention_cnn),
    "local_attention_cnn, 8 heads": (
        "local_attention_cnn",
        {"heads": 8},
        32,
        3,
        lambda n: twins.local_attention_cnn(n, heads=8),
    ),
    "expanding_cnn, triple": (
        "expanding_cnn",
        {},
        32,
        3,
        lambda n: twins.expanding_cnn(n, 32, (9, 27, 81, 94)),
    ),
    "expanding_cnn, double": (
        "expanding_cnn",
        {"depth": 3, "expansion": "double"},
        16,
        3,
        lambda n: twins.expanding_cnn(n, 16, (6, 12, 24)),
    ),
    "expanding_cnn, add13": (
        "expanding_cnn",
        {"depth": 2, "expansion": "add13"},
        16,
        3,
        lambda n: twins.expanding_cnn(n, 16, (16, 29)),
    ),
    "googlenet": ("googlenet", {"dropout": 0.0}, 64, 3, twins.googlenet),
    "googlenet, torchvision's": (
        "googlenet",
        {"dropout": 0.0, "variant": "torchvision"},
        64,
        3,
        lambda n: twins.googlenet(n, "torchvision"),
    ),
    "resnet18": ("resnet18", {}, 64, 3, lambda n: twins.resnet(n, "resnet18")),
    "resnet34": ("resnet34", {}, 64, 3, lambda n: twins.resnet(n, "resnet34")),
    "resnet50": ("resnet50", {}, 64, 3, lambda n: twins.resnet(n, "resnet50")),
    "hierarchical_resnet18": (
        "hierarchical_resnet18",
        {"num_parents": 3},
        64,
        3,
        lambda n: twins.Hierarchical(n, 3, twins.resnet(2, "resnet18"), 512),
    ),
    "hierarchical like_vgg": (
        "hierarchical",
        {"num_parents": 2, "trunk": "like_vgg"},
        28,
        1,
        lambda n: twins.Hierarchical(n, 2, twins.like_vgg(2), 1024),
    ),
    "ts_cnn": ("ts_cnn", {}, 28, 1, twins.ts_cnn),
    "like_vgg": ("like_vgg", {}, 28, 1, twins.like_vgg),
    "ai_inno_cnn": ("ai_inno_cnn", {}, 28, 1, twins.ai_inno_cnn),
    "fashion_net1": ("fashion_net1", {"dropout": 0.0}, 28, 1, twins.fashion_net1),
    "fashion_net2": ("fashion_net2", {"dropout": 0.0}, 28, 1, twins.FashionNet2),
    "vgg16_residual_cam": (
        "vgg16_residual_cam",
        {"dropout": 0.0, "cam_dropout": 0.0, "head_width": 64},
        32,
        3,
        lambda n: twins.ResidualCAM(n, 64),
    ),
    "residual_cam on like_vgg": (
        "residual_cam",
        {"dropout": 0.0, "cam_dropout": 0.0, "head_width": 64, "trunk": "like_vgg", "pool_size": 2},
        28,
        1,
        lambda n: twins.ResidualCAM(n, 64, twins.like_vgg(2).trunk, features=64, pool_size=2),
    ),
}
# Their float64 gradients take longest to compile.
LONG = {
    *("vgg16", "vgg16c", "vgg19", "vgg16_residual_cam"),
    *("googlenet", "googlenet, torchvision's"),
    *("resnet34", "resnet50", "hierarchical_resnet18"),
}
# vgg11 has the gradients of its layers, vgg16_residual_cam those of the pool.
ONLY_FORWARD = {"vgg11, pooled"}
WITH_GRADIENTS = [
    pytest.param(n, marks=pytest.mark.slow if n in LONG else ())
    for n in MODELS
    if n not in ONLY_FORWARD
]


def pair(case, batch, dtype):
    name, options, size, channels, make_twin = MODELS[case]
    images = np.random.default_rng(1).normal(size=(batch, size, size, channels)).astype(dtype)
    model = models.create_model(name, CLASSES, param_dtype=dtype, **options)
    variables = random_variables(model, images, dtype)
    twin = make_twin(CLASSES).to(getattr(torch, dtype))
    reference.load(twin, variables)
    return model, variables, twin, images


def assert_close(ours, theirs, tolerance):
    ours, theirs = (jax.tree.leaves(side) for side in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == np.float32
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("case", MODELS)
def test_float32_logits_in_evaluation(case):
    model, variables, twin, images = pair(case, 4, "float32")
    with torch.no_grad():
        theirs = twin.eval()(nchw(images))
    assert_close(logits_of(model, variables, images, train=False)[0], theirs, 1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_float32_logits_and_statistics_in_training(case):
    model, variables, twin, images = pair(case, 16, "float32")
    values = count_values(twin)
    with torch.no_grad():
        theirs = twin.train()(nchw(images))
    logits, moved = logits_of(model, variables, images, train=True)
    assert_close(logits, theirs, 1e-4)

    before = by_module(variables)
    after = by_module(moved)
    assert set(after) == set(before) == set(values)
    for name, n in values.items():
        assert n >= 64
        # PyTorch keeps the unbiased variance, flax the biased one: the one known difference.
        kept = 0.9 * before[name]["var"]
        unbiased = kept + (after[name]["var"] - kept) * n / (n - 1)
        norm = twin.get_submodule(name)
        assert relative_error(after[name]["mean"], norm.running_mean) < 1e-4
        assert relative_error(unbiased, norm.running_var) < 1e-4


def count_values(twin):
    """A dict that gets, when `twin` is called, the values a channel that each BatchNorm sees."""
    values = {}
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda norm, x, name=name: values.update({name: x[0][:, 0].numel()})
            )
    return values


def by_module(variables):
    """The running statistics of each BatchNorm, by the name that its twin has."""
    flat = flatten_dict({**variables.get("batch_stats", {})})
    modules = {path[:-1] for path in flat}
    return {".".join(m): {k: flat[*m, k] for k in ("mean", "var")} for m in modules}


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_float64_parameter_gradients_in_training(x64, case):
    model, variables, twin, images = pair(case, 16, "float64")

    def joined(output):
        if not isinstance(output, tuple):
            return output
        # One loss that all parameters of both heads feel.
        concatenate = torch.cat if isinstance(output[0], torch.Tensor) else jax.numpy.concatenate
        return concatenate(tuple(output), 1)

    assert_same_gradients(model, variables, twin, images, joined)


@pytest.mark.parametrize(
    "test",
    [
        test_float32_logits_in_evaluation,
        test_float32_logits_and_statistics_in_training,
        test_float64_parameter_gradients_in_training,
    ],
)
def test_no_model_is_left_out(test):
    (cases,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    names = {case if isinstance(case, str) else case.values[0] for case in cases}
    assert {MODELS[name][0] for name in names} == set(models.list_models())


def test_attention_maps_are_the_twins():
    model, variables, twin, images = pair("attention_cnn", 4, "float32")
    _, captured = model.apply(variables, images, train=False, mutable=["intermediates"])
    with torch.no_grad():
        twin.eval()(nchw(images))
    for name, size in (("attention1", 16), ("attention2", 8)):
        (ours,) = captured["intermediates"][name]
        assert ours.shape == (4, size, size)
        np.testing.assert_allclose(ours.sum((1, 2)), 1, rtol=1e-5)
        assert relative_error(ours, twin.maps[name]) < 1e-4
