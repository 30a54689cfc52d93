"""The command line: modes, names of runs, and what a run folder holds."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, compiled_once, contents, run
from PIL import Image
from sklearn.datasets import load_digits

from flaxcls import __version__, config, main, models
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError

METRICS = {
    "loss",
    "accuracy",
    "top_5",
    *(f"{name}_{mean}" for name in ("precision", "recall", "f1") for mean in ("macro", "weighted")),
}
LOGGED = ("--config.log.plots=True", "--config.log.tensorboard=True")
PER_CLASS = {"precision", "recall", "f1", "support", "class_accuracy"}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of two epochs, with plots and events; not to be changed."""
    folder = tmp_path_factory.mktemp("main") / "run"
    done = run(*SMALL, *LOGGED, f"--workdir={folder}")
    assert done.code == 0, done.error
    assert done.error == ""
    (folder.parent / "output.txt").write_text(done.output)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path):
    return json.loads(path.read_text())


# What a run leaves behind.


def test_a_run_folder_holds_all_that_the_design_names(finished):
    files = {name.split("/")[0] for name in contents(finished)}
    assert files == {
        "checkpoints",
        "config.json",
        "environment.json",
        "exemplars.npz",
        "metrics.jsonl",
        "plots",
        "predictions",
        "preprocess.json",
        "summary.json",
        "tensorboard",
        "weights.safetensors",
    }
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"8", "16"}
    assert {p.name for p in (finished / "predictions").iterdir()} >= {"val.npz", "test.csv"}
    assert {p.stem for p in (finished / "plots").iterdir()} >= {
        "loss",
        "accuracy",
        "precision_recall_f1",
        "class_accuracy",
        "class_counts",
        "confusion",
    }
    assert not [name for name in contents(finished) if name.endswith((".pkl", ".pickle", ".tmp"))]


def test_a_line_an_epoch_and_split(finished):
    written = records(finished)
    assert [(r["epoch"], r["split"], r["step"]) for r in written] == [
        (1, "train", 8),
        (1, "val", 8),
        (2, "train", 16),
        (2, "val", 16),
    ]
    both = {"epoch", "split", "step", "seconds", "images_per_second"} | METRICS | PER_CLASS
    both |= {"compile_seconds", "elapsed_seconds"}
    for record in written:
        more = (
            {"learning_rate", "wait_share", "peak_memory_bytes"}
            if record["split"] == "train"
            else set()
        )
        assert set(record) == both | more
        assert all(len(record[name]) == 10 for name in PER_CLASS)


def test_the_times_of_a_run_add_up(finished):
    """Start-up, and between records compilation and the work itself."""
    session = read(finished / "environment.json")["sessions"][0]
    assert set(session["start_up"]) == {"import_seconds", "data_seconds", "compile_seconds"}
    assert min(session["start_up"].values()) >= 0
    passed = sum(session["start_up"].values())
    for record in records(finished):
        took = record["elapsed_seconds"] - passed
        # The first call of a step, which compiles it, is no part of an epoch's own seconds.
        assert record["compile_seconds"] >= 0
        assert record["seconds"] <= took
        passed = record["elapsed_seconds"]
    compiled = [record["compile_seconds"] for record in records(finished)]
    assert min(compiled[:2]) > 0
    assert max(compiled[2:]) < min(compiled[:2])


def test_the_summary_is_what_the_best_epoch_measured(finished):
    summary = read(finished / "summary.json")
    assert set(summary) == {
        "model",
        "params",
        "best_epoch",
        "epochs",
        "seconds",
        "images_per_second",
        "val",
        "test",
    }
    val = [r for r in records(finished) if r["split"] == "val"]
    best = max(val, key=lambda r: (r["accuracy"], -r["loss"]))
    assert summary["model"] == "lenet"
    assert summary["best_epoch"] == best["epoch"]
    assert summary["epochs"] == 2
    assert set(summary["val"]) == set(summary["test"]) == METRICS
    assert summary["val"] == {name: best[name] for name in METRICS}
    weights = (finished / "weights.safetensors").stat().st_size
    assert 4 * summary["params"] < weights < 4 * summary["params"] + 5000
    text = (finished / "summary.json").read_text()
    assert str(finished) not in text
    assert "20" + "26-" not in text


def test_the_test_split_was_evaluated_with_the_best_checkpoint(finished):
    stored = np.load(finished / "predictions" / "test.npz")
    correct = stored["logits"].argmax(axis=1) == stored["label"]
    assert read(finished / "summary.json")["test"]["accuracy"] == correct.mean()
    assert len(correct) == 40
    rows = list(csv.DictReader((finished / "predictions" / "test.csv").open()))
    assert [row["truth"] == row["prediction"] for row in rows] == correct.tolist()
    assert all(row["file"].startswith("digits/") for row in rows)


def test_images_and_their_preparation_are_described(finished):
    described = read(finished / "preprocess.json")
    assert described["format_version"] == 1
    assert (described["size"], described["channels"], described["resize"]) == (28, 1, "squash")
    assert described["class_names"] == [str(i) for i in range(10)]
    assert described["class_counts"] == [14] * 10
    exemplars = np.load(finished / "exemplars.npz")
    assert exemplars["image"].shape == (140, 8, 8, 1)
    assert np.bincount(exemplars["label"]).tolist() == [14] * 10
    assert abs(described["mean"][0] - exemplars["image"].mean() / 255) < 1e-2
    session = read(finished / "environment.json")["sessions"][0]
    assert {"command", "git", "versions", "cpu", "devices"} <= set(session)
    stored = config.load(finished / "config.json")
    assert (stored.model.name, stored.train.epochs) == ("lenet", 2)


def test_a_person_sees_the_classes_each_epoch_and_a_verdict(finished):
    output = (finished.parent / "output.txt").read_text()
    for said in (
        "data: placement device",
        "leaves out 12 of its 140 training examples (9 %), which do not fill a batch of 16",
        "10 classes",
        "model: lenet, 70,934 parameters",
        "epoch 1/2",
        "epoch 2/2",
        "waited ",
        "validation ",
        "train (running)",
        "Too early to see a trend after 2 epochs",
        f"everything is in {finished}",
    ):
        assert said in output, said
    assert re.search(r"^model: .*, on \d+ x .*; (allocator|glibc) ", output, re.MULTILINE)


# Running again.


def test_a_finished_run_prints_its_summary_and_changes_nothing(finished):
    before = contents(finished)
    done = run(*SMALL, *LOGGED, f"--workdir={finished}")
    assert done.code == 0
    assert done.error == ""
    assert f"{finished} is finished; nothing to do" in done.output
    assert "Too early to see a trend after 2 epochs" in done.output
    assert contents(finished) == before


def test_the_folder_alone_is_enough_to_run_it_again(finished):
    done = run(f"--workdir={finished}")
    assert done.code == 0
    assert "is finished; nothing to do" in done.output


def test_more_epochs_go_on_where_the_schedule_allows(tmp_path, monkeypatch):
    constant = (*SMALL, "--config.schedule.name=constant", f"--workdir={tmp_path}/run")
    whole = run(*constant[:-1], f"--workdir={tmp_path}/whole")
    assert run(*constant, "--config.train.epochs=1").code == 0
    first = records(tmp_path / "run")
    # Interrupted once it has begun: the summary of one epoch must not pass for that of two.
    with monkeypatch.context() as patch:
        patch.setattr("flaxcls.train.Loop.run", interrupt)
        assert run(*constant).code == 130
    done = run(*constant)
    assert done.code == whole.code == 0
    assert "resumed: step 8" in done.output
    assert records(tmp_path / "run")[:2] == first
    timeless = ["seconds", "images_per_second"]
    ends = [read(tmp_path / name / "summary.json") for name in ("run", "whole")]
    for end in ends:
        for name in timeless:
            del end[name]
    assert ends[0] == ends[1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert "is finished" in run(*constant).output


def interrupt(loop):
    raise KeyboardInterrupt


def test_keys_that_may_change_do_not_make_another_run(finished):
    done = run(
        *SMALL,
        "--config.log.every_seconds=3",
        "--config.checkpoint.keep=5",
        f"--workdir={finished}",
    )
    assert done.code == 0
    assert "is finished" in done.output


# Names of runs.


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--config=lenet"], "lenet-digits"),
        (["--config=configs/lenet.py"], "lenet-digits"),
        (["--config=fashion/like_vgg:adam"], "fashion-like_vgg-adam"),
        (["--config=configs/quickdraw/like_vgg.py:adam"], "quickdraw-like_vgg-adam"),
        (["--config=lenet:fashion_mnist"], "lenet-fashion_mnist"),
        (["--config=vgg13:tfds/mnist", "--config.data.path=x"], "vgg13-tfds-mnist"),
        (["--config=lenet", "--config.data.source=npz", "--config.data.path=x"], "lenet-npz"),
    ],
)
def test_a_run_is_named_after_config_and_data_set(flags, folder):
    assert main.parse(["flaxcls", *flags]).workdir == Path("runs", folder)


def test_a_run_without_a_name_goes_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("--config=lenet", "--config.train.batch_size=5000").sentence
    assert "train.batch_size = 5000" in said
    assert [str(path) for path in Path("runs").iterdir()] == ["runs/lenet-digits"]


# Summary.


def test_summary_needs_a_config_and_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--mode=summary", "--config=lenet")
    assert done.code == 0
    assert done.error == ""
    assert "70,934" in done.output
    assert "conv1" in done.output
    assert "FLOPs" in done.output
    assert not list(tmp_path.iterdir())


def test_summary_of_a_run(finished):
    assert (
        run("--mode=summary", f"--workdir={finished}").output
        == run("--mode=summary", "--config=lenet").output
    )


# Evaluate.


@pytest.mark.parametrize(("split", "examples"), [("train", 140), ("val", 20), ("test", 40)])
def test_any_split_can_be_evaluated(copy, split, examples):
    before = contents(copy)
    done = run("--mode=evaluate", f"--workdir={copy}", f"--config.eval.split={split}")
    assert done.code == 0
    assert done.error == ""
    assert f"{examples} examples, checkpoint of step" in done.output
    after = contents(copy)
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    report = "report" if split == "test" else f"predictions/{split}-report"
    assert changed <= {
        *(f"predictions/{split}{end}" for end in (".npz", ".csv", ".json", "-images.npz")),
        *(f"{report}{end}" for end in (".html", ".json")),
    }
    measured = read(copy / "predictions" / f"{split}.json")
    if split != "train":
        summary = read(copy / "summary.json")[split]
        assert {name: measured[name] for name in summary} == summary


def test_all_splits_can_be_evaluated_together(copy):
    assert run("--mode=evaluate", f"--workdir={copy}", "--config.eval.split=all").code == 0
    stored = np.load(copy / "predictions" / "all.npz")
    assert len(stored["label"]) == 200
    correct = {
        split: (p["logits"].argmax(1) == p["label"]).sum()
        for split in ("val", "test")
        for p in [np.load(copy / "predictions" / f"{split}.npz")]
    }
    hits = stored["logits"].argmax(1) == stored["label"]
    assert hits[140:160].sum() == correct["val"]
    assert hits[160:].sum() == correct["test"]


def test_a_given_step_can_be_evaluated_beside_what_is_there(copy):
    before = contents(copy)
    for step in (8, 16):
        done = run(
            "--mode=evaluate",
            f"--workdir={copy}",
            "--config.eval.split=val",
            f"--config.eval.step={step}",
        )
        assert f"checkpoint of step {step}" in done.output
        measured = read(copy / "predictions" / f"val-step{step}.json")
        record = next(r for r in records(copy) if r["split"] == "val" and r["step"] == step)
        assert measured["step"] == step
        assert {name: measured[name] for name in METRICS} == {n: record[n] for n in METRICS}
    assert before.items() <= contents(copy).items()
    said = run("--mode=evaluate", f"--workdir={copy}", "--config.eval.step=9").sentence
    assert "no checkpoint of step 9" in said
    assert "8, 16" in said


@pytest.fixture
def photos(tmp_path) -> Path:
    """Digits as files: a folder a class, without the class 7."""
    digits = load_digits()
    for i in range(60):
        if (label := digits.target[i]) != 7:
            (tmp_path / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[i] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / str(label) / f"{i}.png")
    return tmp_path / "photos"


def test_other_data_can_be_evaluated_where_a_class_is_missing(copy, photos):
    before = contents(copy)
    done = run(
        "--mode=evaluate",
        f"--workdir={copy}",
        "--config.data.source=image_folder",
        f"--config.data.path={photos}",
    )
    assert done.code == 0, done.error
    after = contents(copy)
    assert {name: after[name] for name in before} == before
    new = sorted(set(after) - set(before))
    assert len(new) == 6
    assert all(name.startswith("predictions/photos-") for name in new)
    assert "1 of 10 classes have no examples here; the macro means" in done.output
    rows = list(csv.DictReader((copy / next(n for n in new if n.endswith(".csv"))).open()))
    assert len(rows) == len(list(photos.rglob("*.png")))
    assert all(row["file"].split("/")[0] == row["truth"] for row in rows)
    support = read(copy / next(n for n in new if n.endswith("-all.json")))["support"]
    assert support[7] == 0
    assert sum(support) == len(rows)


def test_other_data_of_the_same_name_have_results_of_their_own(copy, photos, tmp_path):
    others = shutil.copytree(photos, tmp_path / "others" / "photos")
    next(others.rglob("*.png")).unlink()
    for path in (photos, others):
        flags = ("--config.data.source=image_folder", f"--config.data.path={path}")
        assert run("--mode=evaluate", f"--workdir={copy}", *flags).code == 0
    rows = [path.read_text().count("\n") for path in copy.glob("predictions/photos-*.csv")]
    assert len(rows) == 2
    assert rows[0] != rows[1]


@pytest.mark.parametrize("left", ["nothing", "cut off"])
def test_the_best_checkpoint_is_known_without_the_written_metrics(copy, left):
    log = copy / "checkpoints" / "16" / "log" / "metadata"
    stored = read(log)
    stored["history"][1]["accuracy"] = 1.0  # of validation after the first epoch
    log.write_text(json.dumps(stored))
    if left == "cut off":
        (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text()[:40])
    else:
        (copy / "metrics.jsonl").unlink()
    assert "checkpoint of step 8;" in run("--mode=evaluate", f"--workdir={copy}").output


def test_top_k_may_be_another_in_evaluation(copy):
    done = run("--mode=evaluate", f"--workdir={copy}", "--config.eval.top_k=2")
    assert done.code == 0, done.error
    assert "top_2" in read(copy / "predictions" / "test.json")


def test_a_checkpoint_that_training_removes_meanwhile_is_not_damaged(copy, monkeypatch):
    """As a run does that has found a better one, and whose removal takes a moment."""
    best = 8 * read(copy / "summary.json")["best_epoch"]
    other = {8: 16, 16: 8}[best]
    original, tried = Checkpoints.restore, []

    def pruned(checkpoints, step, *wanted):
        tried.append(step)
        if len(tried) == 1:
            shutil.rmtree(copy / "checkpoints" / str(best) / "state")
        elif len(tried) == 2:
            shutil.rmtree(copy / "checkpoints" / str(best))
        return original(checkpoints, step, *wanted)

    monkeypatch.setattr(Checkpoints, "restore", pruned)
    done = run("--mode=evaluate", f"--workdir={copy}")
    assert done.code == 0, done.error
    assert tried == [best, best, other]
    assert f"checkpoint of step {other};" in done.output


def test_other_data_with_an_unknown_class_are_refused(copy, photos):
    (photos / "3").rename(photos / "three")
    before = contents(copy)
    said = run(
        "--mode=evaluate",
        f"--workdir={copy}",
        "--config.data.source=image_folder",
        f"--config.data.path={photos}",
    ).sentence
    assert "class 'three'" in said
    assert "remove or rename" in said
    assert contents(copy) == before


def test_a_run_that_was_moved_is_evaluated_on_its_own_data(tmp_path, photos):
    arguments = [
        "--config=lenet:image_folder",
        "--config.train.batch_size=8",
        "--config.train.epochs=1",
        "--config.log.plots=False",
        "--config.log.tensorboard=False",
        f"--workdir={tmp_path}/there",
        f"--config.data.path={photos}",
    ]
    assert run(*arguments).code == 0
    run_folder = shutil.move(tmp_path / "there", tmp_path / "here")
    moved = shutil.move(photos, tmp_path / "moved")
    assert "does not exist" in run("--mode=evaluate", f"--workdir={run_folder}").sentence
    done = run("--mode=evaluate", f"--workdir={run_folder}", f"--config.data.path={moved}")
    assert done.code == 0
    measured = read(run_folder / "predictions" / "test.json")
    assert measured["accuracy"] == read(run_folder / "summary.json")["test"]["accuracy"]


# Flags.


def test_debug_shows_the_traceback():
    with pytest.raises(InputError, match="did you mean 'lenet'"):
        main.main(["flaxcls", "--config=lenat", "--debug"])


def test_the_command_itself_exits_with_the_code_and_one_sentence():
    def command(*flags):
        return subprocess.run(
            [sys.executable, "-m", "flaxcls.main", "--config=lenat", *flags],
            capture_output=True,
            text=True,
            cwd=Path(main.__file__).parents[1],
        )

    plain, debug = command(), command("--debug")
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1
    assert plain.stderr.startswith("flaxcls: --config: no file 'lenat'")
    assert plain.stdout == ""
    assert debug.returncode == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert "InputError: --config: no file 'lenat'" in debug.stderr


def test_help_names_modes_flags_and_configs(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["flaxcls", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for said in ("--config", "--mode", *main.MODES, "--workdir", "--debug", "vgg13"):
        assert said in shown
    keys = re.search(r"Every key of a config and its default:\s+(\S+)", shown)[1]
    assert "c.optimizer.learning_rate = " in Path(keys).read_text()


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["flaxcls", "--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"flaxcls {__version__}\n"


def several(coordinator, processes, process):
    return (
        f"--coordinator={coordinator}",
        f"--num_processes={processes}",
        f"--process_id={process}",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing; give a config file, or one that comes with flaxcls: caltech"),
        (["--mode=summary"], "--config is missing"),
        (["--mode=evaluate"], "--workdir is missing; give the folder of a run"),
        (["--workdir=nothing"], "--config is missing"),
        (["--workdir=nothing", "--mode=evaluate"], "holds no config.json, so it is no run folder"),
        (["--config=."], "'.' is a folder; give a config file"),
        (["--config="], "--config: "),
        (["--config"], "expected one argument"),
        (["--config=lenet", "train"], "unexpected argument 'train'; flags are written"),
        (["--config=lenet", "--config.train.epochs"], "Missing value for flag"),
        (["--config=lenet", "--num_processes=x"], "invalid int value: 'x'"),
        (["--config=lenet", "--coordinator=here:1"], "give all three"),
        (["--config=lenet", "--num_processes=2", "--process_id=1"], "give all three"),
        (["--config=lenet", *several("localhost", 2, 0)], "'localhost' is not HOST:PORT; give"),
        (["--config=lenet", *several("localhost:99999", 2, 0)], "is not HOST:PORT"),
        (["--config=lenet", *several("localhost:1", 2, 7)], "7 is not one of the 2 processes"),
        (["--config=lenet", *several("localhost:1", 2, -1)], "-1 is not one of the 2 processes"),
        (["--config=lenet", "--workdir=a\0b"], "--workdir: '--workdir=a\\x00b' holds a NUL"),
    ],
)
def test_an_incomplete_command_says_what_is_missing(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in run(*arguments).sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("abc", "SLURM_NTASKS: 'abc' is not a number; unset it or start with srun"),
        ("2", "start the command with srun, or unset SLURM_NTASKS to run it alone"),
    ],
)
def test_half_of_what_slurm_sets_is_named(tmp_path, monkeypatch, tasks, said):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert said in run(*SMALL, f"--workdir={tmp_path}/run").sentence
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(Path(main.__file__).parents[1] / "configs" / "lenet.py", tmp_path / "mine.py")
    command = main.parse(["flaxcls", "--config=~/mine.py:digits", "--workdir=~/run"])
    assert command.workdir == tmp_path / "run"


def test_a_folder_without_a_checkpoint_cannot_be_evaluated(tmp_path):
    stored, _ = config.resolve(main.parse(["flaxcls", "--config=lenet"]).config)
    config.save(stored, tmp_path / "config.json")
    assert (
        "holds no checkpoint of a run" in run("--mode=evaluate", f"--workdir={tmp_path}").sentence
    )


def test_the_page_takes_several_runs_and_their_own_configs(tmp_path):
    several = f"--workdir={tmp_path / 'a'},{tmp_path / 'b*'}"
    assert (
        main.parse(["flaxcls", "--mode=app", several]).config.to_dict()
        == config.default().to_dict()
    )
    done = run("--mode=app", several, "--config.seed=1")
    assert (done.code, done.output) == (2, "")
    assert "--config.seed: --mode=app takes the configs that the runs hold" in done.error
    done = run("--mode=app", several)
    assert (done.code, done.output) == (2, "")
    assert f"there is no run '{tmp_path / 'a'}'" in done.error


def test_modes_without_a_config_are_modes():
    assert {*main.ON_RUNS, *main.ON_MANY_RUNS} < set(main.MODES)
    assert "lenet" in models.list_models()
