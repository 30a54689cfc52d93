"""The one place where the implementation of an operator is chosen, and the settings around it."""

import contextlib
import functools
import glob
import os
import sys
from collections.abc import Iterator
from typing import Literal, cast

import jax

from flaxcls.errors import InputError, did_you_mean
from flaxcls.ops.allocator import is_tunable, keep_freed_memory
from flaxcls.ops.native.build import has_compiler, is_compiled, native

BACKENDS = ("auto", "xla", "native", "flax")

# XLA:CPU of jaxlib 0.10 hands convolutions to YNNPACK, which is slow for the shapes of training;
# this leaves it the dots only (a step of vgg13, 32 px, batch 64, falls from 0.77 s to 0.58 s).
_CPU_COMPILER_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}

PRECISIONS = ("default", "high")

_chosen = "auto"
_precision: Literal["default", "high"] = "default"


def set_backend(name: str) -> None:
    """Choose the implementation of every operator traced from now on.

    Args:
      name: `auto`, the fastest for the device; `xla`, XLA's operators, which on CPU are written in
        the forms that XLA:CPU runs fast; `native`, this package's own for CPU where they can be
        used (`use_native`), which `auto` takes too; `flax`, exactly what flax.linen's own layers
        do.

    A function that `jax.jit` has already traced keeps the backend it was traced with.

    Raises:
      InputError: the backend is unknown.
    """
    global _chosen
    if name not in BACKENDS:
        raise InputError(f"ops.backend: no backend {name!r}; {did_you_mean(name, BACKENDS)}")
    _chosen = name


def backend() -> str:
    """The name given to `set_backend` last; `auto` at first."""
    return _chosen


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the length of a `with` block."""
    before = backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def set_precision(name: str) -> None:
    """Choose the error of the native convolutions traced from now on.

    Args:
      name: `default`, about 1e-5 of the largest value; `high`, 1e-6 as that of a direct
        convolution, which is slower where there are many channels.

    Raises:
      InputError: the precision is unknown.
    """
    global _precision
    if name not in PRECISIONS:
        raise InputError(f"ops.precision: no {name!r}; {did_you_mean(name, PRECISIONS)}")
    _precision = cast(Literal["default", "high"], name)


def precision() -> Literal["default", "high"]:
    """The name given to `set_precision` last; `default` at first."""
    return _precision


def implementation() -> Literal["plain", "cpu"]:
    """The form that an operator takes when it is traced now.

    `plain` is flax.linen's; `cpu` are the forms that XLA:CPU runs fast. Other devices run the
    plain forms fast.
    """
    if _chosen != "flax" and jax.default_backend() == "cpu":
        return "cpu"
    return "plain"


def use_native() -> bool:
    """Whether operators traced now may be the native ones; the first call may compile them.

    They need the CPU and a C++ compiler. Over several devices XLA would gather the whole batch
    around a native call, so there they are not used.
    """
    return _wants_native() and jax.device_count() == 1 and native().usable


def native_status() -> str:
    """What became of the native operators, in a few words for the log; empty where none are due.

    The first call may compile them.
    """
    if not _wants_native():
        return ""
    return native().said if jax.device_count() == 1 else "XLA's operators (several devices)"


def native_is_pending() -> bool:
    """Whether the first operator that is traced will wait until the native ones are compiled."""
    return _wants_native() and jax.device_count() == 1 and has_compiler() and not is_compiled()


def _wants_native() -> bool:
    return _chosen in ("auto", "native") and jax.default_backend() == "cpu"


def compiler_options() -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=...)` with which this device trains fastest.

    Empty off the CPU, under the backend `flax`, and where this version of XLA does not know them.
    """
    if implementation() == "cpu" and _compiles_with_cpu_options():
        return dict(_CPU_COMPILER_OPTIONS)
    return {}


@functools.cache
def _compiles_with_cpu_options() -> bool:
    probe = jax.jit(lambda x: x + 1, compiler_options=_CPU_COMPILER_OPTIONS)
    try:
        probe.lower(jax.ShapeDtypeStruct((), "float32")).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


def prepare_process() -> str:
    """Set up JAX and the C library for the CPU, and say what was done in a few words.

    XLA:CPU allocates a step's temporaries anew each step, and glibc returns blocks of that size
    to the system each time, so every step pays page faults for all of them: 1.18 s instead of
    0.58 s for vgg13, 32 px, batch 64. The price: freed memory stays with the process until it ends.
    XLA:CPU allocates the temporaries of a call when it is made, be it that another is still
    running; so calls run where they are made: 570 MB instead of 770 for that step.

    Call it once, before JAX runs anything: JAX's threads keep the settings they started with.
    """
    if _accelerator_is_present():
        return "allocator left as it is (the temporaries are an accelerator's)"
    if not _jax_has_started() and "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not is_tunable():
        return "allocator left as it is (only glibc's is tuned)"
    if _jax_has_started():
        return "allocator left as it is (JAX had already started its threads)"
    if not keep_freed_memory():
        return "allocator left in part as it is (glibc refused a setting)"
    return "glibc keeps freed memory for reuse (mallopt)"


def _accelerator_is_present() -> bool:
    # Asking JAX would start it.
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    nodes = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
    return any(glob.glob(pattern) for pattern in nodes)


def _jax_has_started() -> bool:
    # JAX has no public question for this that does not start the backend itself.
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", None)
    return bool(started is not None and started())
