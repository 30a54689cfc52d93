"""The run folder: its lock, its files under faults, and what they say."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_no_larger_than
from tensorboardX.proto.event_pb2 import Event

from flaxcls import runlog
from flaxcls.errors import InputError
from flaxcls.events import Events

HOLD = """
import os, sys, time
from flaxcls.runlog import RunFolder
folder = RunFolder(sys.argv[1])
ready, say = os.pipe()
child = os.fork()
if child == 0:
    os.write(say, b".")  # what Python does after a fork is done
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
print(child, flush=True)
time.sleep(60)
"""


def record(epoch, split="train", **values):
    return {"epoch": epoch, "split": split, "step": 10 * epoch, "loss": 1 / epoch, **values}


def events_in(folder):
    """Every (step, tag, value) of the event files of a folder."""
    found = []
    for file in sorted(Path(folder).glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_a_folder_in_use_is_refused_until_its_holder_is_killed(tmp_path):
    path = tmp_path / "runs" / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        with pytest.raises(InputError) as error:
            runlog.RunFolder(path)
        assert f"in use by process {process.pid} on {socket.gethostname()}" in str(error.value)
        assert "--workdir" in str(error.value)
        process.kill()
        process.wait()
        # The forked child lives on, as a data worker may, and must not keep the folder.
        os.kill(child, 0)
        with runlog.RunFolder(path) as folder, pytest.raises(InputError, match="in use by process"):
            runlog.RunFolder(folder.path)
        runlog.RunFolder(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_path_that_is_no_folder_or_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path in (file, file / "run"):
        with pytest.raises(InputError, match=r"notes\.txt' is a file; give another --workdir"):
            runlog.RunFolder(path)
    assert file.read_text() == "mine"
    with pytest.raises(InputError, match="cannot write '/proc/run'"):
        runlog.RunFolder("/proc/run")


def test_json_keeps_every_digit_and_has_no_nan(tmp_path):
    value = {
        "third": 1 / 3,
        "float32": np.float32(0.1),
        "jax": jnp.arange(3),
        "bad": [math.nan, -math.inf],
        "path": tmp_path,
        "name": "Füße",
        1: None,
    }
    runlog.write_json(tmp_path / "deep" / "a.json", value)
    text = (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert runlog.read_json(tmp_path / "deep" / "a.json") == {
        "third": 1 / 3,
        "float32": float(np.float32(0.1)),
        "jax": [0, 1, 2],
        "bad": [None, None],
        "path": str(tmp_path),
        "name": "Füße",
        "1": None,
    }
    with pytest.raises(InputError, match=r"cannot read '.*none\.json'"):
        runlog.read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"half\.json' is not JSON"):
        runlog.read_json(tmp_path / "half.json")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "summary.json"
    runlog.write_json(path, {"epochs": 3})
    with files_no_larger_than(1000), pytest.raises(InputError, match="make room and run the same"):
        runlog.write_json(path, {"epochs": list(range(10_000))})
    assert runlog.read_json(path) == {"epochs": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_stops_events_and_metrics_with_a_sentence(tmp_path):
    events = Events(tmp_path / "events")
    runlog.write_metrics(tmp_path / "metrics.jsonl", [record(1)])
    with files_no_larger_than(200):
        for _ in range(2):
            with pytest.raises(InputError, match=r"cannot write .*make room"):
                events.add(record(1, **{f"part_{i}": 1.0 for i in range(100)}))
        with pytest.raises(InputError, match=r"metrics\.jsonl.*make room"):
            runlog.append_metrics(tmp_path / "metrics.jsonl", record(2, precision=[0.5] * 100))
    events.close()
    assert runlog.read_metrics(tmp_path / "metrics.jsonl") == [record(1)]


def test_metrics_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert runlog.read_metrics(path) == []
    history = [record(e, s, f1=[0.1, 1 / 3]) for e in (1, 2) for s in ("train", "val")]
    runlog.write_metrics(path, history[:2])
    runlog.append_metrics(path, history[2])
    runlog.append_metrics(path, history[3])
    assert runlog.read_metrics(path) == history
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 1, 2, 2]


def test_a_line_that_a_kill_cut_off_is_ignored_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    runlog.write_metrics(path, [record(1), record(2)])
    path.write_text(path.read_text() + '{"epoch": 3, "spl')
    assert runlog.read_metrics(path) == [record(1), record(2)]
    runlog.write_metrics(path, [record(1)])
    assert path.read_text().count("\n") == 1
    path.write_text("{oops\n" + path.read_text())
    with pytest.raises(InputError, match="line 1 is not JSON"):
        runlog.read_metrics(path)


def test_events_of_a_resumed_run_show_no_step_twice(tmp_path):
    history = [record(e, s, accuracy=0.5) for e in (1, 2, 3) for s in ("train", "val")]
    events = Events(tmp_path)
    for item in history:
        events.add(item | {"learning_rate": 0.1} if item["split"] == "train" else item)
    # Killed here, the run resumes after epoch 2.
    events = Events(tmp_path, history[:4])
    events.add(history[4])
    found = events_in(tmp_path)
    assert sorted(step for step, tag, _ in found if tag == "loss/train") == [10, 20, 30]
    assert sorted(step for step, tag, _ in found if tag == "accuracy/val") == [10, 20]
    assert (20, "loss/val", 0.5) in found
    assert len(list(tmp_path.iterdir())) == 1
    events.close()


def test_environment_says_what_ran_where_and_keeps_every_session(tmp_path):
    path = tmp_path / "environment.json"
    first = runlog.record_session(path, {"data_seconds": 1.5})
    runlog.record_session(path, {})
    sessions = runlog.read_json(path)["sessions"]
    assert len(sessions) == 2
    assert sessions[0] == json.loads(json.dumps(first))
    assert {"python", "jax", "jaxlib", "flax", "optax", "grain", "numpy"} <= set(first["versions"])
    assert first["start_up"] == {"data_seconds": 1.5}
    assert first["devices"]
    assert first["cpus"] >= 1
    assert first["memory_bytes"] > 0
    assert "pytest" in first["command"] or "python" in first["command"]
    assert first["git"] is None or {"commit", "dirty"} == set(first["git"])


def test_arrays_are_written_whole_and_without_pickle(tmp_path):
    arrays = {"images": np.zeros((2, 4, 4, 1), np.uint8), "names": np.array(["a", "bb"])}
    runlog.write_arrays(tmp_path / "exemplars.npz", arrays)
    with np.load(tmp_path / "exemplars.npz", allow_pickle=False) as stored:
        assert stored["images"].shape == (2, 4, 4, 1)
        assert stored["names"].tolist() == ["a", "bb"]


def test_exemplars_are_even_over_classes_and_within_the_budget():
    labels = np.array([0] * 500 + [1] * 7 + [2] * 60)
    chosen = runlog.choose_exemplars(labels, bytes_per_image=1000)
    assert np.bincount(labels[chosen]).tolist() == [50, 7, 50]
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] == 0
    assert chosen[49] == 499
    assert (chosen == runlog.choose_exemplars(labels, bytes_per_image=1000)).all()
    chosen = runlog.choose_exemplars(labels, max_bytes=25_000, bytes_per_image=1000)
    assert np.bincount(labels[chosen]).tolist() == [9, 7, 9]
    pairs = np.stack([labels, labels // 2], 1)
    assert (
        runlog.choose_exemplars(pairs, bytes_per_image=1)
        == np.sort(runlog.choose_exemplars(labels, bytes_per_image=1))
    ).all()
    chosen = runlog.choose_exemplars(np.arange(100), max_bytes=10_000, bytes_per_image=1000)
    assert len(chosen) == 10
    assert len(runlog.choose_exemplars(np.zeros(0, int), bytes_per_image=1)) == 0


def test_pixel_statistics_tell_drawings_from_photographs():
    random = np.random.default_rng(0)
    strokes = (random.random((600, 28, 28, 1)) < 0.15).astype(np.uint8) * 255
    photos = random.normal(120, 40, (20, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    light = runlog.pixel_statistics(strokes)
    assert light["light_on_dark"] is True
    assert runlog.pixel_statistics(255 - strokes)["light_on_dark"] is False
    stats = runlog.pixel_statistics(iter(photos))
    assert stats["light_on_dark"] is None
    assert stats["mean"] == pytest.approx(photos.mean() / 255)
    assert stats["std"] == pytest.approx(photos.std() / 255)
    assert stats["quantiles"]["0.5"] == pytest.approx(np.median(photos) / 255, abs=0.005)
    assert json.dumps(stats)
    with pytest.raises(InputError):
        runlog.pixel_statistics(np.zeros((0, 8, 8, 1), np.uint8))


def test_the_age_of_a_process_is_known():
    program = (
        "import time; time.sleep(0.5); from flaxcls import runlog; "
        "print(runlog.seconds_since_start())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - began + 0.1
