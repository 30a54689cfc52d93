"""How far a long prediction is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from flaxcls.progress import duration, make_console, show

_EVERY_SECONDS = 10.0


class Counter:
    """Counts things that are done, where a person sees it. A context manager.

    Output that can no longer be written (`| head`, a closed terminal) is given up.

    Args:
      what: what is counted, in the plural.
      total: how many there will be; None where nobody knows, as with a camera.
    """

    def __init__(self, what: str, total: int | None):
        self._what = what
        self._total = total
        self._console = make_console()
        self._done = 0
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and (total is None or total > 1):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(what, total=total, speed="")

    def __enter__(self) -> Counter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with giving_up():
                self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def add(self, count: int, note: str = "") -> None:
        """Says that so many more are done, and something of them."""
        self._done += count
        now = time.monotonic()
        speed = f"{self._done / max(now - self._began, 1e-9):.0f}/s"
        if self._bar is not None:
            with giving_up():
                self._bar.update(self._task, advance=count, speed=f"{speed}  {note}".rstrip())
        elif now - self._printed >= _EVERY_SECONDS:
            self._printed = now
            of = "" if self._total is None else f" of {self._total}"
            passed = duration(now - self._began)
            say(f"{self._done}{of} {self._what}, {speed}, {passed}  {note}".rstrip())


def say(content: RenderableType) -> None:
    """Prints a sentence or a table; to nobody where the reader has gone."""
    with giving_up():
        show(make_console(), content)


@contextlib.contextmanager
def giving_up() -> Iterator[None]:
    """A reader who goes away must not end what is being done."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
