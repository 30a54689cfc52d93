"""Weights as files that need neither a checkpoint's folder nor its optimizer."""

import json
import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

FORMAT_VERSION = 1


def save(path: str | os.PathLike[str], model_name: str, variables: Any) -> None:
    """Writes variables as `.safetensors`, atomically.

    Tensors are named by their path, as in `params/trunk/conv1_1/kernel` or
    `batch_stats/trunk/norm1_1/mean`; the file's metadata holds, as JSON under `flaxcls`, the
    format's version and the model's name. The same variables give the same bytes.

    Args:
      path: of the file.
      model_name: as `create_model` takes it.
      variables: {"params": ..., "batch_stats": ...}, arrays on the host.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    # One entry, since safetensors writes several in an order that changes from run to run.
    about = {"flaxcls": json.dumps({"format_version": FORMAT_VERSION, "model": model_name})}
    content = safetensors.numpy.save(tensors, about)
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    beside.replace(path)
