"""What is compiled once and kept on this machine, in the user's cache folder."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

_MOST_KEPT = 2**30  # bytes of compiled programs; the least recently used go first
_SHORTEST_KEPT = 0.1  # seconds of compilation


def cache_folder(name: str) -> Path:
    """Makes and returns `$XDG_CACHE_HOME/flaxcls/NAME`, in `~/.cache` where that is not set.

    Raises:
      OSError: it cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "flaxcls" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it is run
    return folder


def machine_key() -> str:
    """Changes with the CPU and with jaxlib: a home folder may be shared by several machines."""
    return hashlib.sha256(f"{_cpu()}\n{jax.lib.__version__}".encode()).hexdigest()[:12]


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, so that the second start of a run compiles nothing.

    The training step of vgg13 takes 19 s to compile on one core, and 0.5 s to read. A cache that
    the user has set up for JAX, or switched off, stays as it is; where the folder cannot be made,
    nothing is kept. To be called before anything is compiled.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache_folder(f"jax-{machine_key()}")
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return
    settings.update("jax_compilation_cache_dir", str(folder))
    settings.update("jax_compilation_cache_max_size", _MOST_KEPT)
    settings.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_KEPT)


def _cpu() -> str:
    """The CPU's model and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
