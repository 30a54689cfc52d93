"""TensorBoard events of a run."""

import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flaxcls.history import Record, scalars
from flaxcls.runlog import writing


class Events:
    """TensorBoard events in a folder, always those of the history and no others.

    The first record goes, with the whole history before it, to a new file; then older ones are
    removed, so that a resumed run shows no step twice in any reader. Tags are `loss/train`,
    `accuracy/val`, ...; the step is the record's. `add` after each record, `close` at the end.
    """

    def __init__(self, folder: str | os.PathLike[str], history: Iterable[Record] = ()):
        self.folder = Path(folder)
        self._history = tuple(history)
        self._writer: Any = None

    def add(self, record: Record) -> None:
        """Adds one record, on disk when this returns."""
        with writing(self.folder):
            if self._writer is None:
                self._open()
            self._writer.write_event(_event(record))
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with writing(self.folder):
                self._writer.close()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        older = list(self.folder.glob("events.out.tfevents.*"))
        library = _tensorboard()
        # Written in this thread: SummaryWriter's own dies on a full disk, and its queue then
        # blocks the run for ever.
        self._writer = library.EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        # Makes a TensorBoard that is open on the older files forget what they said.
        start = library.SessionLog(status=library.SessionLog.START)
        self._writer.write_event(library.Event(wall_time=time.time(), step=0, session_log=start))
        for record in self._history:
            self._writer.write_event(_event(record))
        self._writer.flush()
        for file in older:
            file.unlink(missing_ok=True)


@functools.cache
def _tensorboard() -> SimpleNamespace:
    """tensorboardX, which imports PyTorch where that is installed: 2.5 s before the first step."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    return SimpleNamespace(
        EventsWriter=EventsWriter, Event=Event, SessionLog=SessionLog, Summary=Summary
    )


def _event(record: Record) -> Any:
    values = dict(scalars(record))
    for name in ("learning_rate", "images_per_second", "wait_share", "peak_memory_bytes"):
        if record.get(name) is not None:
            values[name] = float(record[name])
    library = _tensorboard()
    tags = [
        library.Summary.Value(tag=f"{name}/{record['split']}", simple_value=value)
        for name, value in values.items()
    ]
    summary = library.Summary(value=tags)
    return library.Event(wall_time=time.time(), step=int(record["step"]), summary=summary)
