"""Checkpoints: Orbax, written in the background, the latest few and the best.

A checkpoint holds the train state, the metric state of the running epoch and, as JSON, the metric
history (from which early stopping and the choice of the best epoch derive) and the fingerprint of
the data. The position in the data is the state's step (see `data/loader.py`).
"""

import contextlib
import dataclasses
import errno
import functools
import inspect
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxcls.errors import InputError, is_out_of_memory

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

    Raises:
      InputError: the directory cannot be made, or Orbax cannot write to one of that name.
    """

    def __init__(self, directory: Path, keep: int = 2, *, read_only: bool = False):
        _hush_orbax()
        self._best_step: int | None = None
        self._damaged: tuple[int, ...] = ()
        self.directory = directory.absolute()
        check_directory(directory)
        with _writing(self.directory):
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

    def reload(self) -> None:
        """Looks again which checkpoints there are: another process may be training the run."""
        self._manager.reload()

    def save(
        self, step: int, state: Any, metrics: Any, log: dict[str, Any], best_step: int | None
    ) -> None:
        """Starts to write a checkpoint; returns once the arrays may be changed.

        A step that is there already is left as it is.

        Raises:
          InputError: this or the previous checkpoint could not be written.
        """
        with _writing(self.directory):
            self._set_damaged_aside()
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

    def _set_damaged_aside(self) -> None:
        """Makes room for steps taken again; what could not be read is moved, not removed."""
        for step in self._damaged:
            aside = self.directory.parent / "damaged_checkpoints"
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).replace(aside / f"{step}-{time.time_ns()}")
        if self._damaged:
            self._damaged = ()
            self._manager.reload()

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def restore_latest(self, state: Any, metrics: Any) -> Restored | None:
        """Reads the newest checkpoint that can be read, or returns None where there is none.

        Later ones, which are damaged, are set aside when the next one is saved. Of several
        processes none goes back alone: there a damaged checkpoint is an error.

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
                if jax.process_count() > 1:
                    raise
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
        self._check_step(step)
        self._check_shapes(step, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            epoch=ocp.args.StandardRestore(metrics),
            log=ocp.args.JsonRestore(),
        )
        read = self._read(step, lambda: self._manager.restore(step, args=items))
        return Restored(step, read["state"], read["epoch"], read["log"])

    def restore_variables(self, step: int, variables: Any) -> dict[str, Any]:
        """Reads what evaluation uses of a checkpoint's state, NumPy arrays.

        The optimizer's state, which is as large again or larger, is not read.

        Args:
          step: of the checkpoint.
          variables: {"params", "batch_stats"}, their shapes and dtypes.

        Raises:
          InputError: there is no such step, its arrays have other shapes, or it is damaged.
        """
        self._check_step(step)
        path = self.directory / str(step) / "state"
        stored = self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)
        wanted = {key: stored[key] for key in ("params", "batch_stats", "ema") if key in stored}
        handler = ocp.PyTreeCheckpointer()
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
            partial_restore=True,
        )
        read = self._read(step, lambda: handler.restore(path, args=arguments))
        averaged = read.get("ema") or {}
        merged = {
            "params": unflatten_dict(
                flatten_dict(read["params"]) | flatten_dict(averaged.get("params", {}))
            ),
            "batch_stats": averaged.get("batch_stats", read.get("batch_stats")) or {},
        }
        self._compare_shapes(step, _paths(merged), _paths(variables))
        return merged

    def read_log(self, step: int) -> dict[str, Any]:
        """Reads what a checkpoint holds besides arrays.

        Raises:
          InputError: it is damaged.
        """
        items = ocp.args.Composite(log=ocp.args.JsonRestore())
        return self._read(step, lambda: self._manager.restore(step, args=items)["log"])

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """Reads a part of a checkpoint, or raises DamagedCheckpoint for whatever goes wrong."""
        try:
            return read()
        except Exception as error:
            if isinstance(error, PermissionError) or is_out_of_memory(error):
                raise InputError(
                    f"{self.directory / str(step)}: the checkpoint cannot be read now "
                    f"({_reason(error)}); remove the cause and run the same command again"
                ) from error
            raise DamagedCheckpoint(
                f"{self.directory / str(step)}: the checkpoint is damaged ({_reason(error)}); "
                "restore this folder from a copy, or remove it to do without"
            ) from error

    def _check_step(self, step: int) -> None:
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise InputError(
                f"eval.step: '{self.directory}' has no checkpoint of step {step}; choose one of "
                f"{known}, or 0 for the best"
            )

    def _check_shapes(self, step: int, state: Any) -> None:
        stored = self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)
        self._compare_shapes(step, _paths(stored), _paths(state))

    def _compare_shapes(
        self, step: int, there: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
    ) -> None:
        """Names the first array whose shape is another than the model's, parameters first."""
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


def check_directory(directory: Path) -> None:
    """Refuses, before anything is compiled, a place that cannot hold checkpoints.

    Raises:
      InputError: it is a file, or a name in its path is not UTF-8.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(
            f"'{directory}' is a file, and checkpoints are kept in a folder of that name; move it "
            "or give another --workdir"
        )
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"'{directory.absolute()}': the name is not UTF-8, and Orbax writes to no such folder; "
            "rename it or give another --workdir"
        ) from error


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


def _hush_orbax() -> None:
    """Leaves it to exceptions to say what went wrong.

    Orbax logs each file it touches, and when it fails to read or write one of many arrays, it
    leaves the others behind: coroutines of a loop that is closed, each of which says so.
    """
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if getattr(sys.unraisablehook, "func", None) is not _show_all_but_abandoned:
        sys.unraisablehook = functools.partial(_show_all_but_abandoned, sys.unraisablehook)


def _show_all_but_abandoned(show: Callable[[Any], object], unraisable: Any) -> None:
    closed_loop = "Event loop is closed" in str(unraisable.exc_value)
    if not closed_loop and not inspect.iscoroutine(unraisable.object):
        show(unraisable)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason in map(os.strerror, _FULL):
            remedy = "free some space or give another --workdir"
        elif reason in map(os.strerror, _FORBIDDEN):
            remedy = "give write permission or another --workdir"
        else:
            remedy = "remove the cause or give another --workdir"
        raise InputError(
            f"{directory}: the checkpoint could not be written ({reason}); {remedy}, then run the "
            "same command to resume from the last complete one"
        ) from error


def _reason(error: BaseException) -> str:
    """Says in short why Orbax or TensorStore failed; they name each file and each option."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    for number in (*_FULL, *_FORBIDDEN, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return re.split(r" \[| in OCDBT database", first)[0][:150]
