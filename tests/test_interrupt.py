"""Ctrl-C ends the command with one sentence at any moment, and exit code 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flaxcls import interrupt, main
from flaxcls.train import StopRequest

SMALL = ("--config=lenet", "--config.data.max_per_class=20", "--config.train.epochs=2")


def stop_once(tmp_path, program, imported):
    """Runs a program, sends SIGINT once it has imported a module, and returns what it then said."""
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(main.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *program, *SMALL, f"--workdir={tmp_path}/run"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == imported:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    said = [line for line in error.splitlines() if not line.startswith("import time:")]
    return process.returncode, said


@pytest.mark.parametrize(
    "imported", ["argparse", "jax._src.config", "flax", "flaxcls.config", "orbax.checkpoint"]
)
def test_ctrl_c_while_the_command_starts_is_one_sentence(tmp_path, imported):
    ended = stop_once(tmp_path, ["-m", "flaxcls.main"], imported)
    assert ended == (130, [f"flaxcls: {interrupt.SENTENCE}"])


@pytest.mark.parametrize(
    "program",
    [["-m", "flaxcls"], ["-c", "from flaxcls.__main__ import run; run()"]],
    ids=["module", "console entry"],
)
def test_every_way_to_start_the_command_listens_first(tmp_path, program):
    assert stop_once(tmp_path, program, "jax._src.config")[0] == 130


ENDLESS = """
import gc, signal
from flaxcls import interrupt
interrupt.listen()
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
gc.collect()
print("went on")
"""


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector():
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"flaxcls: {interrupt.SENTENCE}\n"


def test_a_second_ctrl_c_acts_as_it_did_before_the_loop():
    stop = StopRequest()
    # Set here, since a background job is started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop.listening():
            signal.raise_signal(signal.SIGINT)
            assert stop.signal_number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_main_as_a_function_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    assert main.main(["flaxcls", "--config=lenat"]) == 2
    assert signal.getsignal(signal.SIGINT) is before
