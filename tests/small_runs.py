"""Small runs of the command line in processes of their own: started, interrupted, compared.

The processes run in one folder that holds a config file, `small.py`, of a small model with
everything that a larger one has: convolutions, batch normalisation, dropout.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flaxcls.data.load import load_dataset

CONFIG = '''
"""A small convolutional network with batch normalisation and dropout."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flaxcls import config, models, ops


class Small(nn.Module):
    num_classes: int
    head_width: int = 64
    dropout: float = 0.2
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        precision = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ops.Conv(8, (3, 3), **precision)(images)
        x = ops.max_pool(nn.relu(ops.BatchNorm(**precision)(x, not train)), (2, 2))
        x = ops.Conv(16, (3, 3), **precision)(x)
        x = ops.max_pool(nn.relu(ops.BatchNorm(**precision)(x, not train)), (2, 2))
        x = nn.relu(ops.Dense(self.head_width, **precision)(x.reshape(len(x), -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return ops.Dense(self.num_classes, **precision)(x)


models.register("small", Small)


def get_config(dataset="digits"):
    c = config.for_dataset(dataset)
    if dataset == "digits":  # without scikit-learn, which takes 2 s to import
        c.data.source = "npz"
        c.data.path = "digits.npz"
        c.data.channels = 1
    c.model.name = "small"
    c.data.image_size = 8
    c.data.max_per_class = 10
    c.train.batch_size = 10
    c.train.epochs = 5
    c.optimizer.learning_rate = 0.05
    c.log.plots = False
    c.log.tensorboard = False
    return c
'''

# The only fields that may differ between two runs.
TIMES = {
    "seconds",
    "images_per_second",
    "wait_share",
    "peak_memory_bytes",
    "compile_seconds",
    "elapsed_seconds",
}


@dataclass
class Workplace:
    """A folder in which commands run; compiled programs are shared between them.

    Attributes:
      folder: the working directory.
    """

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "small.py").write_text(CONFIG)
        digits = load_dataset("digits").splits["train"]
        arrays = {"images": digits.images, "labels": digits.labels}
        np.savez(self.folder / "digits.npz", **arrays)
        # tensorboardX imports PyTorch where it is installed, for which a process takes 3 s.
        (self.folder / "without").mkdir()
        (self.folder / "without" / "torch.py").write_text("raise ImportError")

    def start(self, log: str, *arguments: str, devices: int = 1) -> "Command":
        """Starts `python -m flaxcls.main` with `arguments`; its output goes to the file `log`."""
        paths = [self.folder / "without", Path(__file__).parents[1], os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            # Optimised code runs no faster where everything is so small, and takes long to make.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}",
        }
        path = self.folder / log
        with open(path, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flaxcls.main", *arguments],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Command(process, path)


@dataclass
class Command:
    """A command that was started."""

    process: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], timeout: float = 300) -> bool:
        """Waits until `condition` holds and returns True, or False where the process has ended."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)
        return False

    def finish(self, timeout: float = 300) -> int:
        """Waits for the end and returns the exit code, -n after signal n."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def succeed(self) -> str:
        """Waits for success and returns the output."""
        assert self.finish() == 0, self.output
        return self.output


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def state(run: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint's train state, by path."""
    path = run / "checkpoints" / str(saved_steps(run)[-1]) / "state"
    reader = ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
    )
    leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path, restore_args=as_numpy))
    return {jax.tree_util.keystr(key): value for key, value in leaves}


def history(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def summary(run: Path) -> dict[str, Any]:
    """`summary.json` without the times."""
    return timeless(json.loads((run / "summary.json").read_text()))


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    assert record.keys() & TIMES
    return {key: value for key, value in record.items() if key not in TIMES}


def assert_close(found: Any, expected: Any) -> None:
    """Two trees of float64 results are the same but for what another order of sums rounds."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if isinstance(b, str):
            assert a == b, name
        else:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=name)
