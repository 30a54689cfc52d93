"""The native max pool against a plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_operators import assert_close, assert_equal, in_two_threads, needs_native

from flaxcls import ops
from flaxcls.ops.native.pooling import max_pool

pytestmark = needs_native
POOLS = [
    ((2, 2), (2, 2), "VALID"),
    ((2, 2), (2, 2), ((0, 1), (1, 0))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 3), (1, 1), "SAME"),
    ((3, 2), (1, 3), ((2, 0), (0, 1))),
    ((1, 1), (2, 2), "VALID"),
    ((15, 15), (4, 5), ((7, 7), (7, 7))),
    ((2, 3), (3, 4), "SAME"),
]


def reference(x, window, strides, padding, gradient):
    """The maximum, and the gradient of x: a window gives its own to its first maximum."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    y, dpadded = np.zeros(gradient.shape), np.zeros(padded.shape)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            rows = slice(i * strides[0], i * strides[0] + window[0])
            columns = slice(j * strides[1], j * strides[1] + window[1])
            n, c = x.shape[0], x.shape[3]
            seen = padded[:, rows, columns].reshape(n, -1, c)
            won = np.arange(seen.shape[1])[:, None] == seen.argmax(1)[:, None]
            y[:, i, j] = seen.max(1)
            share = won * gradient[:, i, j][:, None]
            dpadded[:, rows, columns] += share.reshape(n, *window, c)
    (top, _), (left, _) = padding
    return y, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]]


def run(x, window, strides, padding):
    y, vjp = jax.vjp(lambda x: max_pool(x, window, strides, padding), x)
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), x.dtype)
    return y, vjp(gradient)[0], gradient


def check(x, pool):
    y, dx, gradient = run(x, *pool)
    assert y.dtype == dx.dtype == x.dtype
    exact_y, exact_dx = reference(np.float64(x), *pool, np.float64(gradient))
    np.testing.assert_array_equal(np.float64(y), exact_y)
    assert_close(dx, exact_dx, x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pool", POOLS)
def test_values_and_gradients_are_exact(pool, dtype):
    """Random numbers, and few different ones, as after a ReLU: of equal ones the first wins."""
    for c in (1, 3, 5, 16, 17, 48, 64, 130) if dtype == "float32" else (3, 16, 17):
        rng = np.random.default_rng(0)
        check(jnp.asarray(rng.normal(size=(2, 7, 9, c)), dtype), pool)
    check(jnp.asarray(np.maximum(0, rng.integers(-2, 3, size=(3, 8, 6, 5))), dtype), pool)


@pytest.mark.parametrize("seed", range(20))
def test_any_shape_is_exact(seed):
    rng = np.random.default_rng(seed)
    n, h, w, c = rng.integers(1, [4, 14, 14, 40])
    window = rng.integers(1, 6, 2)
    padding = [rng.integers(0, size + 1, 2).tolist() for size in window]
    dtype = ("float32", "bfloat16")[seed % 2]
    x = jnp.asarray(rng.normal(size=(n, h, w, c)), dtype)
    check(x, (tuple(window.tolist()), tuple(rng.integers(1, 5, 2).tolist()), padding))


@pytest.mark.parametrize("pool", POOLS[:4])
def test_maps_that_are_divided_among_threads(pool):
    check(jnp.float32(np.random.default_rng(0).normal(size=(4, 33, 31, 40))), pool)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_wins_and_no_other_number_is_lost(dtype):
    for place in range(9):
        x = jnp.arange(9.0).reshape(1, 3, 3, 1).at[0, place // 3, place % 3, 0].set(jnp.nan)
        y, dx, gradient = run(jnp.asarray(x, dtype), (3, 3), (3, 3), "VALID")
        assert jnp.isnan(y).all()
        assert dx[0, place // 3, place % 3, 0] == gradient[0, 0, 0, 0]
    for value in (-jnp.inf, jnp.inf, jnp.finfo(dtype).min):
        y, dx, gradient = run(jnp.full((1, 4, 4, 18), value, dtype), (2, 2), (2, 2), "VALID")
        assert (y == value).all()
        assert (dx[:, ::2, ::2] == gradient).all()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (4, 4, 4, 0), (4, 1, 4, 3), (1, 0, 0, 1)])
def test_empty_arrays_and_maps_smaller_than_the_window(shape):
    y, dx, _ = run(jnp.ones(shape), (2, 2), (2, 2), "VALID")
    assert y.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    assert dx.shape == shape
    assert not dx.any()


def test_a_window_of_padding_alone_is_minus_infinity():
    y, dx, gradient = run(jnp.ones((1, 2, 2, 1)), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert (y[0, 1:-1, 1:-1] == 1).all()
    assert jnp.isneginf(y).sum() == 12
    np.testing.assert_array_equal(dx, gradient[:, 1:-1, 1:-1])


def loss(x):
    return (max_pool(x, (3, 3), (2, 2), "SAME") ** 2).sum()


def test_runs_threads_vmap_scan_and_remat_give_the_same_bits():
    stacked = jnp.float32(np.random.default_rng(0).normal(size=(3, 8, 15, 15, 40)))
    f = jax.jit(jax.value_and_grad(loss))
    assert_equal([f(stacked[0]), f(stacked[0]), *in_two_threads(f, stacked[0])])
    single = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(f, stacked))
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, xs)[1])(stacked)
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))
    assert_equal([single, jax.vmap(f)(stacked), scanned])
    assert_equal([f(stacked[0]), remat(stacked[0])])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": (0, 2)}, "1 to 255 places"),
        ({"window": (16, 16)}, "1 to 255 places"),
        ({"window": (2**62, 4)}, "1 to 255 places"),
        ({"window": (2,)}, "two numbers"),
        ({"strides": (2, 0)}, "strides"),
        ({"strides": (2, -1)}, "strides"),
        ({"padding": (0, 0, 0, -1)}, "padding"),
        ({"padding": (0, 0, 0, 2**62)}, "padding"),
        ({"padding": (0, 0, 0, 2)}, "does not fit"),
    ],
)
def test_a_wrong_call_of_the_compiled_function_is_refused(change, says):
    attributes = {"window": (2, 2), "strides": (2, 2), "padding": (0, 0, 0, 0)} | change
    results = [jax.ShapeDtypeStruct((1, 2, 2, 3), dtype) for dtype in ("float32", "uint8")]
    call = jax.ffi.ffi_call("flaxcls_max_pool_forward", results)
    attributes = {name: np.array(value, np.int64) for name, value in attributes.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        jax.block_until_ready(call(jnp.ones((1, 4, 4, 3)), **attributes))


@pytest.mark.parametrize(
    ("backend", "dtype", "window", "native"),
    [
        ("auto", "bfloat16", (3, 3), True),
        ("native", "bfloat16", (2, 2), True),
        ("native", "bfloat16", (16, 16), False),
        ("native", "float16", (3, 3), False),
        ("native", "float32", (3, 3), False),
        ("xla", "bfloat16", (3, 3), False),
        ("flax", "bfloat16", (3, 3), False),
    ],
)
def test_where_the_pool_is_native(backend, dtype, window, native):
    with ops.use_backend(backend):
        jaxpr = str(
            jax.make_jaxpr(lambda x: ops.max_pool(x, window, (2, 2)))(
                jnp.zeros((1, 32, 32, 3), dtype)
            )
        )
    assert ("flaxcls_max_pool_forward" in jaxpr) == native
