"""Fixtures that several test files use."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 in JAX while the test runs."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
