"""How much memory there is, and how much a run took at most."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather


def free_memory() -> tuple[int, int]:
    """Returns the free bytes of a device and of the host, the least of all processes."""
    host = _free_host_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        device = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        device = host // jax.local_device_count()
    if jax.process_count() > 1:
        # In megabytes: JAX's integers have 32 bits. Processes that choose otherwise would hang.
        megabytes = np.array([device >> 20, host >> 20], np.int32)
        device, host = (int(m) << 20 for m in process_allgather(megabytes).min(axis=0))
    return device, host


def peak_memory() -> int | None:
    """Returns the most bytes that were in use at once since the process began.

    Of this process's fullest device, or of the process itself where devices have no memory of
    their own (CPU: libraries, data and program included). None where the system does not say.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else _peak_host_bytes()


def describe_bytes(count: int) -> str:
    """Returns a size in words: 3.2 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _free_host_bytes() -> int:
    """What Linux says can be had without swapping, within the container's limit."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    if free is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free


def _peak_host_bytes() -> int | None:
    return _kilobytes("/proc/self/status", "VmHWM")


def _kilobytes(path: str, name: str) -> int | None:
    """Reads a line `NAME:  123 kB` of one of Linux's files, in bytes; None where it has none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
