"""The device mesh, and where the arrays of a run live on it."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxcls.errors import InputError

DATA_AXIS = "data"


def create_mesh(num_devices: int = 0) -> Mesh:
    """Returns a one-dimensional mesh over the axis `data`.

    Args:
      num_devices: how many devices, over all processes; 0 for all.

    Raises:
      InputError: there are fewer devices, or several processes would not share them evenly.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise InputError(
            f"mesh.devices: {num_devices} asked for, but only {len(devices)} present "
            f"({devices[0].platform}); lower it, or set 0 for all"
        )
    if num_devices and jax.process_count() > 1 and num_devices != len(devices):
        raise InputError(
            f"mesh.devices: {num_devices} of {len(devices)}; several processes use all of their "
            "devices, so set 0"
        )
    return Mesh(np.array(devices[: num_devices or None]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh, *, shard_params: bool) -> Any:
    """Returns a sharding for each leaf of a train state.

    Args:
      abstract_state: the state's shapes, as `jax.eval_shape` gives them.
      mesh: the device mesh.
      shard_params: split arrays of 2^16 elements and more along their largest dimension that the
        devices divide (ZeRO stage 3, Rajbhandari et al. 2020); smaller ones are replicated, since
        gathering them costs more than it saves.
    """

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [(size, axis) for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not shard_params or not divisible or np.prod(leaf.shape) < 2**16:
            return replicated(mesh)
        _, axis = max(divisible)
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))

    return jax.tree.map(sharding, abstract_state)


def put_batch(batch: Any, mesh: Mesh, *, stacked: bool = False) -> Any:
    """Moves one process's share of a batch to its devices.

    Args:
      batch: a tree of NumPy arrays (n, ...), n the examples that this process contributes.
      mesh: the device mesh.
      stacked: the arrays are (steps, n, ...) and the second dimension is shared out.
    """
    spec = PartitionSpec(None, DATA_AXIS) if stacked else PartitionSpec(DATA_AXIS)
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Copies host arrays, the same in every process, to every device."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def fetch(tree: Any) -> Any:
    """Brings arrays to the host: the one way there, so that a test can count its uses."""
    return jax.device_get(tree)


def equal_everywhere(text: str) -> bool:
    """Whether all processes give the same text; each must call it."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    return bool((digests == digest).all())
