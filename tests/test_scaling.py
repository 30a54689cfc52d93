"""The scaling benchmark: what it counts, refuses and finds equal."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    return scaling


def test_several_devices_and_processes_compute_what_one_does(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--model=lenet", "--size=16"]
    command += ["--devices=2", "--batch=8", "--batch_each=2", "--steps=2", "--rounds=1"]
    command += ["--seconds=0.001", f"--json={tmp_path / 'new' / 'rows.json'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert result["machine"]["jax"]
    assert "--model=lenet" in result["command"]
    rows = result["rows"]
    assert not [value for row in rows for value in row.values() if isinstance(value, list | dict)]
    keys = ("scaling", "processes", "devices", "batch", "equal")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("strong", 1, 1, 8, True),
        ("strong", 1, 2, 8, True),
        ("strong", 2, 2, 8, True),
        ("weak", 1, 1, 2, None),
        ("weak", 1, 2, 4, None),
        ("weak", 2, 2, 4, None),
    ]
    for row in rows:
        assert row["simulated"]
        assert row["efficiency"] is None
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["step_ms"])
    table = (tmp_path / "new" / "rows.md").read_text()
    assert "2 simulated" in table
    assert table in done.stdout
    assert (tmp_path / "new" / "rows.png").stat().st_size > 0


def test_simulated_devices_have_overhead_and_real_ones_efficiency(scaling):
    four = scaling.Layout(1, 4)

    def judged(kind, step, simulated):
        found = scaling.judge(kind, four, step, alone=1.0, simulated=simulated)
        (value,) = (value for value in found.values() if value is not None)
        return pytest.approx(value)

    assert judged("strong", 1.2, simulated=True) == 0.2
    assert judged("weak", 4.4, simulated=True) == 0.1
    assert judged("strong", 0.25, simulated=False) == 1.0
    assert judged("strong", 0.5, simulated=False) == 0.5
    assert judged("weak", 1.25, simulated=False) == 0.8


def test_parameters_are_compared_over_what_training_changed(scaling, tmp_path):
    before, after = np.full(3, 100.0), np.array([100.0, 102.0, 101.0])
    np.savez(tmp_path / "alone.npz", **{"before/a": before, "after/a": after})
    np.savez(tmp_path / "ours.npz", **{"after/a": after + np.array([0, 0, 0.5])})
    assert scaling.differences(tmp_path / "ours.npz", tmp_path / "alone.npz") == 0.25
    assert scaling.differences(tmp_path / "alone.npz", tmp_path / "alone.npz") == 0


def test_layouts_that_want_more_devices_than_there_are_are_named(scaling):
    arguments = argparse.Namespace(devices=(1, 2, 4), alone=False)
    layouts, notes = scaling.layouts_of(arguments, present=None)
    assert list(map(str, layouts)) == [
        "1 device",
        "2 devices",
        "4 devices",
        "2 devices in 2 processes",
    ]
    assert not notes
    layouts, notes = scaling.layouts_of(arguments, present=1)
    assert layouts == [scaling.ALONE]
    assert notes[1] == "Left out: 4 devices; there are 1."


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--devices=1,x", "argument --devices: '1,x' are no numbers of devices; write 1,2,4,8"),
        ("--devices=0", "argument --devices: '0' are no numbers of devices; write 1,2,4,8"),
        ("--devices=3", "--batch: 64 images cannot be shared by 3 devices"),
        ("--batch=63", "--batch: 63 images cannot be shared by 2 devices"),
        ("--rounds=0", "argument --rounds: '0' is no number from 1"),
        ("--seconds=-1", "argument --seconds: '-1' is no time in seconds"),
        ("--model=vgg14", "argument --model: 'vgg14' is none of "),
        ("--model=hierarchical", "takes two labels; give a model that takes one"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_in_a_sentence(
    scaling, argument, sentence, capsys
):
    with pytest.raises(SystemExit, match="2"):
        scaling.arguments_of([argument])
    assert sentence in capsys.readouterr().err.splitlines()[-1]
