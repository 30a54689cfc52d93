"""Compiles the native operators with the system's C++ compiler, once a machine, and loads them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from flaxcls.ops.cache import cache_folder, machine_key

SOURCES = Path(__file__).parent
# Each is a symbol of the library and, after `flaxcls_`, a target of `jax.ffi.ffi_call`.
TARGETS: tuple[str, ...] = (
    "conv_forward",
    "conv_input_gradient",
    "conv_kernel_gradient",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_backward",
    "max_pool_forward",
    "max_pool_backward",
)
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_TIMEOUT = 300.0  # seconds
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError, AttributeError)
_one_at_a_time = threading.Lock()


class Native(NamedTuple):
    """Whether the native operators can be used.

    Attributes:
      usable: whether they are compiled and loaded.
      said: what happened, in a few words.
    """

    usable: bool
    said: str


def native() -> Native:
    """Compiles the operators unless the user's cache holds them, and loads them; never raises."""
    with _one_at_a_time:
        return _native()


def has_compiler() -> bool:
    return _compiler() is not None


def is_compiled() -> bool:
    """Whether the user's cache holds them, so that `native` takes no time."""
    compiler = _compiler()
    try:
        return compiler is not None and _library(_command(compiler)).exists()
    except _FAILURES:
        return False


@functools.cache
def _native() -> Native:
    began = time.monotonic()
    compiler = _compiler()
    if compiler is None:
        return Native(False, "XLA's operators: no C++ compiler found (set CXX or install g++)")
    try:
        command = _command(compiler)
        library = _library(command)
        cached = library.exists()
        if not cached:
            _compile(command, library)
        loaded = ctypes.CDLL(str(library))
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(loaded, target))
            jax.ffi.register_ffi_target(f"flaxcls_{target}", capsule, platform="cpu")
    except _FAILURES as error:
        return Native(False, f"XLA's operators: {_reason(error)}")
    if cached:
        return Native(True, "native operators")
    return Native(True, f"native operators, compiled in {time.monotonic() - began:.0f} s")


def _command(compiler: tuple[str, ...]) -> tuple[str, ...]:
    return (*compiler, *_FLAGS, _machine_flag(), f"-I{jax.ffi.include_dir()}")


def _library(command: tuple[str, ...]) -> Path:
    return cache_folder("native") / f"{_key(command)}.so"


def _compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler: that of CXX, as make takes it, or the system's."""
    for candidate in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = candidate.split()
        if words and shutil.which(words[0]):
            return tuple(words)
    return None


def _machine_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _key(command: tuple[str, ...]) -> str:
    """Changes with whatever the library depends on: sources, compiler, CPU, jaxlib's headers."""
    version = _run((command[0], "--version"))
    digest = hashlib.sha256()
    for text in (*command, version, machine_key()):
        digest.update(text.encode() + b"\0")
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(command: tuple[str, ...], library: Path) -> None:
    """Compiles in a folder of its own and renames the result: two processes may start at once."""
    for abandoned in library.parent.glob("building-*"):  # by a process that was killed
        if time.time() - abandoned.stat().st_mtime > 2 * _TIMEOUT:
            shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
        sources = sorted(SOURCES.glob("*.cc"))
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(len(sources)) as pool:
            commands = [
                (*command, "-c", str(source), "-o", made)
                for source, made in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        made = f"{folder}/{library.name}"
        _run((*command, "-shared", *objects, "-o", made))
        os.replace(made, library)


def _run(command: tuple[str, ...]) -> str:
    """Runs a command and returns what it printed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=True,
    )
    return done.stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return f"{error.cmd[0]} failed ({lines[0]})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
