"""The native operators are compiled once, and where they cannot be, XLA's take their place."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import ops
from flaxcls.ops.native import build

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache and sources of one small file, not built yet."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "small.cc").write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "TARGETS", ())
    # A memory of its own: what this process has loaded stays loaded.
    monkeypatch.setattr(build, "_native", functools.cache(build._native.__wrapped__))
    return tmp_path


def compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def libraries(place):
    return sorted((place / "cache").rglob("*.so"))


needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")


@needs_compiler
def test_they_are_compiled_once_and_anew_when_a_source_changes(place):
    assert not build.is_compiled()
    assert build.native().said.startswith("native operators, compiled in ")
    assert build.is_compiled()
    (library,) = libraries(place)
    build._native.cache_clear()
    assert build.native() == build.Native(True, "native operators")
    assert libraries(place) == [library]
    assert [file.name for file in library.parent.iterdir()] == [library.name]

    (place / "sources" / "small.cc").write_text(SMALL.replace("42", "43"))
    assert not build.is_compiled()
    build._native.cache_clear()
    assert build.native().usable
    assert len(libraries(place)) == 2

    (place / "sources" / "small.h").write_text("// Most of the operators is in headers.\n")
    assert not build.is_compiled()


@needs_compiler
def test_two_processes_may_compile_at_once(place):
    program = (
        "import pathlib, sys; from flaxcls.ops.native import build; "
        "build.SOURCES = pathlib.Path(sys.argv[1]); build.TARGETS = (); "
        "print(build.native().usable)"
    )
    command = [sys.executable, "-c", program, str(place / "sources")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate()[0] for one in both] == ["True\n"] * 2
    (library,) = libraries(place)
    assert [file.name for file in library.parent.iterdir()] == [library.name]


def test_without_a_compiler_xla_takes_their_place(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.delenv("CXX", raising=False)
    said = "XLA's operators: no C++ compiler found (set CXX or install g++)"
    assert build.native() == build.Native(False, said)
    assert not ops.native_is_pending()
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        assert ops.native_status() == said
    assert not ops.use_native()
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    with ops.use_backend("native"):
        np.testing.assert_array_equal(
            ops.convolve(x, kernel, padding="VALID"), np.full((1, 2, 2, 1), 18)
        )


def test_a_compiler_that_fails_is_named_with_its_first_error(place, monkeypatch):
    body = '[ "$1" = --version ] && exit 0\necho "small.cc:1: error: no such luck" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(place / "broken", body))
    found = build.native()
    assert not found.usable
    assert found.said == f"XLA's operators: {place}/broken failed (small.cc:1: error: no such luck)"
    assert list((place / "cache" / "flaxcls" / "native").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_error(place, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    found = build.native()
    assert not found.usable
    assert found.said.startswith("XLA's operators: ")


@needs_compiler
def test_the_compiler_may_be_a_command_with_flags(place, monkeypatch):
    (real,) = (c[0] for c in [build._compiler()])
    monkeypatch.setenv("CXX", f"{real} -DNOTHING")
    assert build.native().usable
    assert os.path.exists(libraries(place)[0])
