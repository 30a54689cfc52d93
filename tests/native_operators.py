"""What the tests of the native operators share."""

import threading

import jax
import numpy as np
import pytest

from flaxcls.ops.native.build import native

needs_native = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not native().usable, reason=native().said
)


def assert_close(ours, exact, dtype="float32"):
    """max |error| <= 1e-5 max |exact|; of bfloat16, each number to its own rounding beside that."""
    assert ours.shape == exact.shape
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    if exact.size:
        rounding = 2.0**-8 * np.abs(exact) if dtype == "bfloat16" else 0.0
        assert (np.abs(ours - exact) <= 1e-5 * np.abs(exact).max() + rounding).all()


def assert_equal(trees):
    """All trees have the same bits."""
    first, *others = (jax.tree.map(np.asarray, tree) for tree in trees)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def in_two_threads(f, argument, times=8):
    """The results of `f(argument)`, called `times` over in each of two threads at once."""
    results = []

    def work():
        for _ in range(times):
            results.append(jax.tree.map(np.asarray, f(argument)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 * times
    return results
