"""The throughput benchmark: its rows, its PyTorch networks, and what it does when a side fails."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flaxcls import models

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = (
    *("model", "size", "batch", "mode", "dtype", "ops", "flaxcls_ms", "torch_ms", "ratio"),
    *("torch_installed_ms", "ratio_installed"),
)


@pytest.fixture
def import_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def measure(path, *options):
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), f"--json={path}"]
    command += ["--models=lenet", "--size=16", "--batch=2", "--ops=xla", "--rounds=1"]
    command += ["--seconds=0.001", "--without_torch_compile", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_rows_are_flat_and_compare_with_torch(tmp_path):
    pytest.importorskip("torch", reason="the peer is PyTorch, which is not installed")
    (row,), _ = measure(tmp_path / "new" / "rows.json", "--modes=infer")
    assert tuple(row)[: len(KEYS)] == KEYS
    assert not [value for value in row.values() if isinstance(value, list | dict)]
    assert (row["model"], row["size"], row["batch"], row["mode"]) == ("lenet", 16, 2, "infer")
    assert row["ratio"] == pytest.approx(row["torch_ms"] / row["flaxcls_ms"])
    assert row["ratio_installed"] == pytest.approx(row["torch_installed_ms"] / row["flaxcls_ms"])
    assert 0 < row["torch_ms"] <= row["torch_installed_ms"]
    assert row["torch_best"] in row["torch_tried"]
    assert row["torch_tried"].count("eager") == 3
    assert row["parameters"] == row["torch_parameters"]
    assert row["torch_peak_mb"] > 0
    assert (tmp_path / "new" / "rows.png").stat().st_size > 0
    table = (tmp_path / "new" / "rows.md").read_text()
    assert "lenet@16" in table
    assert "Geometric means" in table


def test_without_torch_its_columns_are_null_and_the_row_says_so(tmp_path):
    (row,), said = measure(tmp_path / "rows.json", "--modes=train", "--without_torch")
    assert all(row[key] is None for key in KEYS if key.startswith(("torch", "ratio")))
    assert row["torch_note"] == "no PyTorch"
    assert "no PyTorch" in said
    # Two convolutions and two dense layers; a multiply and an add as two, two images, three passes.
    forward = 12 * 12 * 75 * 6 + 2 * 2 * 150 * 16 + 16 * 256 + 256 * 10
    assert row["step_gflop"] == pytest.approx(3 * 2 * 2 * forward / 1e9)
    assert row["images_per_second"] == pytest.approx(2000 / row["flaxcls_ms"])
    assert row["compile_seconds"] > 0
    assert row["peak_mb"] > 0


# Of a family one that the others are longer forms of.
@pytest.mark.parametrize(
    "name", sorted({*models.list_models()} - {"vgg11", "vgg16", "vgg19", "resnet34"})
)
def test_the_torch_network_has_as_many_parameters(name, import_benchmarks):
    torch = pytest.importorskip("torch", reason="the peer is PyTorch, which is not installed")
    import torch_networks

    small = name in ("lenet", "like_vgg", "ts_cnn", "ai_inno_cnn") or name.startswith("fashion")
    size, channels = (28, 1) if small else (64, 3)
    with torch.device("meta"):
        try:
            network = torch_networks.create(name, 10, size, channels).eval()
        except LookupError:
            assert name in ("hierarchical", "hierarchical_resnet18", "residual_cam")
            return
        assert network(torch.zeros(2, channels, size, size)).shape == (2, 10)
    model = models.create_model(name, 10)
    images = jnp.zeros((1, size, size, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert sum(p.numel() for p in network.parameters()) == ours


SLEEPER = """
import time
import sides

class Worker:
    def __init__(self, task): self.task = task
    def echo(self, word): print("noise"); return [word, self.task]
    def fail(self): raise ValueError("no such thing\\nand more")
    def sleep(self): time.sleep(60)
    def leave(self): raise SystemExit(3)

sides.serve(Worker)
"""


@pytest.fixture
def side(tmp_path, monkeypatch, import_benchmarks):
    import sides

    (tmp_path / "worker.py").write_text(SLEEPER)
    monkeypatch.setattr(sides, "FOLDER", tmp_path)
    with sides.Side("worker.py", '{"a": 1}', {"PYTHONPATH": str(BENCHMARKS)}) as side:
        assert side.receive(20) is None
        yield side


def test_a_side_answers_and_goes_on_after_an_error(side):
    from sides import SideError

    with pytest.raises(SideError, match=r"^ValueError: no such thing$"):
        side.call("fail")
    assert side.call("echo", word="hello") == ["hello", {"a": 1}]


def test_a_side_that_takes_too_long_is_ended(side):
    from sides import SideError

    began = time.monotonic()
    with pytest.raises(SideError, match="longer than 0 s"):
        side.call("sleep", timeout=0.2)
    assert time.monotonic() - began < 5


def test_a_side_that_ends_is_reported(side):
    from sides import SideError

    with pytest.raises(SideError, match="ended with code 3"):
        side.call("leave")
