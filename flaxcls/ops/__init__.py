"""Convolution, pooling and normalisation, as fast as the backend allows.

Parameter trees are those of flax.linen's own layers, so a checkpoint opens under every backend.
"""

from flax.linen import Dense

from flaxcls.ops.backend import (
    BACKENDS,
    PRECISIONS,
    backend,
    compiler_options,
    native_is_pending,
    native_status,
    precision,
    prepare_process,
    set_backend,
    set_precision,
    use_backend,
    use_native,
)
from flaxcls.ops.cache import keep_compiled_programs
from flaxcls.ops.conv import Conv, convolve
from flaxcls.ops.norm import BatchNorm
from flaxcls.ops.pool import adaptive_avg_pool, avg_pool, max_pool
from flaxcls.ops.windows import Padding

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "BatchNorm",
    "Conv",
    "Dense",
    "Padding",
    "adaptive_avg_pool",
    "avg_pool",
    "backend",
    "compiler_options",
    "convolve",
    "keep_compiled_programs",
    "max_pool",
    "native_is_pending",
    "native_status",
    "precision",
    "prepare_process",
    "set_backend",
    "set_precision",
    "use_backend",
    "use_native",
]
