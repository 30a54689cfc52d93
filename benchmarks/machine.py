"""What a benchmark ran on, and what to type to run it again."""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("flaxcls", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")


def describe(devices: Sequence[str], *others: str) -> dict[str, Any]:
    """Returns processor, cores, load, the devices given and versions, also those of `others`.

    The version of a package that is not installed is None.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "devices": list(devices),
        "python": platform.python_version(),
        **{package: _version(package) for package in (*PACKAGES, *others)},
    }


def command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Returns the command of a benchmark, with the options that are not at their defaults.

    Without `--json`, which changes no result.
    """
    options = [
        f"--{name}={value}"
        for name, value in vars(arguments).items()
        if name != "json" and value != parser.get_default(name)
    ]
    return " ".join([f"python benchmarks/{parser.prog}", *options])


def own_devices() -> list[str]:
    """Returns the kind of each device of this process, which takes the GPUs for it."""
    return [device.device_kind for device in jax.devices()]


def devices_of(workdir: Path) -> list[str]:
    """Returns the kind of each device that a run used last, from its folder.

    For benchmarks whose runs are processes of their own, and need the GPUs.
    """
    session = json.loads((workdir / "environment.json").read_text())["sessions"][-1]
    return [device.partition(" ")[2] for device in session["devices"]]


def sentence(described: dict[str, Any]) -> str:
    """Returns what `describe` found in one line, without a full stop.

    `taskset` may leave a process fewer cores than there are.
    """
    there, used = described["cores"], described["cores_used"]
    counted = collections.Counter(kind for kind in described["devices"] if kind != "cpu")
    return ", ".join(
        [
            *(f"{count} x {kind}" if count > 1 else kind for kind, count in counted.items()),
            described["cpu"],
            f"{there} cores" if used == there else f"{used} of {there} cores",
            f"Python {described['python']}",
            f"JAX {described['jax']}",
        ]
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
