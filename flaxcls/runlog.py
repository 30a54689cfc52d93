"""The files of a run folder: one writer at a time, JSON that is whole or absent, events.

Every file is written beside its place and moved there, or appended to in whole lines, so that a
run killed at any moment leaves files that open. With several processes only the first comes here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxcls.atomic_files import write_atomically
from flaxcls.errors import InputError, another_workdir
from flaxcls.history import SPLITS, Record

_IMPORTED = time.monotonic()
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "clu",
    "ml_collections",
    "numpy",
)


class RunFolder:
    """A run folder that this process alone writes to, until `close` or its death.

    `RunFolder(path)` creates the folder where it is missing and locks `path/.lock` (flock, which
    the kernel releases when the process dies in whatever way). Raises InputError where the path is
    a file, cannot be written, or is held by another process, which the message names. A context
    manager.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with writing(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            except (FileExistsError, NotADirectoryError) as error:
                raise InputError(
                    f"run folder '{self.path}' cannot be made: '{_file_in_the_way(self.path)}' is "
                    "a file; give another --workdir"
                ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 200).decode(errors="replace").strip() or "another process"
            os.close(self._lock)
            raise InputError(
                f"run folder '{self.path}' is in use by {holder}; wait until it ends, stop it, or "
                f"give {another_workdir(self.path)}"
            ) from None
        except OSError as error:
            warnings.warn(
                f"the file system of '{self.path}' has no locks ({error.strerror}): make sure that "
                "no other process writes to this run folder",
                stacklevel=2,
            )
        _held.add(self._lock)
        # What another process is told; the lock holds without it, on a full disk too.
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
            os.pwrite(self._lock, holder.encode(), 0)

    def close(self) -> None:
        """Lets other processes in. The folder stays as it is; closing twice is allowed."""
        if self._lock in _held:
            _held.remove(self._lock)
            os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A forked child shares the lock; if it outlived a killed parent, the folder would stay locked.
_held: set[int] = set()


def _release_in_child() -> None:
    for lock in _held:
        with contextlib.suppress(OSError):
            os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _file_in_the_way(path: Path) -> str:
    return str(next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), path))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a failure to write to `path` (full disk, no permission) into one clear InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room and run the same command again, which goes on from where it was"
        else:
            remedy = "give write permission or another --workdir"
        raise InputError(f"cannot write '{path}': {error.strerror or error}; {remedy}") from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file atomically, in a folder that is made where it is missing."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON atomically; numbers in full precision, NaN and infinity as null."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, encode(text + "\n"))


def encode(text: str) -> bytes:
    r"""UTF-8, with what is not UTF-8 in the name of a file as an escape: `caf\udce9.png`.

    In JSON such an escape is read back as the name that it was.
    """
    return text.encode(errors="backslashreplace")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of numbers or strings as one compressed .npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads what `write_json` wrote; InputError where the file is missing or no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read '{path}': {error.strerror}; is its folder a run folder?"
        ) from error
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON ({error}); restore or remove it") from error


def write_metrics(path: str | os.PathLike[str], history: Sequence[Record]) -> None:
    """Writes `metrics.jsonl` anew from the history: a resumed run drops what it will redo."""
    write_bytes(path, encode("".join(map(_line, history))))


def append_metrics(path: str | os.PathLike[str], record: Record) -> None:
    """Adds one record to `metrics.jsonl`."""
    with writing(path), open(path, "ab") as file:
        file.write(encode(_line(record)))
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The history in `metrics.jsonl`, without a last line that was cut off; [] without a file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error
    *lines, _cut_off = content.split(b"\n")
    history = []
    for number, line in enumerate(lines, 1):
        where = f"'{path}', line {number}"
        try:
            record = json.loads(line.decode())
        except ValueError as error:
            raise InputError(f"{where} is not JSON; remove that line") from error
        if not isinstance(record, dict) or not record.keys() >= _RECORD_KINDS.keys():
            raise InputError(f"{where} is no record of metrics; remove that line")
        for key, value in record.items():
            if not _RECORD_KINDS.get(key, _is_measured)(value):
                raise InputError(f"{where}: {key!r} is {value!r:.80}; correct or remove that line")
        history.append(record)
    return history


def is_number(value: Any) -> bool:
    """Whether what JSON held is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value: Any) -> bool:
    """Whether what JSON held is a whole number from 0."""
    return is_number(value) and isinstance(value, int) and value >= 0


def _is_measured(value: Any) -> bool:
    """A number, or one a class; None stands for what is not finite."""
    values = value if isinstance(value, list) else [value]
    return all(one is None or is_number(one) for one in values)


_RECORD_KINDS: dict[str, Callable[[Any], bool]] = {
    "epoch": is_count,
    "split": lambda value: value in SPLITS,
    "step": is_count,
    "loss": lambda value: value is None or is_number(value),
}


def environment() -> dict[str, Any]:
    """Command line, code, versions and machine of this process; never fails."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    devices = jax.devices()
    return {
        "date": _now(),
        "command": shlex.join(sys.orig_argv or sys.argv),
        "folder": os.getcwd(),
        "git": _git(),
        "versions": versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu(),
        "cpus": _cpus(),
        "memory_bytes": _memory(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in devices],
        "processes": jax.process_count(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_", "CUDA_VISIBLE", "TF_GPU", "LD_PRELOAD"))
        },
    }


def seconds_since_start() -> float:
    """Wall time of this process so far; where no system tells, since it imported this module."""
    try:
        # Fields after the command, which is in parentheses and may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the machine was started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, AttributeError):
        return time.monotonic() - _IMPORTED


def record_session(path: str | os.PathLike[str], start_up: Mapping[str, float]) -> dict[str, Any]:
    """Adds this process to the sessions of `environment.json` and returns what was added.

    `start_up` is what the process did with its seconds until now.
    """
    stored = read_json(path) if Path(path).exists() else {"sessions": []}
    sessions = stored.get("sessions") if isinstance(stored, dict) else None
    if not isinstance(sessions, list):
        raise InputError(f"'{path}' holds no list of sessions; restore or remove it")
    session = {**environment(), "start_up": dict(start_up)}
    write_json(path, {"sessions": [*sessions, session]})
    return session


def choose_exemplars(
    labels: np.ndarray,
    per_class: int = 50,
    max_bytes: int = 64_000_000,
    *,
    bytes_per_image: int,
) -> np.ndarray:
    """Which training images a run keeps: int64 indices, ascending, the same for the same labels.

    `labels` is int (N,), or (N, 2) as (child, parent). Each class gives the same number, at
    most `per_class` and as many as `max_bytes` allow, spread evenly over its images; a class that
    has fewer gives all. Where not even one a class fits, every k-th class gives one.
    """
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 else labels
    order = np.argsort(labels, kind="stable")
    classes, counts = np.unique(labels, return_counts=True)
    groups = np.split(order, np.cumsum(counts)[:-1])
    room = max_bytes // max(1, bytes_per_image)
    each = next((k for k in range(per_class, 0, -1) if np.minimum(counts, k).sum() <= room), 0)
    if not each and len(classes):
        kept = np.linspace(0, len(classes) - 1, min(room, len(classes))).round().astype(int)
        groups, each = [groups[i] for i in kept], 1
    chosen = [
        group[np.linspace(0, len(group) - 1, min(each, len(group))).round().astype(int)]
        for group in groups
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, np.int64)


def pixel_statistics(images: np.ndarray | Iterable[np.ndarray]) -> dict[str, Any]:
    """How bright images are: mean, std and quantiles of their values, scaled to 0..1.

    `images` is uint8 (N, H, W, C) or any iterable of uint8 arrays. `light_on_dark` is True where
    most values lie at the dark end (white strokes on black), False where most lie at the light end,
    and None in between, as for photographs.
    """
    blocks = (
        np.array_split(images, len(images) // 256 + 1) if isinstance(images, np.ndarray) else images
    )
    histogram = np.zeros(256, np.int64)
    for block in blocks:
        histogram += np.bincount(np.asarray(block, np.uint8).ravel(), minlength=256)
    total = int(histogram.sum())
    if not total:
        raise InputError("pixel statistics need at least one image")
    values = np.arange(256) / 255
    mean = float(values @ histogram / total)
    std = math.sqrt(float((values - mean) ** 2 @ histogram / total))
    levels = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    below = np.cumsum(histogram)
    quantiles = {
        str(level): float(values[np.searchsorted(below, level * total)]) for level in levels
    }
    dark, light = quantiles["0.05"], quantiles["0.95"]
    middle = (quantiles["0.5"] - dark) / (light - dark) if light > dark else 0.5
    light_on_dark = True if middle < 0.2 else False if middle > 0.8 else None
    return {"mean": mean, "std": std, "quantiles": quantiles, "light_on_dark": light_on_dark}


def _line(record: Record) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Arrays and NumPy or JAX scalars as Python's own; NaN and infinity, which JSON lacks, None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that holds this package, and whether that is changed; None without."""

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # An installed package may lie in a virtual environment inside somebody else's checkout.
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpus() -> int | None:
    """The cores that this process may use."""
    with contextlib.suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
