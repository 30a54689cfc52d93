"""The native convolution and both its gradients are right, whatever the shape and the algorithm."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.ops.native import convolution
from flaxcls.ops.native.build import native
from flaxcls.ops.native.convolution import Algorithm, choose, convolve

pytestmark = pytest.mark.skipif(not native().usable, reason=native().said)

# Largest error, relative to the largest value of the result.
TOLERANCE = 1e-5
KERNEL_GRADIENT_TOLERANCE = {Algorithm.WINOGRAD_4: 2e-5}
PASSES = ("conv_forward", "conv_input_gradient", "conv_kernel_gradient")


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def float64(array):
    return np.asarray(array, np.float64)


class Reference:
    """Output and gradients in float64 NumPy, a matrix product for each group and tap."""

    def __init__(self, x, kernel, strides, padding, groups):
        self.x, self.kernel = float64(x), float64(kernel)
        self.strides, self.padding, self.groups = strides, padding, groups
        self.padded = np.pad(self.x, ((0, 0), *padding, (0, 0)))
        self.size = tuple(
            (n - k) // step + 1
            for n, k, step in zip(self.padded.shape[1:3], kernel.shape[:2], strides, strict=True)
        )

    def products(self):
        """For each group and tap: index of the pixels seen, of the tap's weights, of outputs."""
        inputs, outputs = self.kernel.shape[2], self.kernel.shape[3] // self.groups
        for group, i, j in itertools.product(
            range(self.groups), range(self.kernel.shape[0]), range(self.kernel.shape[1])
        ):
            channels = slice(group * inputs, (group + 1) * inputs)
            features = slice(group * outputs, (group + 1) * outputs)
            rows = slice(i, i + (self.size[0] - 1) * self.strides[0] + 1, self.strides[0])
            columns = slice(j, j + (self.size[1] - 1) * self.strides[1] + 1, self.strides[1])
            yield (
                (slice(None), rows, columns, channels),
                (i, j, slice(None), features),
                (..., features),
            )

    def output(self):
        y = np.zeros((self.x.shape[0], *self.size, self.kernel.shape[3]))
        for pixels, tap, features in self.products():
            y[features] += self.padded[pixels] @ self.kernel[tap]
        return y

    def gradients(self, dy):
        dy = float64(dy)
        dpadded, dkernel = np.zeros_like(self.padded), np.zeros_like(self.kernel)
        for pixels, tap, features in self.products():
            dpadded[pixels] += dy[features] @ self.kernel[tap].T
            dkernel[tap] += np.einsum("nhwc,nhwo->co", self.padded[pixels], dy[features])
        (top, _), (left, _) = self.padding
        h, w = self.x.shape[1:3]
        return dpadded[:, top : top + h, left : left + w], dkernel


def native_passes(x, kernel, dy, strides, padding, groups, algorithm=None):
    """Output and both gradients, each pass by `algorithm` (None: as it is chosen)."""
    before, convolution.forced = convolution.forced, algorithm
    try:
        y, pull = jax.vjp(lambda x, k: convolve(x, k, strides, padding, groups), x, kernel)
        return y, *pull(dy)
    finally:
        convolution.forced = before


def assert_close(result, reference, tolerance, what):
    result = float64(result)
    assert result.shape == reference.shape
    if result.size:
        error = np.abs(result - reference).max() / max(np.abs(reference).max(), 1e-30)
        assert error <= tolerance, f"{what}: {error:.1e}"


def check(n, size, channels, features, kernel_size, strides, padding, groups=1, algorithm=None):
    x = draw(n, *size, channels)
    kernel = draw(*kernel_size, channels // groups, features, seed=1)
    reference = Reference(x, kernel, strides, padding, groups)
    dy = draw(n, *reference.size, features, seed=2)
    y, dx, dkernel = native_passes(x, kernel, dy, strides, padding, groups, algorithm)
    expected = (reference.output(), *reference.gradients(dy))
    tolerances = (
        TOLERANCE,
        TOLERANCE,
        KERNEL_GRADIENT_TOLERANCE.get(algorithm, TOLERANCE if algorithm is not None else 2e-5),
    )
    for result, true, tolerance, what in zip(
        (y, dx, dkernel), expected, tolerances, PASSES, strict=True
    ):
        assert_close(result, true, tolerance, what)


def same(k):
    """Zeros around the image that leave its size as it is."""
    return ((k - 1) // 2, k // 2)


CHANNELS = (1, 3, 5, 16, 17, 48, 64, 130)
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (11, 11), (1, 3), (3, 1), (2, 2), (4, 6))
SIZES = ((1, 1), (2, 2), (2, 3), (4, 4), (7, 5), (8, 8), (13, 16), (28, 28), (40, 40))


def random_shape(seed):
    """A convolution of any kind, of at most 20 million multiplications."""
    rng = np.random.default_rng(seed)

    def one_of(values):
        return values[rng.integers(len(values))]

    while True:
        size, kernel_size = one_of(SIZES), one_of(KERNELS)
        strides = one_of(((1, 1), (1, 1), (2, 2), (2, 1), (3, 4)))
        groups = one_of((1, 1, 1, 1, 2, 3))
        channels, features = groups * one_of(CHANNELS), groups * one_of(CHANNELS)
        n = one_of((1, 2, 3, 8))
        kind = one_of(("same", "valid", "any"))
        if kind == "same":
            padding = (same(kernel_size[0]), same(kernel_size[1]))
        elif kind == "valid":
            padding = ((0, 0), (0, 0))
        else:
            padding = tuple(tuple(int(p) for p in rng.integers(0, k + 1, 2)) for k in kernel_size)
        fits = all(s + sum(p) >= k for s, p, k in zip(size, padding, kernel_size, strict=True))
        work = n * np.prod(size) * np.prod(kernel_size) * channels * features // groups
        if fits and work <= 20e6:
            return n, size, channels, features, kernel_size, strides, padding, groups


@pytest.mark.parametrize("seed", range(60))
def test_any_shape_is_right_as_chosen(seed):
    check(*random_shape(seed))


@pytest.mark.parametrize("seed", range(100, 125))
@pytest.mark.parametrize("algorithm", [Algorithm.DIRECT, Algorithm.SMALL_MAPS])
def test_any_shape_is_right_by_every_algorithm(seed, algorithm):
    check(*random_shape(seed), algorithm=algorithm)


# F(2x2, 3x3), F(4x4, 3x3) and F(2x2, 5x5).
WINOGRAD = [(Algorithm.WINOGRAD_2, 3), (Algorithm.WINOGRAD_4, 3), (Algorithm.WINOGRAD_2, 5)]


@pytest.mark.parametrize(("algorithm", "taps"), WINOGRAD)
@pytest.mark.parametrize(
    ("channels", "features"),
    [(1, 16), (3, 5), (16, 16), (17, 130), (64, 64), (130, 48), (192, 130)],
)
@pytest.mark.parametrize(
    ("n", "size", "padding"),
    [
        (1, (1, 1), ((1, 1), (1, 1))),
        (3, (2, 5), ((1, 1), (1, 1))),
        (2, (13, 9), ((0, 0), (0, 0))),
        (5, (8, 8), ((1, 1), (1, 1))),
        (2, (6, 7), ((0, 3), (2, 1))),
    ],
)
def test_winograd_is_right(n, size, padding, channels, features, algorithm, taps):
    if taps == 5:  # as many outputs: a pixel more on each side
        padding = tuple((before + 1, after + 1) for before, after in padding)
    check(n, size, channels, features, (taps, taps), (1, 1), padding, algorithm=algorithm)


@pytest.mark.parametrize(("algorithm", "taps"), WINOGRAD)
def test_winograd_is_right_over_many_tiles(algorithm, taps):
    kernel, around = (taps, taps), (same(taps), same(taps))
    check(8, (28, 28), 32, 16, kernel, (1, 1), around, algorithm=algorithm)
    check(8, (16, 16), 160, 112, kernel, (1, 1), around, algorithm=algorithm)
    check(64, (14, 14), 32, 64, kernel, (1, 1), around, algorithm=algorithm)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_depthwise_is_right(strides):
    check(2, (9, 7), 20, 20, (3, 3), strides, (same(3), same(3)), groups=20)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_empty_batches_give_empty_outputs_and_gradients_of_zero(algorithm):
    check(0, (6, 6), 4, 8, (3, 3), (1, 1), (same(3), same(3)), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_empty_outputs_give_gradients_of_zero(algorithm):
    x, kernel = draw(2, 2, 2, 4), draw(3, 3, 4, 8)
    y, dx, dkernel = native_passes(
        x, kernel, jnp.zeros((2, 0, 0, 8)), (1, 1), ((0, 0), (0, 0)), 1, algorithm
    )
    assert y.shape == (2, 0, 0, 8)
    assert not dx.any()
    assert not dkernel.any()


def test_pixels_that_no_window_meets_get_a_gradient_of_zero():
    x, kernel = draw(2, 9, 9, 3), draw(1, 1, 3, 16)
    dx = jax.grad(lambda x: convolve(x, kernel, (4, 4)).sum())(x)
    met = np.zeros((9, 9), bool)
    met[::4, ::4] = True
    assert np.asarray(dx)[:, met].all()
    assert not np.asarray(dx)[:, ~met].any()


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_two_runs_are_bitwise_equal(algorithm):
    x, kernel, dy = draw(16, 12, 12, 48), draw(3, 3, 48, 80), draw(16, 12, 12, 80)
    run = partial(native_passes, x, kernel, dy, (1, 1), (same(3), same(3)), 1, algorithm)
    first = run()
    for _ in range(5):
        for a, b in zip(first, run(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_python_threads_at_once_get_what_one_gets():
    x, kernel, dy = draw(16, 12, 12, 48), draw(3, 3, 48, 80), draw(16, 12, 12, 80)
    run = jax.jit(lambda x: native_passes(x, kernel, dy, (1, 1), (same(3), same(3)), 1))
    alone = run(x)
    with ThreadPoolExecutor(2) as threads:
        for together in threads.map(lambda _: run(x), range(20)):
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a, b)


def layer(x, kernel):
    return convolve(x, kernel, (1, 1), (same(3), same(3)))


def test_vmap_convolves_each():
    x, kernel = draw(3, 2, 6, 6, 8), draw(3, 3, 3, 8, 16)

    def loss(x, kernel):
        return (layer(x, kernel) ** 2).sum()

    batched = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(x, kernel)
    each = [jax.value_and_grad(loss, (0, 1))(*pair) for pair in zip(x, kernel, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3), batched, stacked)
    summed = jax.grad(lambda kernel: jax.vmap(loss)(x, kernel).sum())(kernel)
    np.testing.assert_allclose(summed, stacked[1][1], rtol=1e-5, atol=1e-3)


def test_scan_and_remat_give_the_gradients_of_the_plain_loop():
    x, kernels = draw(2, 6, 6, 8), draw(4, 3, 3, 8, 8) / 8

    def loop(kernels):
        y = x
        for kernel in kernels:
            y = layer(y, kernel)
        return (y**2).sum()

    def scan(block, kernels):
        return (jax.lax.scan(lambda y, kernel: (block(y, kernel), None), x, kernels)[0] ** 2).sum()

    expected = jax.grad(loop)(kernels)
    for block in (layer, jax.checkpoint(layer)):
        result = jax.jit(jax.grad(partial(scan, block)))(kernels)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(200, 208))
def test_bfloat16_of_any_shape_is_off_by_its_rounding(seed):
    n, size, channels, features, kernel_size, strides, padding, groups = random_shape(seed)
    x = draw(n, *size, channels, dtype="bfloat16")
    kernel = draw(*kernel_size, channels // groups, features, dtype="bfloat16", seed=1)
    reference = Reference(x, kernel, strides, padding, groups)
    dy = draw(n, *reference.size, features, dtype="bfloat16", seed=2)
    results = native_passes(x, kernel, dy, strides, padding, groups)
    for result, exact in zip(results, (reference.output(), *reference.gradients(dy)), strict=True):
        assert result.dtype == "bfloat16"
        # 1e-5, 2e-5 for a kernel's gradient, and what rounding to 8 bits adds.
        limit = 2e-5 * np.abs(exact).max() + 2.0**-8 * np.abs(exact)
        assert (np.abs(float64(result) - exact) <= limit).all()


def test_bfloat16_is_computed_in_float32():
    x, kernel = draw(2, 6, 6, 8, dtype="bfloat16"), draw(3, 3, 8, 16, dtype="bfloat16")
    y, pull = jax.vjp(layer, x, kernel)
    gradients = pull(jnp.ones_like(y))
    assert {leaf.dtype for leaf in (y, *gradients)} == {jnp.dtype("bfloat16")}
    exact = layer(x.astype("float32"), kernel.astype("float32"))
    np.testing.assert_array_equal(y, exact.astype("bfloat16"))


def targets(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return [target for target in PASSES if target in text]


def test_a_gradient_that_nobody_uses_is_not_computed():
    x, kernel = draw(2, 6, 6, 8), draw(3, 3, 8, 16)

    def loss(x, kernel):
        return (layer(x, kernel) ** 2).sum()

    assert targets(jax.grad(loss, 0), x, kernel) == ["conv_forward", "conv_input_gradient"]
    assert targets(jax.grad(loss, 1), x, kernel) == ["conv_forward", "conv_kernel_gradient"]


def test_second_derivatives_are_refused():
    x, kernel = draw(1, 4, 4, 3), draw(3, 3, 3, 5)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: jax.grad(lambda x: (layer(x, kernel) ** 2).sum())(x).sum())(x)


def test_what_does_not_fit_is_refused():
    x = draw(1, 4, 4, 4)
    with pytest.raises(ValueError, match="do not fit in 1 group"):
        convolve(x, draw(3, 3, 3, 8))
    with pytest.raises(ValueError, match="do not fit in 3 group"):
        convolve(draw(1, 4, 4, 3), draw(3, 3, 1, 8), groups=3)
    with pytest.raises(TypeError, match="both must be float32 or both bfloat16"):
        convolve(x, draw(3, 3, 4, 8, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strides": [0, 1]}, "strides must be two positive numbers"),
        ({"strides": [1]}, "strides must be two positive numbers"),
        ({"padding": [-1, 1, 1, 1]}, "none negative"),
        ({"padding": [1, 1]}, "four numbers"),
        ({"padding": [0, 1, 1, 1]}, "shape does not follow"),
        ({"groups": 0}, "groups must divide"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 2}, "the kernel must be"),
        ({"algorithm": 3}, "algorithm must be"),
        ({"algorithm": 4, "padding": [1, 2, 1, 1], "strides": [2, 1]}, "does not follow"),
    ],
)
def test_bad_attributes_are_an_error_not_a_crash(wrong, said):
    attributes = {"strides": [1, 1], "padding": [1, 1, 1, 1], "groups": 1, "algorithm": 0} | wrong
    call = jax.ffi.ffi_call("flaxcls_conv_forward", jax.ShapeDtypeStruct((2, 6, 6, 8), "float32"))
    arrays = {name: np.asarray(value, np.int64) for name, value in attributes.items()}
    scalars = {name: np.int64(attributes[name]) for name in ("groups", "algorithm")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        call(draw(2, 6, 6, 4), draw(3, 3, 4, 8), **(arrays | scalars)).block_until_ready()


def algorithms(x, kernel, strides=(1, 1), precision="default"):
    """Of the forward pass, the input's and the kernel's gradient of a `SAME`-padded convolution."""
    chosen = []

    def remember(each, precision):
        chosen.append(choose(each, precision))
        return chosen[-1]

    def loss(x, kernel):
        padding = tuple(same(k) for k in kernel.shape[:2])
        return convolve(x, kernel, strides, padding, precision=precision).sum()

    arrays = (jax.ShapeDtypeStruct(shape, "float32") for shape in (x, kernel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose", remember)
        jax.eval_shape(jax.grad(loss, (0, 1)), *arrays)
    return chosen


def test_the_choice_of_an_algorithm():
    many, few = (64, 32, 32, 64), (1, 8, 8, 64)
    square = (3, 3, 64, 64)
    assert algorithms(many, square) == 3 * [Algorithm.WINOGRAD_4]
    assert algorithms(many, square, precision="high") == 3 * [Algorithm.WINOGRAD_2]
    assert algorithms(few, square) == 3 * [Algorithm.WINOGRAD_2]
    assert algorithms((64, 2, 2, 64), square) == 3 * [Algorithm.SMALL_MAPS]
    assert algorithms((64, 4, 4, 64), (5, 5, 64, 64)) == 3 * [Algorithm.SMALL_MAPS]
    assert algorithms(many, (5, 5, 64, 64)) == 3 * [Algorithm.WINOGRAD_2]
    assert algorithms(many, (5, 5, 64, 64), precision="high") == 3 * [Algorithm.DIRECT]
    assert algorithms(few, (5, 5, 64, 64)) == 3 * [Algorithm.DIRECT]
    assert algorithms(many, (5, 5, 64, 64), strides=(2, 2)) == 3 * [Algorithm.DIRECT]
    assert algorithms(many, (7, 7, 64, 64)) == 3 * [Algorithm.DIRECT]
    assert algorithms(many, square, strides=(2, 2)) == 3 * [Algorithm.DIRECT]
    first = algorithms((64, 32, 32, 3), (3, 3, 3, 64))
    assert first == [Algorithm.DIRECT, Algorithm.WINOGRAD_4, Algorithm.DIRECT]
