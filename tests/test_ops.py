"""Operators agree with flax.linen's under every backend: trees, values, gradients, dtypes."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxcls import ops
from flaxcls.errors import InputError

BACKENDS = ("xla", "native", "flax")
# Largest error, relative to the largest value, that rounding explains.
TOLERANCE = {"float32": 5e-6, "float64": 1e-13, "bfloat16": 2e-2}

# Half the time to compile, the same XLA operators.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(params=["float32", "float64", "bfloat16"])
def dtype(request):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", before)


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dtype_and_shape(leaf):
    return leaf.dtype, leaf.shape


def assert_close(ours, theirs, dtype):
    """Trees of equal structure, dtypes and shapes, and of equal values up to rounding."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert dtype_and_shape(a) == dtype_and_shape(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= TOLERANCE[dtype] * max(np.abs(b).max(), 1e-3)


def value_and_gradients(layer, variables, x, **call):
    """The layer's result, its new statistics, gradients of params and x for a fixed cotangent."""

    @quick_jit
    def run(variables, x):
        def apply(params, x):
            return layer.apply(variables | {"params": params}, x, mutable=["batch_stats"], **call)

        y, vjp, moved = jax.vjp(apply, variables["params"], x, has_aux=True)
        return y, moved, vjp(draw(*y.shape, dtype=y.dtype, seed=9))

    return run(variables, x)


def random_variables(layer, x, **call):
    """Variables of the layer, scales and variances in [0.5, 1.5], the rest normal."""
    shapes = jax.eval_shape(partial(layer.init, **call), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def one(path, leaf):
        positive = path[-1].key in ("scale", "var")
        values = rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


SMALL_MAPS = [
    (1, 1, 3, 1, "SAME"),
    (1, 2, 3, 1, "SAME"),
    (2, 2, 3, 1, "SAME"),
    (3, 2, 5, 1, "SAME"),
    (1, 1, 1, 1, "SAME"),
    (2, 2, 2, 1, "SAME"),
    (2, 2, 3, 2, "SAME"),
    (4, 4, 3, 2, "SAME"),
    (4, 3, 3, 2, ((1, 1), (1, 1))),
    (4, 4, 1, 2, "SAME"),
    (4, 4, 3, 1, "VALID"),
    (5, 5, 5, 1, ((0, 0), (0, 0))),
]
OTHER_MAPS = [
    (2, 3, 3, 1, "SAME"),
    (4, 4, 3, 1, "SAME"),
    (5, 4, 3, 2, ((1, 1), (1, 1))),
    (1, 1, 3, 1, ((3, 0), (1, 1))),
    (7, 6, 5, 1, "VALID"),
    (7, 7, 3, 2, ((1, 1), (1, 1))),
]


@pytest.mark.parametrize(("h", "w", "kernel", "stride", "padding"), SMALL_MAPS + OTHER_MAPS)
def test_conv_is_flax_conv(dtype, h, w, kernel, stride, padding):
    arguments = {
        "features": 6,
        "kernel_size": (kernel, kernel),
        "strides": (stride, stride),
        "padding": padding,
        "dtype": dtype,
        "param_dtype": "float64" if dtype == "float64" else "float32",
    }
    x = draw(4, h, w, 3, dtype=dtype)
    theirs = nn.Conv(**arguments)
    variables = random_variables(theirs, x)
    reference = value_and_gradients(theirs, variables, x)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            result = value_and_gradients(ops.Conv(**arguments), variables, x)
        assert_close(result, reference, dtype)


def test_conv_starts_as_flax_conv_does():
    x = draw(1, 4, 4, 3)
    ours = jax.jit(ops.Conv(6, (3, 3)).init)(jax.random.key(3), x)
    theirs = jax.jit(nn.Conv(6, (3, 3)).init)(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_conv_without_bias_has_a_kernel_only():
    init = ops.Conv(6, (3, 3), use_bias=False).init
    variables = jax.eval_shape(init, jax.random.key(0), draw(1, 4, 4, 3))
    assert list(variables["params"]) == ["kernel"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(5, 4, 3, 6), (16, 6)])
def test_batch_norm_is_flax_batch_norm(dtype, train, shape):
    arguments = {"dtype": dtype, "param_dtype": "float64" if dtype == "float64" else "float32"}
    x = 3 * draw(*shape, dtype=dtype) + 1
    theirs = nn.BatchNorm(momentum=0.9, epsilon=1e-5, **arguments)
    call = {"use_running_average": not train}
    variables = random_variables(theirs, x, **call)
    if dtype == "float64":
        # flax.linen starts with float32 statistics and turns to float64 at the first step.
        variables["batch_stats"] = jax.tree.map(
            lambda leaf: leaf.astype("float64"), variables["batch_stats"]
        )
    reference = value_and_gradients(theirs, variables, x, **call)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            ours = ops.BatchNorm(**arguments)
            result = value_and_gradients(ours, variables, x, **call)
        assert_close(result, reference, dtype)
    start = jax.eval_shape(partial(ours.init, **call), jax.random.key(0), x)
    assert jax.tree.map(dtype_and_shape, start) == jax.tree.map(dtype_and_shape, variables)


def test_batch_norm_statistics_of_bfloat16_are_float32():
    """65,536 values a channel, whose sum in bfloat16 would stop growing at a few hundred."""
    x = (1 + draw(64, 32, 32, 4)).astype(jnp.bfloat16)
    layer = ops.BatchNorm(momentum=0.0, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    _, moved = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    assert moved["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(moved["batch_stats"]["mean"], exact.mean((0, 1, 2)), rtol=2e-6)
    np.testing.assert_allclose(moved["batch_stats"]["var"], exact.var((0, 1, 2)), rtol=2e-6)


def test_batch_norm_gradient_reaches_the_statistics():
    """The constant that the CPU form subtracts must not hide a derivative, of any order."""
    x = draw(8, 2, 2, 3)

    def plain(x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        y = (x - mean) / jnp.sqrt(var + 1e-5)
        return (y**3).sum() + (0.1 * mean).sum() + (0.1 * var).sum()

    def layer(x):
        stats = {"mean": jnp.zeros(3), "var": jnp.zeros(3)}
        variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": stats}
        # The native operator has neither these derivatives nor second ones.
        with ops.use_backend("xla"):
            y, moved = ops.BatchNorm().apply(
                variables, x, use_running_average=False, mutable=["batch_stats"]
            )
        return (y**3).sum() + sum(jax.tree.map(jnp.sum, jax.tree.leaves(moved)))

    def derivatives(f):
        return quick_jit(lambda x: jax.jvp(jax.grad(f), (x,), (draw(*x.shape, seed=5),)))(x)

    for ours, theirs in zip(derivatives(layer), derivatives(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


POOLS = [((2, 2), None, "VALID"), ((3, 3), (2, 2), ((1, 1), (1, 1))), ((3, 3), (2, 2), "SAME")]


@pytest.mark.parametrize(("window", "strides", "padding"), POOLS)
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_pools_are_flax_pools(dtype, name, window, strides, padding):
    """Maps with every value several times: at ties the first maximum takes the gradient."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, size=(2, 7, 9, 4)), dtype)

    def run(pool, strides):
        def value_and_gradient(x):
            y, vjp = jax.vjp(lambda x: pool(x, window, strides, padding), x)
            return y, vjp(draw(*y.shape, dtype=dtype))

        return quick_jit(value_and_gradient)(x)

    reference = run(getattr(nn, name), strides or window)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            assert_close(run(getattr(ops, name), strides), reference, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_keeps_a_nan(backend, place):
    x = jnp.ones((1, 2, 2, 1)).at[0, place[0], place[1], 0].set(jnp.nan)
    with ops.use_backend(backend):
        assert jnp.isnan(ops.max_pool(x, (2, 2))).all()


def test_adaptive_avg_pool_keeps_the_dtype_and_the_mean(dtype):
    x = draw(2, 14, 14, 3, dtype=dtype)
    y = ops.adaptive_avg_pool(x, 7)
    assert y.dtype == dtype
    assert_close(y, ops.avg_pool(x, (2, 2)), dtype)
    assert ops.adaptive_avg_pool(x, 14) is x


@pytest.mark.parametrize("name", ["cuda", "torch", "", None])
def test_an_unknown_backend_is_refused_with_the_list(name):
    with pytest.raises(InputError, match=r"ops\.backend.*auto, xla, native, flax"):
        ops.set_backend(name)
    assert ops.backend() == "auto"


def test_use_backend_restores_the_one_before():
    def fail_under_flax():
        with ops.use_backend("flax"):
            assert ops.backend() == "flax"
            assert ops.compiler_options() == {}
            raise KeyError

    with pytest.raises(KeyError):
        fail_under_flax()
    assert ops.backend() == "auto"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fixes are for the CPU")
@pytest.mark.parametrize(("h", "w", "kernel", "stride", "padding"), SMALL_MAPS + OTHER_MAPS)
def test_small_maps_are_convolved_by_matmuls(h, w, kernel, stride, padding):
    x, weights = draw(1, h, w, 4), draw(kernel, kernel, 4, 3)
    with ops.use_backend("xla"):
        run = jax.make_jaxpr(partial(ops.convolve, strides=(stride, stride), padding=padding))
        operators = str(run(x, weights))
    small = (h, w, kernel, stride, padding) in SMALL_MAPS
    assert ("conv_general_dilated" in operators) != small


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fixes are for the CPU")
@pytest.mark.parametrize("seed", range(30))
def test_images_of_few_channels_are_convolved_as_others_are(seed):
    """Any shape; values, gradients, forward derivatives and those of one argument alone."""
    rng = np.random.default_rng(seed)
    (h, w), (rows, columns) = rng.integers(2, 20, 2), rng.integers([1, 2], 8)
    around = tuple(map(tuple, rng.integers(0, 3, (2, 2)).tolist()))
    padding = ("SAME", "VALID", around)[seed % 3]
    x = draw(2, max(h, rows), max(w, columns), seed % 3 + 1)
    kernel = draw(rows, columns, x.shape[-1], 1 + seed % 7, seed=1)
    dx, dkernel = draw(*x.shape, seed=2), draw(*kernel.shape, seed=3)

    def everything(backend):
        with ops.use_backend(backend):
            convolve = partial(ops.convolve, padding=padding)
            y, vjp = jax.vjp(convolve, x, kernel)
            _, of_both = jax.jvp(convolve, (x, kernel), (dx, dkernel))
            of_kernel = jax.grad(lambda kernel: (convolve(x, kernel) ** 2).sum())(kernel)
            of_none = jax.grad(lambda scale: ((scale * convolve(x, kernel)) ** 2).sum())(1.0)
            return (
                y,
                vjp(draw(*y.shape, seed=4)),
                of_both,
                of_kernel,
                of_none,
                str(jax.make_jaxpr(convolve)(x, kernel)),
            )

    *ours, ours_in_words = everything("xla")
    *theirs, theirs_in_words = everything("flax")
    assert_close(ours, theirs, "float32")
    assert "few_channels" in ours_in_words
    assert "few_channels" not in theirs_in_words


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 8])
def test_a_batch_may_be_empty(backend, size):
    x = jnp.zeros((0, size, size, 3))
    with ops.use_backend(backend):
        for layer, call in (
            (ops.Conv(5, (3, 3)), {}),
            (ops.Dense(5), {}),
            (ops.BatchNorm(), {"use_running_average": True}),
        ):
            variables = layer.init(jax.random.key(0), x, **call)
            y, vjp = jax.vjp(lambda v, layer=layer, call=call: layer.apply(v, x, **call), variables)
            assert y.shape[:3] == x.shape[:3]
            assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(vjp(y)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fixes are for the CPU")
def test_padding_that_takes_away_and_large_images_are_left_to_xla():
    def operators(x, kernel, padding):
        with ops.use_backend("xla"):
            run = jax.make_jaxpr(partial(ops.convolve, padding=padding))
            return str(run(jnp.zeros(x), jnp.zeros(kernel)))

    assert "few_channels" in operators((1, 9, 9, 3), (3, 3, 3, 4), "SAME")
    assert "few_channels" not in operators((1, 9, 9, 3), (3, 3, 3, 4), ((-1, 1), (1, 1)))
    abstract = jax.ShapeDtypeStruct((64, 224, 224, 3), "float32")
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 64), "float32")
    with ops.use_backend("xla"):
        assert "few_channels" not in str(jax.make_jaxpr(ops.convolve)(abstract, kernel))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fixes are for the CPU")
def test_the_cpu_forms_are_taken_on_cpu_and_only_there(monkeypatch):
    x, kernel = draw(1, 2, 2, 3), draw(3, 3, 3, 4)

    def operators():
        def run(x, kernel):
            return ops.max_pool(ops.convolve(x, kernel), (2, 2))

        return str(jax.make_jaxpr(run)(x, kernel))

    assert "conv_general_dilated" not in operators()
    assert "reduce_window" not in operators()
    with ops.use_backend("flax"):
        assert "conv_general_dilated" in operators()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in operators()
    assert "reduce_window" in operators()
    assert ops.compiler_options() == {}


def test_compiler_options_compile_here():
    options = ops.compiler_options()
    double = jax.jit(partial(jnp.multiply, 2), compiler_options=options)
    assert double(3) == 6


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_prepare_process_says_what_it_did_before_and_after_jax_starts():
    lines = run_python(
        """
        from flaxcls import ops
        print(ops.prepare_process())
        import jax, time
        import jax.numpy as jnp
        print(float(jnp.ones((1000, 1000)).sum()))
        print(ops.prepare_process())
        x = jnp.ones((2000, 2000))
        multiply = jax.jit(lambda x: x @ x @ x)
        multiply(x)
        began = time.monotonic()
        y = multiply(x)
        called = time.monotonic() - began
        jax.block_until_ready(y)
        print(called / (time.monotonic() - began))
        """
    ).splitlines()
    assert lines[0].startswith(("glibc ", "allocator "))
    assert lines[1] == "1000000.0"
    assert lines[2].startswith("allocator left as it is")
    if lines[0].startswith("glibc "):  # and no accelerator: a call runs where it is made
        assert float(lines[3]) > 0.5


def test_prepare_process_leaves_another_c_library_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert "only glibc's" in ops.prepare_process()


def test_an_option_that_xla_does_not_know_is_left_out():
    printed = run_python(
        """
        import sys
        from flaxcls import ops
        room = sys.modules["flaxcls.ops.backend"]
        room._CPU_COMPILER_OPTIONS = {"xla_cpu_no_such_option": "1"}
        print(ops.compiler_options())
        """
    )
    assert printed.strip() == "{}"
