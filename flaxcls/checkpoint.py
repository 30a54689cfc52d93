"""Checkpoints: Orbax, written in the background, the latest few and the best.

A checkpoint holds the train state, the metric state of the running epoch and, as JSON, the metric
history (from which early stopping and the choice of the best epoch derive) and the fingerprint of
the data. The position in the data is the state's step (see `data/loader.py`).
"""

import contextlib
import dataclasses
import gc
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from flaxcls.errors import InputError

T = TypeVar("T")


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: of the checkpoint.
      state: a TrainState on the shardings asked for.
      metrics: the MetricState of the epoch that was running.
      log: {"history": list of metric records, "data": fingerprint, ...}.
      damaged: later steps that could not be read.
    """

    step: int
    state: Any
    metrics: Any
    log: dict[str, Any]
    damaged: tuple[int, ...] = ()


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: of the run's checkpoints; made where it is missing.
      keep: how many of the latest are kept, besides the best.
      read_only: nothing will be saved; the directory may be one that cannot be written.
    """

    def __init__(self, directory: Path, keep: int = 2, *, read_only: bool = False):
        # Orbax logs each file it touches.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._best_step: int | None = None
        self._damaged: tuple[int, ...] = ()
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "epoch": ocp.StandardCheckpointHandler(),
                "log": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else _LatestAndBest(self, keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                enable_async_checkpointing=True,
            ),
        )

    @property
    def best_step(self) -> int | None:
        return self._best_step

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, metrics: Any, log: dict[str, Any], best_step: int | None
    ) -> None:
        """Starts to write a checkpoint; returns once the arrays may be changed.

        A step that is there already is left as it is.

        Raises:
          InputError: this or the previous checkpoint could not be written.
        """
        with _writing(self.directory):
            for damaged in self._damaged:  # only now that there is something better
                self._manager.delete(damaged)
            self._damaged = ()
            if step in self._manager.all_steps():
                return
            self._best_step = best_step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    epoch=ocp.args.StandardSave(metrics),
                    log=ocp.args.JsonSave(log),
                ),
            )

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def restore_latest(self, state: Any, metrics: Any) -> Restored | None:
        """Reads the newest checkpoint that can be read, or returns None where there is none.

        Later ones, which are damaged, make room for the next one that is saved.

        Args:
          state: the abstract state: shapes, dtypes and shardings to restore to.
          metrics: likewise.

        Raises:
          InputError: there are checkpoints, but all are damaged, or one has other shapes.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, state, metrics)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            self._damaged = tuple(damaged)
            return dataclasses.replace(restored, damaged=self._damaged)
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def restore(self, step: int, state: Any, metrics: Any) -> Restored:
        """Reads one checkpoint.

        Raises:
          InputError: there is no such step, its arrays have other shapes, or it is damaged.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise InputError(
                f"eval.step: '{self.directory}' has no checkpoint of step {step}; choose one of "
                f"{known}, or 0 for the best"
            )
        self._check_shapes(step, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            epoch=ocp.args.StandardRestore(metrics),
            log=ocp.args.JsonRestore(),
        )
        read = self._read(step, lambda: self._manager.restore(step, args=items))
        return Restored(step, read["state"], read["epoch"], read["log"])

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """Reads a part of a checkpoint, or raises DamagedCheckpoint for whatever goes wrong."""
        with _silent():
            try:
                return read()
            except Exception as error:
                reason = _first_line(error)
            _await_abandoned_reads()
        raise DamagedCheckpoint(
            f"{self.directory / str(step)}: the checkpoint is damaged ({reason}); restore this "
            "folder from a copy, or remove it to do without"
        )

    def _check_shapes(self, step: int, state: Any) -> None:
        """Names the first array whose shape is another than the model's, parameters first."""
        stored = self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)
        there, wanted = _paths(stored), _paths(state)
        for path in sorted(wanted.keys() | there.keys(), key=lambda p: (p[:6] != "params", p)):
            if there.get(path) != wanted.get(path):
                a, b = (f"shape {s[path]}" if path in s else "no place" for s in (there, wanted))
                raise InputError(
                    f"{self.directory / str(step)}: {path} has {a} in the checkpoint and {b} in "
                    "the model; use the config that the run was trained with"
                )

    def close(self) -> None:
        with _writing(self.directory):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _LatestAndBest:
    """Orbax's policy of what stays: the latest few and the best."""

    def __init__(self, checkpoints: Checkpoints, keep: int):
        self._checkpoints = checkpoints
        self._keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        first_kept = len(checkpoints) - self._keep
        return [
            i >= first_kept or info.step == self._checkpoints.best_step
            for i, info in enumerate(checkpoints)
        ]


def abstract(tree: Any, sharding: Any) -> Any:
    """Returns shapes and dtypes of a tree together with the sharding(s) to restore it to."""
    shapes = jax.eval_shape(lambda: tree) if not _is_abstract(tree) else tree
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding
    )


def _is_abstract(tree: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _paths(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(_key(k) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape") and leaf.shape is not None
    }


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def _await_abandoned_reads() -> None:
    """Waits until the reads are over that Orbax left behind when one failed; each prints its end.

    They are coroutines of a loop that is closed, and end with what TensorStore was doing for them.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        gc.collect()
        if not any(inspect.iscoroutine(one) for one in gc.get_objects()):
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps what libraries print on standard error, from any thread, from being seen."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{directory}: the checkpoint could not be written ({_first_line(error)}); free some "
            "space or give another --workdir, then run the same command to resume from the last "
            "complete one"
        ) from error


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first.partition(" [")[0][:150]
