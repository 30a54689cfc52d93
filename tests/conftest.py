"""Fixtures that several test files use."""

import os
import shutil
import tempfile

import jax
import pytest

# Files of few tests that take minutes: begun last, they would keep one worker busy alone.
FIRST = ("test_devices.py", "test_resume.py", "test_parity_models.py", "test_loop.py")


def pytest_configure(config):
    """What the tests compile is kept for their own processes, not for the user's."""
    if not hasattr(config, "workerinput"):
        config.caches = tempfile.mkdtemp(prefix="flaxcls-tests-")
        os.environ["XDG_CACHE_HOME"] = config.caches


def pytest_unconfigure(config):
    shutil.rmtree(getattr(config, "caches", ""), ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Begins with the files that take longest."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture
def x64():
    """float64 in JAX while the test runs."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
