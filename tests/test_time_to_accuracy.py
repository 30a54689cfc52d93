"""The benchmark of time to accuracy: its clock, its levels, and a real run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EPOCHS = 3


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import time_to_accuracy

    return time_to_accuracy


def write_idx(folder: Path, prefix: str, size: int) -> None:
    """Writes images that tell their class by where they are bright."""
    labels = np.arange(size, dtype=np.uint8) % 10
    images = np.random.default_rng(size).integers(0, 100, (size, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 6] += 120
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (folder / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a run of one seed."""
    folder = tmp_path_factory.mktemp("measured")
    write_idx(folder, "train", 300)
    write_idx(folder, "t10k", 100)
    command = [sys.executable, str(BENCHMARKS / "time_to_accuracy.py"), f"--path={folder}"]
    command += ["--config=lenet:fashion_mnist", "--seeds=1", "--levels=1,100"]
    command += [f"--json={folder / 'new' / 'result.json'}", f"--runs={folder / 'runs'}"]
    keys = {
        "train.epochs": EPOCHS,
        "train.batch_size": 20,
        "ops.backend": "xla",
        "log.plots": False,
        "log.tensorboard": False,
    }
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "new" / "result.md").read_text() in done.stdout
    return folder


def test_the_test_accuracy_of_every_epoch_is_that_of_its_checkpoint(measured):
    result = json.loads((measured / "new" / "result.json").read_text())
    epochs = result["epochs"]
    assert [(e["config"], e["seed"], e["epoch"]) for e in epochs] == [
        ("lenet:fashion_mnist", 0, epoch) for epoch in range(1, EPOCHS + 1)
    ]
    summary = json.loads((measured / "runs" / "lenet-fashion_mnist-0" / "summary.json").read_text())
    chosen = epochs[summary["best_epoch"] - 1]
    assert chosen["test_accuracy"] == summary["test"]["accuracy"]
    assert str(measured) not in result["command"]
    assert (measured / "new" / "result.png").stat().st_size > 0


def test_the_parts_of_the_clock_add_up_within_the_time_of_the_command(measured, benchmark):
    result = json.loads((measured / "new" / "result.json").read_text())
    reached, never = result["rows"]
    assert not [v for r in (reached, never) for v in r.values() if isinstance(v, list | dict)]
    parts = [reached[f"{part}_seconds"] for part in benchmark.PARTS]
    assert sum(parts) == pytest.approx(reached["seconds"])
    assert min(parts) > 0
    assert reached["seconds"] < reached["command_seconds"]
    assert (reached["level"], reached["reached"], reached["epoch"]) == (0.01, True, 1)
    if not never["reached"]:
        assert never["seconds"] is None
    assert never["epochs"] == EPOCHS


START = {"import_seconds": 2.0, "data_seconds": 1.0, "compile_seconds": 0.5}


def record(epoch, split, elapsed, compiled=0.0):
    times = {"elapsed_seconds": elapsed, "compile_seconds": compiled}
    return {"epoch": epoch, "split": split, "step": 10 * epoch, **times}


def test_the_clock_stops_after_validation_where_there_is_one(benchmark):
    train, val = (record(1, "train", 13.5, 4.0), record(1, "val", 15.5, 1.0))
    (end,) = benchmark.clock(START, [train, val])
    assert end == {
        "epoch": 1,
        "step": 10,
        "seconds": 15.5,
        "import_seconds": 2.0,
        "data_seconds": 1.0,
        "compile_seconds": 5.5,
        "train_seconds": 6.0,
        "validation_seconds": 1.0,
    }
    first, second = benchmark.clock(START, [train, record(2, "train", 20.5)])
    assert (first["seconds"], second["seconds"]) == (13.5, 20.5)
    assert (first["train_seconds"], second["train_seconds"]) == (6.0, 13.0)
    assert second["validation_seconds"] == 0


def run_of(benchmark, seed, accuracies):
    history = [record(epoch, "train", 10.0 * epoch) for epoch in range(1, len(accuracies) + 1)]
    ends = benchmark.clock(START, history)
    said = {"config": "a", "seed": seed}
    return {
        "epochs": [
            {**said, **end, "test_accuracy": accuracy}
            for end, accuracy in zip(ends, accuracies, strict=True)
        ],
        "chosen_epoch": 1,
        "chosen_test_accuracy": accuracies[0],
        "command_seconds": 50.0,
        "test_pass_seconds": 0.5,
    }


def test_a_level_is_reached_at_the_first_epoch_that_is_as_good(benchmark):
    # Afterwards it may be worse: the run goes on, and is judged elsewhere by what it chose.
    rows = benchmark.rows_of(run_of(benchmark, 0, [0.89, 0.93, 0.91]), (0.9, 0.93, 0.94))
    assert [(row["reached"], row["seconds"], row["epoch"]) for row in rows] == [
        (True, 20.0, 2),
        (True, 20.0, 2),
        (False, None, None),
    ]


def test_the_table_has_mean_and_spread_over_the_seeds_that_arrived(benchmark):
    runs = [(0, [0.8, 0.9]), (1, [0.9]), (2, [0.8])]
    rows = [r for run in runs for r in benchmark.rows_of(run_of(benchmark, *run), (0.9, 0.95))]
    table = benchmark.tables(rows)
    assert "| a | 90 % | 2 of 3 | 15.0 ± 7.1 | 1.5 | 2.0 | 1.0 | 0.5 | 11.5 | 0.0 |" in table
    assert "| a | 95 % | 0 of 3 |  |  |  |  |  |  |  |" in table
    assert "| a | 3 | 83.33 ± 5.77 % | 50.0 ± 0.0 | 1.0 of 1 | 0.5 |" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: --path"),
        (["--path=x", "--levels=90,high"], "'90,high' are no percentages; write them as in 90,92"),
        (["--path=x", "--levels=120"], "'120' are no percentages"),
        (["--path=x", "--seeds=0"], "argument --seeds: '0' is no number from 1"),
        (["--path=x", "--seed=1"], "unrecognised argument '--seed=1'; --help lists them"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_in_a_sentence(
    benchmark, arguments, sentence, capsys
):
    with pytest.raises(SystemExit, match="2"):
        benchmark.arguments_of(arguments)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("lenet", "--config: 'lenet' does not train on Fashion-MNIST; give one that does"),
        ("lenett", "no file 'lenett', and no config of that name comes with flaxcls"),
    ],
)
def test_a_config_of_other_data_is_refused_before_anything_runs(benchmark, config, sentence):
    with pytest.raises(SystemExit, match=sentence):
        benchmark.main(["--path=x", f"--config={config}"])


def test_a_run_that_fails_ends_the_benchmark_in_a_sentence(benchmark, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "time_to_accuracy.py"), f"--path={tmp_path}"]
    command += ["--config=lenet:fashion_mnist", "--config.ops.backend=xla"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "time_to_accuracy: lenet:fashion_mnist, seed 0: the run ended with code 2"
