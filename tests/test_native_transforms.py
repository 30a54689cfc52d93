"""A block of all native operators under JAX's transformations, in threads, beside a mesh."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from native_operators import assert_equal, in_two_threads, needs_native

from flaxcls import ops
from flaxcls.ops.backend import use_native
from flaxcls.ops.native import pooling
from flaxcls.sharding import DATA_AXIS, create_mesh, put_replicated

pytestmark = needs_native
TARGETS = (
    *("conv_forward", "conv_input_gradient", "conv_kernel_gradient"),
    *("batch_norm_forward", "batch_norm_backward", "max_pool_forward", "max_pool_backward"),
)


class Block(nn.Module):
    """Of the shape of its input, so that blocks can follow each other in a scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv")(x)
        y = ops.BatchNorm(name="norm")(y, False, residual=x, relu=True)
        # In float32 `ops.max_pool` takes XLA's form, which is as fast.
        max_pool = pooling.max_pool if use_native() else ops.max_pool
        return max_pool(y, (3, 3), (1, 1), "SAME")


def apply(block, variables, x):
    return block.apply(variables, x, mutable=["batch_stats"])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def random_variables(layers, channels=17):
    """Of so many blocks, stacked, float64."""
    rng = np.random.default_rng(1)
    per_channel = (layers, channels)
    scale, var = (rng.uniform(0.5, 1.5, per_channel) for _ in range(2))
    bias, mean = (rng.normal(size=per_channel) for _ in range(2))
    kernel = rng.normal(size=(layers, 3, 3, channels, channels)) / 12
    params = {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
    return {"params": params, "batch_stats": {"norm": {"mean": mean, "var": var}}}


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


def value_gradients_and_statistics(network, variables, x):
    """((loss, new statistics), (gradients of the parameters, of x))."""

    def loss(params, x):
        y, moved = network(variables | {"params": params}, x)
        return (y**2).mean(), moved

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)


def assert_close(ours, theirs, tolerance):
    """Each array of a tree is, of its largest number."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def plain_loop(variables, x):
    moved = []
    for i in range(len(variables["params"]["norm"]["scale"])):
        x, stats = apply(Block(), jax.tree.map(lambda leaf, i=i: leaf[i], variables), x)
        moved.append(stats)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)


def scan(block, variables, x):
    return jax.lax.scan(lambda x, of_layer: block(of_layer, x), x, variables)


def test_scan_checkpoint_and_remat_give_what_the_plain_loop_gives():
    variables, x = float32(random_variables(layers=3)), jnp.float32(draw(3, 6, 5, 17))
    expected, *others = (
        jax.jit(partial(value_gradients_and_statistics, network))(variables, x)
        for network in (
            plain_loop,
            partial(scan, partial(apply, Block())),
            partial(scan, jax.checkpoint(partial(apply, Block()))),
            partial(scan, partial(apply, nn.remat(Block)())),
        )
    )
    for other in others:
        assert_close(other, expected, 1e-6)


def one_block():
    variables = jax.tree.map(lambda leaf: leaf[0], random_variables(layers=1))
    return partial(value_gradients_and_statistics, partial(apply, Block())), variables


@pytest.mark.parametrize("shared", [True, False])
def test_vmap_gives_what_single_calls_give(shared):
    """Over images alone, and over parameters too."""
    f, variables = one_block()
    variables, stacked = float32(variables), jnp.float32(draw(3, 2, 6, 5, 17))
    each = [
        variables if shared else jax.tree.map(lambda v, i=i: v * i, variables) for i in (1, 2, 3)
    ]
    single = [jax.jit(f)(*pair) for pair in zip(each, stacked, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    together = variables if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    found = jax.jit(jax.vmap(f, (None if shared else 0, 0)))(together, stacked)
    assert_close(found, expected, 1e-6)


def test_all_operators_are_native_and_two_threads_give_the_same_bits():
    f, variables = one_block()
    compiled = jax.jit(f).lower(float32(variables), x := jnp.float32(draw(16, 8, 8, 17))).compile()
    assert [target for target in TARGETS if f"flaxcls_{target}" not in compiled.as_text()] == []
    alone = compiled(float32(variables), x)
    assert_equal([alone, *in_two_threads(lambda x: compiled(float32(variables), x), x)])


IMAGES = (16, 6, 6, 17)


def on_all_devices(backend):
    """Of one block over a mesh: calls of native operators, devices of the result, the result."""
    f, variables = one_block()
    mesh = create_mesh()
    variables = put_replicated(float32(variables), mesh)
    x = jax.device_put(np.float32(draw(*IMAGES)), NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
    with ops.use_backend(backend):
        called = str(jax.make_jaxpr(f)(variables, x)).count("flaxcls_")
        result = jax.jit(f)(variables, x)
    of_x = result[1][1]
    return called, len(of_x.sharding.device_set), jax.tree.map(np.asarray, result)


def test_eight_devices_run_xlas_operators_with_equal_results(monkeypatch):
    """And both are those of float64: three operators in a row, of each at most 2e-5."""
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        in_a_mesh = list(pool.map(on_all_devices, ("auto", "native")))
    f, variables = one_block()
    with jax.enable_x64(True), ops.use_backend("flax"):
        exact = jax.tree.map(np.asarray, jax.jit(f)(variables, draw(*IMAGES)))
    assert exact[0][0].dtype == np.float64
    called, devices, alone = on_all_devices("native")
    assert (called, devices) == (len(TARGETS), 1)
    assert_close(alone, exact, 5e-5)
    for called, devices, result in in_a_mesh:
        assert (called, devices) == (0, 8)
        assert_close(result, exact, 5e-5)
