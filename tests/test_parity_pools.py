"""Pooling gives PyTorch's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import ops

torch = pytest.importorskip("torch", reason="the reference is PyTorch, which is not installed")

from parity import nchw, quick_jit  # noqa: E402


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
