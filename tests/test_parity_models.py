"""Every published network gives its PyTorch twin's logits, statistics and gradients."""

import jax
import numpy as np
import pytest

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

# Name, options, size of the images, their channels, twin. Training has 16 images, which leaves 64
# values a channel to BatchNorms of 2x2 maps; dropout is off, since its masks cannot agree.
MODELS = {
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
    "residual_cam on resnet18": (
        "residual_cam",
        {"dropout": 0.0, "cam_dropout": 0.0, "head_width": 64, "trunk": "resnet18", "pool_size": 2},
        64,
        3,
        lambda n: twins.ResidualCAM(n, 64, twins.resnet(2, "resnet18").trunk, pool_size=2),
    ),
}
# Another of the same kind is tested in full; these take a minute to compile in float64.
ONLY_FORWARD = {"resnet34", "googlenet, torchvision's", "residual_cam on resnet18"}
LONG = {"googlenet", "resnet50", "hierarchical_resnet18", "vgg16_residual_cam"}


def cases(names):
    return [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in names]


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


def test_every_model_is_compared():
    compared = {case[0] for case in MODELS.values()}
    assert compared | set(models.list_models("vgg??")) | {"lenet", "fashion_net0", "vgg16c"} == set(
        models.list_models()
    )


@pytest.mark.parametrize("case", MODELS)
def test_float32_logits_in_evaluation(case):
    model, variables, twin, images = pair(case, 4, "float32")
    with torch.no_grad():
        theirs = twin.eval()(nchw(images))
    assert_close(logits_of(model, variables, images, train=False)[0], theirs, 1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_float32_logits_in_training(case):
    model, variables, twin, images = pair(case, 16, "float32")
    with torch.no_grad():
        theirs = twin.train()(nchw(images))
    assert_close(logits_of(model, variables, images, train=True)[0], theirs, 1e-4)


@pytest.mark.parametrize("case", cases([n for n in MODELS if n not in ONLY_FORWARD]))
def test_float64_parameter_gradients_in_training(x64, case):
    model, variables, twin, images = pair(case, 16, "float64")

    def joined(output):
        if not isinstance(output, tuple):
            return output
        # One loss that all parameters of both heads feel.
        concatenate = torch.cat if isinstance(output[0], torch.Tensor) else jax.numpy.concatenate
        return concatenate(tuple(output), 1)

    assert_same_gradients(model, variables, twin, images, joined)


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
