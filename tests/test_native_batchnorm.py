"""The native BatchNorm, and what is fused with it, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_operators import assert_close, assert_equal, in_two_threads, needs_native

from flaxcls import ops
from flaxcls.freezing import Selection, frozen_statistics
from flaxcls.ops.native.batchnorm import batch_norm, batch_norm_inference
from flaxcls.ops.normalise import normalise

pytestmark = needs_native
EPSILON = 1e-5
FUSIONS = [(r, a, p) for r in (False, True) for a in (False, True) for p in (False, True)]
CHANNELS = {"float32": (1, 3, 5, 16, 17, 48, 64, 130), "bfloat16": (3, 16, 17, 130)}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def windows_of_2x2(z):
    """z (N, H, W, C) -> (N, H // 2, W // 2, C, 4), a view where H and W are even."""
    n, h, w, c = z.shape
    even = z[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return even.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // 2, w // 2, c, 4)


def reference(x, scale, bias, residual, relu, pool, gradient):
    """All in float64: (y, mean, var) and the gradients of x, scale, bias and residual."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    deviation = np.sqrt(var + EPSILON)
    normal = (x - mean) / deviation
    z = normal * scale + bias + (0 if residual is None else residual)
    y = np.maximum(z, 0) if relu else z
    d = gradient
    if pool:
        seen = windows_of_2x2(y)
        places = np.zeros_like(seen)
        np.put_along_axis(places, seen.argmax(-1)[..., None], gradient[..., None], -1)
        d = np.zeros_like(x)
        for place in range(4):
            i, j = divmod(place, 2)
            into = d[:, i : y.shape[1] // 2 * 2 : 2, j : y.shape[2] // 2 * 2 : 2]
            into[...] = places[..., place]
        y = seen.max(-1)
    if relu:
        d = d * (z > 0)
    dscale, dbias = (d * normal).sum(axes), d.sum(axes)
    n = max(1, x.size // x.shape[-1])
    dx = scale / deviation * (d - dbias / n - normal * dscale / n)
    return (y, mean, var), (dx, dscale, dbias, d)


def random_arguments(shape, residual, dtype="float32", mean=2.0):
    c = shape[-1]
    scale = np.random.default_rng(3).uniform(-1.5, 1.5, c)
    x = jnp.asarray(mean + draw(*shape), dtype)
    added = jnp.asarray(draw(*shape, seed=1), dtype) if residual else None
    return x, jnp.float32(scale), jnp.float32(draw(c, seed=2)), added


def run(arguments, relu, pool, gradient_of=None):
    """(y, mean, var), the gradients, and the cotangent of y that they belong to."""

    def apply(x, scale, bias, residual):
        y, *statistics = batch_norm(
            x, scale, bias, EPSILON, residual=residual, relu=relu, pool=pool
        )
        return y, statistics

    y, vjp, statistics = jax.vjp(apply, *arguments, has_aux=True)
    gradient = jnp.asarray(draw(*y.shape, seed=4), y.dtype)
    return (y, *statistics), vjp(gradient), gradient


def check(arguments, relu, pool):
    x, _, _, residual = arguments
    outputs, gradients, gradient = run(arguments, relu, pool)
    exact = [None if a is None else np.asarray(a, np.float64) for a in (*arguments, gradient)]
    of_y, of_x = reference(*exact[:4], relu, pool, exact[4])
    dtypes = [x.dtype, "float32", "float32"]
    for ours, theirs, dtype in zip(outputs, of_y, dtypes, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype)
    assert (gradients[3] is None) == (residual is None)
    for ours, theirs, dtype in zip(gradients, of_x, [*dtypes, x.dtype], strict=True):
        if ours is not None:
            assert ours.dtype == dtype
            assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("residual", "relu", "pool"), FUSIONS)
def test_values_and_gradients_are_those_of_float64(residual, relu, pool, dtype):
    """An odd map, with every number of channels."""
    for c in CHANNELS[dtype]:
        check(random_arguments((3, 5, 7, c), residual, dtype), relu, pool)


@pytest.mark.parametrize("seed", range(20))
def test_any_shape_is_that_of_float64(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers([2, 2, 2, 1], [6, 12, 12, 200]).tolist())
    residual, relu, pool = FUSIONS[rng.integers(len(FUSIONS))]
    dtype = ("float32", "bfloat16")[seed % 2]
    check(random_arguments(shape, residual, dtype, mean=rng.normal()), relu, pool)


@pytest.mark.parametrize("shape", [(40, 3), (9, 4, 5), (2, 3, 4, 3, 6), (7, 4100), (1, 13, 1, 8)])
def test_any_rank(shape):
    for residual in (False, True):
        check(random_arguments(shape, residual), relu=True, pool=False)


@pytest.mark.parametrize("shape", [(8, 33, 31, 17), (8, 16, 16, 64)])
def test_maps_that_are_divided_among_threads(shape):
    for residual, relu, pool in FUSIONS:
        check(random_arguments(shape, residual), relu, pool)


@pytest.mark.parametrize("shape", [(4, 1, 6, 3), (4, 6, 1, 3), (0, 4, 4, 3), (4, 4, 4, 0)])
def test_maps_too_small_to_pool_and_empty_ones(shape):
    arguments = random_arguments(shape, residual=True)
    (y, _, _), gradients, _ = run(arguments, relu=True, pool=True)
    assert y.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    assert [g.shape for g in gradients] == [a.shape for a in arguments]
    assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("relu", [False, True])
def test_of_equal_numbers_the_first_wins_the_pool(relu):
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, size=(6, 8, 8, 20)), "float32")
    check((x, jnp.ones(20), jnp.full(20, 0.1), None), relu, pool=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_stays_in_its_channel(dtype):
    for relu, pool in ((False, False), (True, False), (True, True)):
        x, scale, bias, _ = random_arguments((2, 4, 4, 19), residual=False, dtype=dtype)
        x = x.at[1, 2, 3, 7].set(jnp.nan)
        outputs = batch_norm(x, scale, bias, EPSILON, relu=relu, pool=pool)
        for array in outputs:
            nan = np.isnan(np.asarray(array, np.float32)).reshape(-1, 19)
            assert nan[:, 7].all()
            assert nan.sum() == len(nan)


@pytest.mark.parametrize(("mean", "deviation"), [(1000, 1), (-1e4, 30), (1, 1e-3), (0, 1e-4)])
def test_a_large_mean_costs_no_digits(mean, deviation):
    x = jnp.float32(mean + deviation * draw(16, 16, 16, 24))
    check((x, jnp.ones(24), jnp.zeros(24), None), relu=False, pool=False)
    _, _, var = batch_norm(x, jnp.ones(24), jnp.zeros(24), EPSILON)
    np.testing.assert_allclose(var, np.var(np.float64(x), (0, 1, 2)), rtol=2e-6)


def test_a_constant_channel_has_no_variance():
    y, mean, var = batch_norm(jnp.full((8, 4, 4, 3), 0.1), jnp.ones(3), jnp.ones(3), EPSILON)
    assert (np.abs(y - 1) < 1e-5).all()
    assert (np.abs(mean - 0.1) < 1e-8).all()
    assert (var >= 0).all()
    assert (var < 1e-15).all()


def test_many_pixels_are_summed_exactly():
    """1,048,576 values a channel, most of one sign."""
    x = jnp.float32(0.1 + np.abs(draw(64, 128, 128, 1)))
    _, mean, var = batch_norm(x, jnp.ones(1), jnp.zeros(1), EPSILON)
    np.testing.assert_allclose(mean, np.float64(x).mean(), rtol=2e-7)
    np.testing.assert_allclose(var, np.float64(x).var(), rtol=2e-7)


def value_and_gradient():
    _, scale, bias, _ = random_arguments((1, 64), residual=False)

    def loss(x):
        y, mean, var = batch_norm(x, scale, bias, EPSILON, residual=x, relu=True)
        return (y**2).sum(), (y, mean, var)

    return jax.value_and_grad(loss, has_aux=True)


def test_two_runs_and_two_threads_give_the_same_bits():
    x = jnp.float32(draw(32, 16, 16, 64))
    f = jax.jit(value_and_gradient())
    assert_equal([f(x), f(x), *in_two_threads(f, x)])


def test_vmap_scan_and_remat_give_the_bits_of_single_calls():
    stacked = jnp.float32(draw(3, 4, 6, 6, 64))
    f = jax.jit(value_and_gradient())
    single = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(f, stacked))
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, xs)[1])(stacked)
    assert_equal([single, jax.vmap(f)(stacked), scanned])

    def loss(x):
        return (batch_norm(x, jnp.ones(64), jnp.zeros(64), EPSILON, relu=True)[0] ** 3).sum()

    gradients = [jax.jit(jax.grad(g))(stacked[0]) for g in (loss, jax.checkpoint(loss))]
    assert_equal(gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("residual", "relu", "pool"), FUSIONS)
def test_with_given_statistics_it_is_that_of_float64(residual, relu, pool, dtype):
    rng = np.random.default_rng(7)
    for c in CHANNELS[dtype]:
        x, scale, bias, added = random_arguments((3, 5, 7, c), residual, dtype)
        mean, var = jnp.float32(rng.normal(size=c)), jnp.float32(rng.uniform(0.1, 3, c))

        def apply(x, scale, bias, added, mean=mean, var=var):
            return batch_norm_inference(
                x, scale, bias, mean, var, EPSILON, residual=added, relu=relu, pool=pool
            )

        y, vjp = jax.vjp(apply, x, scale, bias, added)
        gradient = jnp.asarray(draw(*y.shape, seed=4), dtype)
        exact = [np.asarray(a, np.float64) for a in (x, scale, bias, mean, var, gradient)]
        z = (exact[0] - exact[3]) / np.sqrt(exact[4] + EPSILON) * exact[1] + exact[2]
        z = z if added is None else z + np.asarray(added, np.float64)
        z = np.maximum(z, 0) if relu else z
        assert_close(y, windows_of_2x2(z).max(-1) if pool else z, dtype)
        if dtype == "float32":  # in bfloat16 the gradient's own ReLU and pool see rounded numbers
            plain = partial(normalise, epsilon=EPSILON, relu=relu, pool=pool, dtype=dtype)
            with ops.use_backend("flax"):
                of_all = jax.vjp(plain, x, scale, bias, mean, var, added)[1](gradient)
            theirs = jax.tree.leaves((*of_all[:3], of_all[5]))
            for a, b in zip(jax.tree.leaves(vjp(gradient)), theirs, strict=True):
                assert_close(a, b)


def test_statistics_pass_no_gradient():
    x, scale, bias, _ = random_arguments((4, 4, 4, 3), residual=False)
    gradient = jax.grad(lambda x: sum(s.sum() for s in batch_norm(x, scale, bias, EPSILON)[1:]))(x)
    assert not gradient.any()


FORWARD = {"residual": False, "relu": False, "pool": False, "epsilon": np.float32(EPSILON)}


@pytest.mark.parametrize(
    ("shape", "dtype", "change", "says"),
    [
        ((4,), "float32", {}, r"\(\.\.\., C\)"),
        ((4, 4, 3), "float32", {"pool": True}, r"\(N, H, W, C\)"),
        ((4, 4, 4, 3), "float32", {"pool": True}, "does not fit"),
        ((4, 3), "float32", {"residual": True}, "does not fit"),
        ((4, 3), "float16", {}, "float32 or bfloat16"),
        ((4, 5), "float32", {}, "does not fit"),
        ((4, 3), "float32", {"epsilon": 1}, "epsilon|attribute|decode"),
    ],
)
def test_a_wrong_call_of_the_compiled_function_is_refused(shape, dtype, change, says):
    x, three = jnp.zeros(shape, dtype), jnp.zeros(3)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, three, three, three)]
    results.append(jax.ShapeDtypeStruct((0,), "uint8"))
    call = jax.ffi.ffi_call("flaxcls_batch_norm_forward", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        jax.block_until_ready(call(x, jnp.zeros((0,), dtype), three, three, **FORWARD | change))


def module_result(backend, dtype, train, frozen, add, relu, pool):
    """The module's result, its new statistics and gradients under a backend."""
    x, _, _, residual = random_arguments((4, 6, 7, 10), add, dtype)
    layer = ops.BatchNorm(dtype=dtype, name="norm")
    params = {"scale": jnp.linspace(-1, 1, 10), "bias": jnp.linspace(0, 1, 10)}
    stats = {"mean": jnp.ones(10), "var": jnp.full(10, 2.0)}
    selection = Selection(frozen=("*",)) if frozen else Selection()

    def apply(params, x, residual):
        variables = {"params": params, "batch_stats": stats}
        then = {"residual": residual, "relu": relu, "pool": pool}
        return layer.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"], **then
        )

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def value_and_gradients(params, x, residual):
        y, vjp, moved = jax.vjp(apply, params, x, residual, has_aux=True)
        return y, moved, vjp(jnp.asarray(draw(*y.shape, seed=5), y.dtype))

    with ops.use_backend(backend), frozen_statistics(selection):
        return value_and_gradients(params, x, residual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("add", "relu", "pool"), [FUSIONS[0], FUSIONS[3], FUSIONS[6]])
@pytest.mark.parametrize(("train", "frozen"), [(True, False), (True, True), (False, False)])
def test_the_module_gives_what_the_plain_operators_give(train, frozen, add, relu, pool, dtype):
    ours, theirs = (
        module_result(backend, dtype, train, frozen, add, relu, pool)
        for backend in ("native", "flax")
    )
    if dtype == "bfloat16" and relu:
        # Plain operators round before ReLU and pool, which turns signs and makes equals.
        ours, theirs = ours[:2], theirs[:2]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.float64(a), np.float64(b)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [3, 17, 64])
def test_running_statistics_over_a_scan_of_steps_are_those_of_float64(channels, dtype):
    layer = ops.BatchNorm(momentum=0.8, dtype=dtype)
    batches = jnp.asarray(0.5 + draw(5, 4, 6, 7, channels), dtype)
    variables = layer.init(jax.random.key(0), batches[0], use_running_average=True)

    def step(stats, x):
        _, moved = layer.apply(variables | stats, x, False, relu=True, mutable=["batch_stats"])
        return moved, None

    assert "flaxcls_batch_norm_forward" in names_of_calls(step, variables, batches[0])
    stats = {"batch_stats": variables["batch_stats"]}
    found = jax.jit(lambda stats: jax.lax.scan(step, stats, batches)[0])(stats)["batch_stats"]
    mean, var = np.zeros(channels), np.ones(channels)
    for x in np.float64(batches):
        mean = 0.8 * mean + 0.2 * x.mean((0, 1, 2))
        var = 0.8 * var + 0.2 * x.var((0, 1, 2))
    assert_close(found["mean"], mean)
    assert_close(found["var"], var)


def names_of_calls(f, *arguments):
    return str(jax.make_jaxpr(f)(*arguments))


@pytest.mark.parametrize(
    ("backend", "dtype", "train", "native"),
    [
        ("auto", "float32", True, True),
        ("native", "bfloat16", True, True),
        ("native", "float16", True, False),
        ("native", "float32", False, True),
        ("native", "float16", False, False),
        ("xla", "float32", False, False),
        ("xla", "float32", True, False),
        ("flax", "float32", True, False),
    ],
)
def test_where_the_module_is_native(backend, dtype, train, native):
    layer, x = ops.BatchNorm(dtype=dtype), jnp.zeros((4, 4, 4, 8), dtype)
    init = partial(layer.init_with_output, use_running_average=not train, relu=True, pool=True)
    with ops.use_backend(backend):
        jaxpr = names_of_calls(init, jax.random.key(0), x)
    name = "flaxcls_batch_norm_forward" if train else "flaxcls_batch_norm_inference"
    assert (name in jaxpr) == native
    assert jaxpr.count("flaxcls_") == native


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_statistics_of_another_dtype_are_not_taken_for_float32(dtype, x64):
    layer, x = ops.BatchNorm(dtype="bfloat16"), jnp.ones((4, 4, 4, 8), "bfloat16")
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    y = layer.apply(cast, x, use_running_average=True)
    assert y.dtype == "bfloat16"
    assert_close(y, np.ones(x.shape), "bfloat16")


def test_over_several_devices_nothing_is_native(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    layer, x = ops.BatchNorm(), jnp.zeros((4, 4, 4, 8))
    jaxpr = names_of_calls(
        partial(layer.init_with_output, use_running_average=False), jax.random.key(0), x
    )
    assert "flaxcls_" not in jaxpr


def test_float64_parameters_are_not_rounded(x64):
    layer = ops.BatchNorm(param_dtype="float64")
    init = partial(layer.init_with_output, use_running_average=False)
    x = jnp.zeros((4, 8), "float32")
    assert "flaxcls_" not in names_of_calls(init, jax.random.key(0), x)
    y, variables = jax.eval_shape(init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, variables))} == {jnp.dtype("float64")}
