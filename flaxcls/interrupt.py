"""Ctrl-C outside of the training loop: one sentence and exit code 130, at any moment.

Python's own way, an exception, gives a long traceback while modules are imported, and is lost where
it falls into a callback of the garbage collector: the run then trains to its end. What a run
writes is whole or absent at any moment, so that the process may end at once.
"""

import os
import signal
from typing import Any

SENTENCE = "stopped by SIGINT; the same command starts again, training from its last checkpoint"


def listen() -> None:
    """Makes Ctrl-C end this process; called by programs, before they import what takes long."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: Any) -> None:
    del frame
    if os.isatty(1):
        os.write(1, b"\r\x1b[K\x1b[?25h")  # a progress bar had hidden the cursor
    os.write(2, f"flaxcls: {SENTENCE}\n".encode())
    os._exit(128 + number)
