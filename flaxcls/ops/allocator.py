"""The C library's allocator, which gives blocks of some size back to the system."""

import ctypes
import platform


def is_tunable() -> bool:
    """Whether the C library is glibc, the one that `keep_freed_memory` knows."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Lets glibc, which the C library must be, keep what is freed for reuse.

    Returns:
      Whether it took all settings. Threads that run already may keep theirs.
    """
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (-8, 1),  # M_ARENA_MAX: one heap, which all threads reuse
        (-4, 0),  # M_MMAP_MAX: no block is mapped, and unmapped, by itself
        (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: the heap's end is not given back
        (-2, 64 * 2**20),  # M_TOP_PAD: the heap grows by 64 MB at a time
    )
    return all([mallopt(parameter, value) for parameter, value in settings])
