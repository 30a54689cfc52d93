"""Compiles the native operators with the system's C++ compiler, once a machine, and loads them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
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
    "batch_norm_backward",
    "max_pool_forward",
    "max_pool_backward",
)
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_TIMEOUT = 300.0  # seconds
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


@functools.cache
def _native() -> Native:
    began = time.monotonic()
    compiler = _compiler()
    if compiler is None:
        return Native(False, "XLA's operators: no C++ compiler found (set CXX or install g++)")
    try:
        command = (*compiler, *_FLAGS, _machine_flag(), f"-I{jax.ffi.include_dir()}")
        library = cache_folder("native") / f"{_key(command)}.so"
        cached = library.exists()
        if not cached:
            _compile(command, library)
        loaded = ctypes.CDLL(str(library))
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(loaded, target))
            jax.ffi.register_ffi_target(f"flaxcls_{target}", capsule, platform="cpu")
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        return Native(False, f"XLA's operators: {_reason(error)}")
    if cached:
        return Native(True, "native operators")
    return Native(True, f"native operators, compiled in {time.monotonic() - began:.0f} s")


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
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, timeout=_TIMEOUT, check=True
    ).stdout
    digest = hashlib.sha256()
    for text in (*command, version, machine_key()):
        digest.update(text.encode() + b"\0")
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(command: tuple[str, ...], library: Path) -> None:
    """Compiles to a file of its own and renames it: two processes may start at once."""
    for abandoned in library.parent.glob("tmp*.so"):  # by a process that was killed
        if time.time() - abandoned.stat().st_mtime > 2 * _TIMEOUT:
            abandoned.unlink(missing_ok=True)
    handle, beside = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        subprocess.run(
            [*command, str(SOURCES / "native.cc"), "-o", beside],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=True,
        )
        os.replace(beside, library)
    finally:
        Path(beside).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return f"{error.cmd[0]} failed ({lines[0]})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    print(native().said)
    sys.exit(0 if native().usable else 1)
