"""Models and operators give PyTorch's values and gradients with PyTorch's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models, ops

torch = pytest.importorskip("torch", reason="the reference is PyTorch, which is not installed")

import reference_torch as reference  # noqa: E402
from parity import (  # noqa: E402
    assert_same_gradients,
    logits_of,
    nchw,
    quick_jit,
    random_variables,
    relative_error,
)

CLASSES = 5
WIDTH = 64
CONVS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16c": (2, 2, 3, 3, 3),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def pair(name, batch, size, dtype, **options):
    """A model, random variables for it, its twin with the same weights, images (N, H, W, C)."""
    channels = 3 if name in CONVS else 1
    images = np.random.default_rng(1).normal(size=(batch, size, size, channels)).astype(dtype)
    if name in CONVS:
        options = {"head_width": WIDTH} | options
        twin = reference.VGG(CLASSES, CONVS[name], pointwise_last=name == "vgg16c", **options)
    elif name == "lenet":
        twin = reference.TwoConvs(CLASSES, 6, 16, 5, 256)
    else:
        twin = reference.TwoConvs(CLASSES, 32, 64, 3, 4096)
    model = models.create_model(name, CLASSES, param_dtype=dtype, **options)
    variables = random_variables(model, images, dtype)
    twin = twin.to(getattr(torch, dtype))
    reference.load(twin, variables)
    return model, variables, twin, images


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vgg13", 32, {}),
        ("vgg11", 64, {"pool_size": 7}),
        ("vgg16c", 32, {"batch_norm": False}),
        ("lenet", 28, {}),
        ("fashion_net0", 28, {}),
    ],
)
def test_float32_logits_in_evaluation(name, size, options):
    model, variables, twin, images = pair(name, 4, size, "float32", **options)
    logits, _ = logits_of(model, variables, images, train=False)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, twin.eval()(nchw(images))) < 1e-5


def test_float32_logits_and_statistics_in_training():
    model, variables, twin, images = pair("vgg16c", 16, 32, "float32")
    logits, moved = logits_of(model, variables, images, train=True)
    assert relative_error(logits, twin.train()(nchw(images))) < 1e-4

    sizes = {1: 32, 2: 16, 3: 8, 4: 4, 5: 2}
    for layer, stats in moved["batch_stats"]["trunk"].items():
        norm = getattr(twin.trunk, layer)
        before = variables["batch_stats"]["trunk"][layer]
        n = len(images) * sizes[int(layer[4])] ** 2
        # PyTorch keeps the unbiased variance, flax the biased one: the one known difference.
        unbiased = 0.9 * before["var"] + (stats["var"] - 0.9 * before["var"]) * n / (n - 1)
        assert relative_error(stats["mean"], norm.running_mean) < 1e-4
        assert relative_error(unbiased, norm.running_var) < 1e-4


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vgg13", 32, {}),
        ("vgg11", 32, {"batch_norm": False}),
        ("lenet", 28, {}),
        ("fashion_net0", 28, {}),
    ],
)
def test_float64_parameter_gradients_in_training(x64, name, size, options):
    """16 images of 32x32 leave 64 values a channel to the last BatchNorms, of 2x2 maps."""
    model, variables, twin, images = pair(name, 16, size, "float64", **options)
    assert_same_gradients(model, variables, twin, images)


@pytest.mark.parametrize("backend", ["xla", "flax"])
@pytest.mark.parametrize(("window", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0)])
def test_max_pool_and_its_gradient_at_ties(backend, window, stride, pad):
    """After a ReLU most windows hold several zeros: the first takes the gradient."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-3, 3, size=(2, 9, 7, 3)), 0).astype(np.float32)
    theirs_in = nchw(x).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(theirs_in, window, stride, pad)
    weight = rng.normal(size=theirs.shape).astype(np.float32)
    theirs.backward(torch.from_numpy(weight))

    def pool(x):
        return ops.max_pool(x, (window, window), (stride, stride), ((pad, pad), (pad, pad)))

    with ops.use_backend(backend):
        ours = quick_jit(pool)(x)
        (grad,) = quick_jit(lambda x, weight: jax.vjp(pool, x)[1](weight))(
            x, weight.transpose(0, 2, 3, 1)
        )
    np.testing.assert_array_equal(ours, theirs.detach().permute(0, 2, 3, 1))
    np.testing.assert_allclose(grad, theirs_in.grad.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("h", "w", "size"), [(7, 7, 7), (2, 2, 7), (8, 6, 7), (14, 14, 7), (1, 3, 2)]
)
def test_adaptive_avg_pool(h, w, size):
    x = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool2d(nchw(x), size)
    ours = ops.adaptive_avg_pool(jnp.asarray(x), size)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


def test_avg_pool_counts_padding_as_pytorch_does():
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    theirs = torch.nn.functional.avg_pool2d(nchw(x), 3, 2, 1)
    ours = ops.avg_pool(jnp.asarray(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)
