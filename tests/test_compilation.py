"""The time that JAX spends on making programs is known, and none of it counts twice."""

import time

import jax
import jax.numpy as jnp

from flaxcls.compilation import compile_seconds


def test_a_program_counts_once_however_many_functions_it_calls():
    inner = jax.jit(lambda x: time.sleep(0.2) or jnp.sin(x))  # asleep while it is traced
    outer = jax.jit(lambda x: inner(x) + 1)
    x = jnp.zeros(3)
    before, began = compile_seconds(), time.monotonic()
    outer(x).block_until_ready()
    took = time.monotonic() - began
    assert 0.2 <= compile_seconds() - before <= took + 0.01


def test_to_run_a_program_again_takes_no_compilation():
    double = jax.jit(lambda x: 2 * x)
    double(jnp.zeros(3))
    before = compile_seconds()
    double(jnp.ones(3)).block_until_ready()
    assert compile_seconds() - before < 0.05  # `ones` is a program of its own
