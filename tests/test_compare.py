"""Runs side by side: groups and their figures, the files that hold them, and what is left out."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, compiled_once, contents, run
from PIL import Image
from rich.console import Console

from flaxcls import config, main
from flaxcls.analysis.compare import compare_runs, find_runs, join_names
from flaxcls.errors import InputError

WRITTEN = {"compare.md", "compare.csv", "compare_runs.csv", "compare.png"}


def read(path):
    return json.loads(path.read_text())


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_rows(folder):
    """The cells of the table's rows, by the titles above them."""
    lines = [line for line in (folder / "compare.md").read_text().splitlines() if line[:1] == "|"]
    titles, rule, *body = ([cell.strip() for cell in line.split(" | ")] for line in lines)
    assert all(set(cell) <= set("|:- ") for cell in rule)
    return [dict(zip((t.strip("| ") for t in titles), row, strict=True)) for row in body]


def made_up(folder, *, seed=0, accuracy=0.9, epochs=6, summary=(), loss=2.0, **keys):
    """A finished run of lenet that nobody trained; `keys` of the config have __ for a dot."""
    c, _ = config.resolve(main.parse(["flaxcls", "--config=lenet"]).config)
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    with c.unlocked():
        c.update_from_flattened_dict({"seed": seed, **changed})
    folder.mkdir(parents=True)
    config.save(c, folder / "config.json")
    history = []
    for epoch in range(1, epochs + 1):
        for split, worse in (("train", 0.98), ("val", 1.0)):
            record = {"epoch": epoch, "split": split, "step": 8 * epoch}
            record["loss"] = loss * worse * float(np.exp(-epoch / 4)) + 0.1 * (split == "val")
            record["accuracy"] = accuracy * (1 - float(np.exp(-epoch / 2)) * worse)
            history.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    stored = {
        "model": c.model.name,
        "params": 70934,
        "best_epoch": epochs - 1,
        "epochs": epochs,
        "seconds": 10.0 + seed,
        "images_per_second": 100.0,
        "val": {"loss": 0.3, "accuracy": accuracy},
        "test": {"loss": 0.4, "accuracy": accuracy - 0.01},
    }
    (folder / "summary.json").write_text(json.dumps(stored | dict(summary)))
    return folder


# Runs that were trained.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two seeds of one config, and one run with another learning rate; not to be changed."""
    folder = tmp_path_factory.mktemp("compare") / "runs"
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        for name, flags in {
            "lenet-s0": [],
            # What may change on resuming makes no group of its own.
            "lenet-s1": ["--config.seed=1", "--config.eval.top_k=2", "--config.checkpoint.keep=1"],
            "slow": ["--config.optimizer.learning_rate=0.0001", "--config.train.epochs=1"],
        }.items():
            done = run(*SMALL, *flags, f"--workdir={folder}/{name}")
            assert done.code == 0, done.error
    return folder


@pytest.fixture(scope="module")
def output(trained) -> str:
    before = contents(trained)
    done = run("--mode=compare", f"--workdir={trained}/*")
    assert done.code == 0, done.error
    assert done.error == ""
    after = contents(trained)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == WRITTEN
    return done.output


def test_groups_have_mean_and_standard_deviation_of_their_seeds(trained, output):
    summaries = {path.parent.name: read(path) for path in trained.glob("*/summary.json")}
    groups = {row["runs"]: row for row in rows(trained / "compare.csv")}
    assert set(groups) == {"lenet-s0 lenet-s1", "slow"}
    for names, row in groups.items():
        some = [summaries[name] for name in names.split()]
        assert int(row["n"]) == len(some)
        assert (row["model"], row["loss"], row["optimizer"]) == ("lenet", "cross_entropy", "adam")
        assert int(row["params"]) == 70934
        for name, values in {
            "best_epoch": [s["best_epoch"] for s in some],
            "seconds": [s["seconds"] for s in some],
            "val_accuracy": [s["val"]["accuracy"] for s in some],
            "test_accuracy": [s["test"]["accuracy"] for s in some],
        }.items():
            assert float(row[f"{name}_mean"]) == np.mean(values)
            if len(values) > 1:
                assert float(row[f"{name}_std"]) == np.std(values, ddof=1)
            else:
                assert row[f"{name}_std"] == ""


def test_a_row_a_run_holds_its_whole_summary(trained, output):
    runs = rows(trained / "compare_runs.csv")
    assert {row["run"] for row in runs} == {"lenet-s0", "lenet-s1", "slow"}
    number = {row["runs"]: row["group"] for row in rows(trained / "compare.csv")}
    for row in runs:
        summary = read(trained / row["run"] / "summary.json")
        assert number[next(names for names in number if row["run"] in names)] == row["group"]
        assert row["seed"] == ("1" if row["run"] == "lenet-s1" else "0")
        for split in ("val", "test"):
            for name, score in summary[split].items():
                assert float(row[f"{split}_{name}"]) == score
        assert float(row["seconds"]) == summary["seconds"]


def test_the_table_is_printed_and_written_with_what_was_varied(trained, output):
    table = markdown_rows(trained)
    assert len(table) == 2
    best = max(table, key=lambda row: float(row["validation %"].split()[0]))
    assert table[0] == best
    by_run = {row["run"]: row for row in table}
    seeds, slow = by_run["lenet-s{0,1}"], by_run["slow"]
    assert {seeds["optimizer.learning_rate"], slow["optimizer.learning_rate"]} == {
        "0.0001",
        "0.001",
    }
    assert (seeds["train.epochs"], slow["train.epochs"]) == ("2", "1")
    assert (seeds["seeds"], slow["seeds"]) == ("2", "1")
    tested = [read(trained / f"lenet-s{i}" / "summary.json")["test"]["accuracy"] for i in (0, 1)]
    mean, std = 100 * np.mean(tested), 100 * np.std(tested, ddof=1)
    assert seeds["test %"] == f"{mean:.2f} ± {std:.2f}"
    assert "±" not in slow["test %"]
    for row in table:
        line = next(line for line in output.splitlines() if row["run"] in line)
        assert all(cell.strip("| ") in line for cell in row.values())
    assert output.splitlines()[-1] == (
        f"compare.md, compare.csv, compare_runs.csv and compare.png are in {trained}"
    )


def test_the_picture_is_there(trained, output):
    with Image.open(trained / "compare.png") as image:
        assert 700 < image.width < 1500
        assert 400 < image.height < 1000
        assert np.asarray(image.convert("L")).std() > 5


# Runs that were made up.


def test_the_best_validation_accuracy_comes_first_and_none_last(tmp_path):
    made_up(tmp_path / "a", model__dropout=0.1, accuracy=0.5)
    made_up(tmp_path / "b", model__dropout=0.2, summary={"val": None})
    made_up(tmp_path / "c", model__dropout=0.3, accuracy=1.0)
    compare_runs(f"{tmp_path}/*")
    table = markdown_rows(tmp_path)
    assert [row["run"] for row in table] == ["c", "a", "b"]
    assert [row["validation %"] for row in table] == ["100.00", "50.00", "n/a"]
    assert rows(tmp_path / "compare.csv")[2]["val_accuracy_mean"] == ""


@pytest.mark.parametrize("width", [60, 100, 300])
def test_no_number_is_lost_on_a_narrow_terminal(tmp_path, monkeypatch, capsys, width):
    monkeypatch.setattr(
        "flaxcls.analysis.compare.make_console",
        lambda: Console(force_terminal=True, color_system=None, width=width),
    )
    for i in range(4):
        made_up(tmp_path / f"lenet-{i}", seed=i, train__batch_size=16 + i // 2)
    compare_runs(f"{tmp_path}/*")
    said = capsys.readouterr().out
    table = said[: said.index("compare.md")].splitlines()
    assert max(map(len, table)) <= width
    for row in markdown_rows(tmp_path):
        for title in ("run", "train.batch_size", "best epoch", "validation %", "test %"):
            assert width < 100 or any(row[title] in line for line in table)
    assert any("lenet-{0,1}" in line for line in table)
    assert ("cross_entropy in all" in said) == (width < 300)


def test_a_choice_that_brings_keys_of_its_own_is_one_column(tmp_path):
    made_up(tmp_path / "adam")
    optimizer = {"name": "sgd", "momentum": 0.9, "nesterov": False, "b1": None, "b2": None}
    made_up(tmp_path / "sgd", **{f"optimizer__{key}": value for key, value in optimizer.items()})
    compare_runs(f"{tmp_path}/*")
    assert not [title for title in markdown_rows(tmp_path)[0] if "." in title]
    assert {row["optimizer"] for row in markdown_rows(tmp_path)} == {"adam", "sgd"}
    stored = {row["optimizer"]: row["optimizer.momentum"] for row in rows(tmp_path / "compare.csv")}
    assert stored == {"adam": "", "sgd": "0.9"}


def test_the_table_has_the_four_keys_with_most_values_and_the_csv_all(tmp_path):
    for i in range(4):
        made_up(
            tmp_path / f"run{i}",
            optimizer__learning_rate=10.0**-i,
            train__batch_size=2 ** (i // 2),
            train__patience=i // 2,
            augment__rotation=float(i % 2),
            augment__crop_area=(0.1, 1.0 - 0.1 * i),
            augment__mixup=0.1 * (i == 3),
            data__workers=i,
        )
    compare_runs(f"{tmp_path}/*")
    shown = [title for title in markdown_rows(tmp_path)[0] if "." in title]
    assert shown[:2] == ["augment.crop_area", "optimizer.learning_rate"]
    assert len(shown) == 4
    (first, *_) = rows(tmp_path / "compare.csv")
    assert len([title for title in first if "." in title]) == 6
    assert first["augment.crop_area"] == "[0.1, 1.0]"


def test_accuracies_of_parents_are_shown_where_there_are_any(tmp_path):
    made_up(tmp_path / "flat")
    scores = {"accuracy": 0.8, "parent_accuracy": 0.9712345678901234}
    made_up(tmp_path / "tree", model__name="hierarchical", summary={"val": scores, "test": scores})
    compare_runs(f"{tmp_path}/*")
    flat, tree = markdown_rows(tmp_path)
    assert (flat["test parent %"], tree["test parent %"]) == ("n/a", "97.12")
    assert rows(tmp_path / "compare.csv")[1]["val_parent_accuracy_mean"] == "0.9712345678901234"


def test_other_classes_make_another_group(tmp_path):
    made_up(tmp_path / "ten", seed=0)
    made_up(tmp_path / "twelve", seed=1, summary={"params": 71104})
    assert len(compare_runs(f"{tmp_path}/*")) == 2


def test_runs_that_may_be_no_seeds_are_named(tmp_path, capsys):
    made_up(tmp_path / "a", data__path="here")
    made_up(tmp_path / "b", data__path="there")
    compare_runs(f"{tmp_path}/*")
    said = capsys.readouterr().out
    assert "of one config and one seed (0), all count: a, b" in said
    assert "taken for the same data at another data.path: a (here), b (there)" in said


def test_unfinished_runs_and_other_folders_are_left_out_with_a_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up(Path("runs/good"))
    (made_up(Path("runs/cut")) / "summary.json").unlink()
    Path("runs/photos").mkdir()
    done = run("--mode=compare", "--workdir=runs/*")
    assert done.code == 0
    assert "left out, not finished: runs/cut\n" in done.output
    assert "ignored, no runs: runs/photos\n" in done.output
    assert len(markdown_rows(tmp_path / "runs")) == 1
    assert "left out, not finished: runs/cut\n" in Path("runs/compare.md").read_text()
    assert done.output.endswith("are in runs\n")
    # What it wrote is no folder, and changes nothing.
    assert run("--mode=compare", "--workdir=runs/*").output == done.output


def test_several_patterns_meet_in_the_folder_above_and_a_run_counts_once(tmp_path, monkeypatch):
    for name in ("a/x", "b/x", "c/x,y", "[z]"):
        made_up(tmp_path / name, seed=len(name))
    os.symlink(tmp_path / "a", tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path))
    found, notes = find_runs(f"{tmp_path}/a/*, ~/b/x,{tmp_path}/link/x,{tmp_path}/none*,~/[z]")
    assert found == [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "[z]"]
    assert notes == [f"no folder matches '{tmp_path}/none*'"]
    assert find_runs(f"{tmp_path}/c/x,y") == ([tmp_path / "c" / "x,y"], [])
    compare_runs(f"{tmp_path}/?/x")
    assert {path.name for path in tmp_path.iterdir()} >= WRITTEN
    assert {row["run"] for row in rows(tmp_path / "compare_runs.csv")} == {"a/x", "b/x"}


def test_names_are_joined_as_a_shell_expands_them():
    assert join_names(["lenet"]) == "lenet"
    assert join_names(["lenet-s0", "lenet-s1"]) == "lenet-s{0,1}"
    assert join_names(["lenet", "lenet-s1"]) == "lenet{,-s1}"


def test_names_of_all_kinds_are_written_and_drawn(tmp_path):
    for i, name in enumerate(("a|b", "*c*", "caf\udce9", "$d$", "a,b")):
        made_up(tmp_path / name, model__name=name.replace("/", "-"), seed=i)
    compare_runs(f"{tmp_path}/*")
    assert len(markdown_rows(tmp_path)) == 5
    assert {row["run"] for row in rows(tmp_path / "compare_runs.csv")} >= {"a|b", "*c*", "a,b"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("groups", "width", "height"), [(1, 530, 600), (7, 1390, 1200), (12, 2050, 1200)]
)
def test_six_columns_stand_side_by_side(tmp_path, groups, width, height):
    for i in range(groups):
        made_up(tmp_path / f"run{i}", accuracy=0.8 + 0.01 * i, model__dropout=0.05 * i)
    compare_runs(f"{tmp_path}/*")
    with Image.open(tmp_path / "compare.png") as image:
        assert image.width == pytest.approx(width, rel=0.1)
        assert image.height == pytest.approx(height, rel=0.1)


@pytest.mark.filterwarnings("error")
def test_runs_without_curves_are_drawn(tmp_path):
    for i in range(2):
        (made_up(tmp_path / f"run{i}", model__dropout=0.1 * i) / "metrics.jsonl").unlink()
    made_up(tmp_path / "one", epochs=1)
    for pattern, groups in (("*", 3), ("run*", 2)):
        compare_runs(f"{tmp_path}/{pattern}")
        with open(tmp_path / "compare.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == groups
        with Image.open(tmp_path / "compare.png") as image:
            assert len(image.convert("L").getcolors()) > 2, "nothing is drawn"


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--workdir is missing; give the folders of runs, as in --workdir='runs/*'"),
        (["--workdir=none/*"], "no folder matches 'none/*'; give the folders of runs, such as"),
        (["--workdir=runs"], "no folder that matches 'runs' is that of a run (runs); give the"),
        (["--workdir=runs/*"], "no run that matches 'runs/*' is finished (runs/cut); run the"),
        (["--workdir=,"], "no folder matches ','"),
        (["--workdir=runs/*", "runs/b"], "unexpected argument 'runs/b'; put the pattern in quotes"),
        (["--workdir=runs/*", "--config=lenet"], "--config: --mode=compare takes the configs that"),
        (
            ["--workdir=runs/*", "--config.seed=1"],
            "--config.seed: --mode=compare takes the configs",
        ),
        (["--workdir=runs/*", "--config.sead=1"], "sead is not a key of the config"),
        (["--workdirs=runs/*"], "--workdirs: there is no such flag; did you mean 'workdir'?"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (made_up(Path("runs/cut")) / "summary.json").unlink()
    before = contents(tmp_path)
    assert said in run("--mode=compare", *arguments).sentence
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, name):
    made_up(tmp_path / "good")
    (made_up(tmp_path / "bad") / name).write_text("[]\n")
    before = contents(tmp_path)
    said = run("--mode=compare", f"--workdir={tmp_path}/*").sentence
    assert f"{tmp_path}/bad/{name}" in said
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    made_up(tmp_path / "run")
    (tmp_path / "compare.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write '.*compare\.csv'"):
        compare_runs(f"{tmp_path}/run")
    shutil.rmtree(tmp_path / "compare.csv")
    compare_runs(f"{tmp_path}/run")
