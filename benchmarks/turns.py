"""Peers of a benchmark: processes that take turns, so that neither sees the other at work.

A peer is a script that calls `serve` with an endless iterator of how many images came; whoever
compares peers starts each as a `Peer` and asks for turns. Between its turns a peer is stopped, its
workers with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """What a peer did in its turn: images, seconds by the clock and of all its processes' CPU."""

    images: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


class Peer:
    """A process, and those that it starts, that run while it is their turn."""

    def __init__(self, command: Sequence[str]):
        """Starts it, and waits until it has done its first piece of work and is ready."""
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._runs = bool(self._answer())
        except BaseException:  # Ctrl-C, too: a stopped process outlives its parent
            self.close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn(self, seconds: float) -> Turn | None:
        """Lets it work for some seconds; None where it cannot run here."""
        if not self._runs:
            return None
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        return Turn(**json.loads(self._answer()))

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def serve(images: Iterator[int], ahead: int = 0) -> None:
    """Answers for the peer, turn by turn, until its input ends.

    ahead: batches that may lie ready from the time after the last turn; they are not counted.
    """
    stdout, sys.stdout = sys.stdout, sys.stderr  # what a library says is no answer
    next(images)
    print("ready", file=stdout, flush=True)
    for line in sys.stdin:
        for _ in range(ahead):
            next(images)
        count, cpu, began = 0, _cpu_of_group(), time.perf_counter()
        while (seconds := time.perf_counter() - began) < float(line):
            count += next(images)
        turn = {"images": count, "seconds": seconds, "cpu": _cpu_of_group() - cpu}
        print(json.dumps(turn), file=stdout, flush=True)


def _cpu_of_group() -> float:
    """Seconds of CPU that the processes of this process's group have taken."""
    total, group = 0, str(os.getpgrp())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[2] == group:
            total += int(fields[11]) + int(fields[12])
    return total / _TICK
