"""Processes that take turns: each side of a comparison lives in its own and waits to be called.

A side is a script beside this one that calls `serve`; the parent starts it as a `Side`. Requests
and answers are lines of JSON over pipes.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class SideError(Exception):
    """A side could not do what it was asked for."""


class Side:
    """A process that does what it is told; use it as a context manager."""

    def __init__(self, script: str, task: str, environment: dict[str, str]):
        """Starts FOLDER/script, whose `serve` makes the worker from `task`, JSON."""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`kill` closes it)
        self._process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | environment,
            start_new_session=True,  # so that the compilers it starts end with it
        )

    def send(self, call: str, **arguments: Any) -> None:
        """Asks for a call of a method of the worker."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says why
            self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self, timeout: float | None = None) -> Any:
        """Waits for what the method returns.

        Raises:
          SideError: it raised, the process ended, or it took more than `timeout` seconds; only in
            the first case is the process still there.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.kill()
                raise SideError(f"took longer than {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SideError(f"its process ended with code {code}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer["value"]

    def call(self, call: str, timeout: float | None = None, **arguments: Any) -> Any:
        """`send` and `receive`."""
        self.send(call, **arguments)
        return self.receive(timeout)

    def kill(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answers calls of the methods of `make(task)` until the parent is gone.

    Begins with the answer to a call that nobody makes: whether the worker could be made.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = None

    def answer(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        value, reply = None, {}
        try:
            value = function(*arguments, **named)
            reply = {"value": value}
        except Exception as error:  # of whatever kind: the parent decides what to do about it
            first = (str(error).strip().splitlines() or [""])[0]
            reply = {"error": f"{type(error).__name__}: {first[:300]}"}
        return value, reply

    def put(reply: dict[str, Any]) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    worker, reply = answer(make, json.loads(sys.argv[1]))
    put(reply if "error" in reply else {"value": None})
    for line in sys.stdin:
        request = json.loads(line)
        _, reply = answer(getattr(worker, request.pop("call")), **request)
        put(reply)


class Memory:
    """How far the process's memory has risen above its level at the start, in bytes."""

    def __init__(self) -> None:
        self._level = _status("VmRSS")
        self.forget_peak()

    def peak(self) -> int:
        return _status("VmHWM") - self._level

    def forget_peak(self) -> None:
        """From now on the peak is that of what comes."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would count
        with contextlib.suppress(OSError):  # a kernel without it: the peak is of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def seconds_of(function: Callable[[], Any]) -> float:
    """The wall-clock time of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
