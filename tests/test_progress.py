"""What is shown on terminals, in log files, and where neither can be written."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from flaxcls.history import summary
from flaxcls.progress import (
    Progress,
    class_count_table,
    duration,
    epoch_line,
    make_console,
    show,
    wait_advice,
)

METRICS = {
    "loss": 0.123449,
    "accuracy": 0.9621,
    "top_5": 1.0,
    "precision_macro": 0.95,
    "recall_macro": 0.94,
    "f1_macro": 0.945,
    "f1_weighted": 0.951,
    "f1": [0.9, 0.99],
}


def records(epoch, wait_share=0.01, loss=0.123449):
    train = {"epoch": epoch, "split": "train", "step": epoch, **METRICS, "loss": loss}
    val = {"epoch": epoch, "split": "val", "step": epoch, **METRICS, "loss": 0.0987}
    train |= {"accuracy": 0.9621, "learning_rate": 0.1, "seconds": 11.0, "wait_share": wait_share}
    train |= {"images_per_second": 1234.4, "peak_memory_bytes": 2_345_678_901}
    return [train, val | {"accuracy": 0.975, "seconds": 1.2}]


RUN = """
import sys, time
from flaxcls.progress import Progress
from test_progress import records
from flaxcls.history import summary
history = records(1) + records(2)
with Progress(epochs=2, steps_per_epoch=4, batch_size=8, placement="host", every_seconds=0.1) as p:
    p.note("live" if p.live else "plain")
    p.class_counts(["Füße", "猫"], {"train": [5, 6], "val": [1, 2]})
    for epoch in (1, 2):
        p.start(epoch)
        for step in range(1, 5):
            time.sleep(0.13)
            p.update(step, loss=1.0 / step, accuracy=0.5)
        p.start(epoch, "val", steps=2)
        p.update(2)
        p.end_epoch(records(epoch), best=True)
    p.finish(summary(history, model="lenet", params=7, monitor="val/loss"), history, "runs/a")
print("done", file=sys.stderr)
"""


def environment(**variables):
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    # A size in the variables would go before the terminal's own; pytest-xdist sets one.
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return {**inherited, "PYTHONPATH": paths, "TERM": "xterm-256color", **variables}


def run_on_terminal(columns, **variables):
    """The output of RUN on a real pseudo-terminal so many columns wide."""
    parent, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=environment(**variables),
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            block = os.read(parent, 65536)
        except OSError:  # Linux's end of a terminal whose last writer has gone
            break
        output += block
    os.close(parent)
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert errors == "done\n"
    return output.decode(errors="replace")


@pytest.mark.parametrize("columns", [200, 60])
def test_a_terminal_gets_a_bar_and_keeps_the_lines(columns):
    output = run_on_terminal(columns)
    assert output.startswith("live")
    assert "epoch 1/2 train" in output
    assert "━" in output
    if columns == 200:
        assert re.search(r"loss 0\.\d{4} acc 50\.00 %  \d+ img/s  \S+ s left, \S+ s to the", output)
    assert "epoch 1/2  train loss 0.1234 acc 96.21 %  val loss 0.0987 acc 97.50 %" in output
    assert "Too early to see a trend after 2 epochs" in output


@pytest.mark.parametrize(
    ("columns", "variables"),
    [(20, {}), (80, {"COLUMNS": "0", "TERM": "dumb"})],
)
def test_a_terminal_that_cannot_draw_gets_plain_lines(columns, variables):
    output = run_on_terminal(columns, **variables)
    assert output.startswith("plain")
    assert "\x1b[2K" not in output
    assert "epoch 1/2  train step " in output
    assert "lenet (7 parameters), best epoch 1 of 2, 24 s" in output


def test_a_terminal_of_unknown_width_works():
    assert "everything is in runs/a" in run_on_terminal(0)


def test_output_without_unicode_shows_names_with_question_marks():
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        capture_output=True,
        env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        check=True,
    )
    output = result.stdout.decode("ascii")
    assert "F??e" in output
    assert "2 classes" in output
    assert "epoch 2/2  train loss" in output


def test_a_reader_that_goes_away_does_not_end_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", RUN], stdout=writing, stderr=subprocess.PIPE, env=environment()
    )
    os.close(writing)
    assert result.returncode == 0
    assert result.stderr == b"done\n"


def test_the_line_of_an_epoch():
    assert epoch_line(records(3), epochs=15, best=True) == (
        "epoch  3/15  train loss 0.1234 acc 96.21 %  val loss 0.0987 acc 97.50 %  "
        "1234 img/s  waited 1 % for data  peak memory 2.3 GB  12 s  best"
    )
    assert epoch_line([{"epoch": 1, "split": "train", "loss": 2e-5, "seconds": 1}], epochs=1) == (
        "epoch 1/1  train loss 2.00e-05  1.0 s"
    )


def test_advice_on_waiting_comes_once_and_follows_the_placement(capsys):
    progress = Progress(epochs=3, steps_per_epoch=1, batch_size=1, placement="files")
    for epoch, share in enumerate([0.1, 0.4, 0.5], 1):
        progress.start(epoch)
        progress.update(1)
        progress.end_epoch(records(epoch, share))
    output = capsys.readouterr().out
    assert output.count("waiting for data") == 1
    assert (
        output.index("waited 40 %") < output.index("40 % of the time") < output.index("waited 50 %")
    )
    assert "data.workers" in output
    assert "data.placement=device" in wait_advice(0.2, "host")
    assert "other programs" in wait_advice(0.2, "device")


def test_other_processes_say_nothing(capsys):
    with Progress(
        epochs=1, steps_per_epoch=1, batch_size=1, placement="host", every_seconds=0, enabled=False
    ) as progress:
        progress.class_counts(["a"], {"train": [1]})
        progress.start(1)
        progress.update(1, loss=1.0)
        progress.end_epoch(records(1, 0.5))
        progress.finish(
            summary(records(1), model="m", params=1, monitor="val/loss"), records(1), "r"
        )
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_at_most_every_interval(capsys):
    progress = Progress(
        epochs=1, steps_per_epoch=1000, batch_size=1, placement="host", every_seconds=1000
    )
    progress.start(1)
    for step in range(1000):
        progress.update(step, loss=1.0)
    progress.end_epoch(records(1))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_class_counts_of_few_and_of_many_classes(capsys):
    console = make_console()
    show(console, class_count_table(["[b]cat[/b]", "dog"], {"train": [1234, 5], "test": [0, 3]}))
    output = capsys.readouterr().out
    assert re.search(r"\[b\]cat\[/b\] *│ *1,234 *│ *0", output)
    assert re.search(r"2 classes *│ *1,239 *│ *3", output)
    names = [f"class{i}" for i in range(200)]
    show(console, class_count_table(names, {"train": list(range(1, 201)), "val": [2] * 200}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 11 + 1 + 2
    assert re.search(r"class199 *│ *200 *│ *2", lines[2])
    assert "190 classes" in lines[7]
    assert re.search(r"class0 *│ *1 *│", lines[12])
    assert re.search(r"median of a class *│ *101 *│ *2", lines[-2])
    assert re.search(r"200 classes *│ *20,100 *│ *400", lines[-1])


def test_the_end_shows_every_split_the_verdict_and_the_folder(capsys):
    history = records(1) + records(2)
    test = {**METRICS, "accuracy": 0.97123}
    result = summary(history, model="lenet", params=44426, monitor="val/loss", test=test)
    with Progress(epochs=2, steps_per_epoch=1, batch_size=1, placement="host") as progress:
        progress.finish(result, history, "runs/lenet-digits")
    lines = capsys.readouterr().out.splitlines()
    header = [cell.strip() for cell in re.split("[┃│]", lines[0])]
    assert header[:4] == ["split", "loss", "accuracy", "top-5"]
    rows = {line.split()[0]: line for line in lines[2:5]}
    assert list(rows) == ["train", "validation", "test"]
    assert "train (running) " in rows["train"]
    assert "0.0987" in rows["validation"]
    assert "97.12 %" in rows["test"]
    assert lines[5].startswith("Too early")
    assert lines[6] == (
        "lenet (44,426 parameters), best epoch 1 of 2, 24 s at 1234 img/s; "
        "everything is in runs/lenet-digits"
    )


def test_the_time_to_the_end_counts_validation_too(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("flaxcls.progress.time.monotonic", lambda: now)
    progress = Progress(epochs=3, steps_per_epoch=10, batch_size=1, every_seconds=5)
    for epoch in (1, 2):
        progress.start(epoch)
        for step in range(1, 11):
            now += 1
            progress.update(step)
        now += 20  # validation and saving
        progress.end_epoch(records(epoch))
    lines = capsys.readouterr().out.splitlines()
    # Epoch 2 after 5 of its 30 seconds, and a third epoch.
    assert any(
        "train step 5/10" in line and "5.0 s left, 55 s to the end" in line for line in lines
    )


def test_durations():
    shown = [duration(seconds) for seconds in (0.04, 9.9, 12.3, 100, 200, 3599.9, 7500)]
    assert shown == ["0.0 s", "9.9 s", "12 s", "100 s", "3 min 20 s", "59 min 59 s", "2 h 5 min"]
