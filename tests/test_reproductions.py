"""The benchmarks of published recipes: one source of numbers, commands as given, criteria."""

import argparse
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def import_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("part", ["expanding", "vgg"])
def test_the_head_of_a_caltech_recipe_has_the_published_accuracies(part):
    from published import CALTECH

    name = {"expanding": "expanding_cnn", "vgg": "vgg"}[part]
    head = (ROOT / "configs" / "caltech" / f"{name}.py").read_text()
    published, *_ = re.findall(r"^Published.*?(?=\bOurs\b|\n\n)", head, re.DOTALL | re.MULTILINE)
    numbers = [float(number) for number in re.findall(r"\d\d\.\d{3}", published)]
    assert numbers == [pytest.approx(100 * one) for one in CALTECH[part].values()]


def test_a_command_says_the_options_that_were_given():
    import machine

    parser = argparse.ArgumentParser(prog="frozen_trunk.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(["--image_size", "64", "--json=x.json"])
    assert machine.command(parser, given) == "python benchmarks/frozen_trunk.py --image_size=64"


@pytest.mark.parametrize(
    ("mean", "parent", "reached"),
    [(0.910, 0.994, [True, True]), (0.908, 0.994, [True, False]), (0.92, 0.98, [False, True])],
)
def test_hierarchical_training_is_held_to_the_flat_model(
    tmp_path, monkeypatch, mean, parent, reached
):
    import reproductions

    monkeypatch.setattr(reproductions, "RESULTS", tmp_path)
    result = {"mean": mean, "runs": [{"parent_accuracy": parent}]}
    assert not all(reproductions.criteria("fashion_hierarchical", result).values())
    (tmp_path / "fashion_flat.json").write_text(json.dumps({"mean": 0.912}))
    assert list(reproductions.criteria("fashion_hierarchical", result).values()) == reached
    assert reproductions.criteria("fashion_flat", result) == {}
    wanted = {"accuracy at least 98.5 %": False}
    assert reproductions.criteria("vgg13_caltech", result) == wanted
