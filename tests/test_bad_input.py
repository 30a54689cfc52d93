"""Every mistake ends in one sentence that names the thing and the remedy, and harms no run."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, compiled_once, contents, run
from full_disk import files_no_larger_than
from PIL import Image

import flaxcls
from flaxcls.errors import InputError
from flaxcls.main import main


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def _finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input") / "run"
    assert run(*SMALL, f"--workdir={folder}").code == 0
    return folder


@pytest.fixture
def finished(_finished, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run of two epochs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(_finished, "run"))


@pytest.fixture
def unfinished(finished) -> Path:
    """A run of two epochs that was stopped after the first."""
    (finished / "summary.json").unlink()
    shutil.rmtree(finished / "checkpoints" / "16")
    return finished


NUMBERS = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
THREE_CLASSES = (
    "--config=lenet",
    "--config.data.source=npz",
    "--config.data.path=numbers.npz",
    "--config.train.epochs=1",
    *(flag for flag in SMALL if "batch_size" in flag or ".log." in flag),
)


@pytest.fixture(scope="module")
def _three_classes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three_classes")
    np.savez(folder / "numbers.npz", images=NUMBERS, labels=np.arange(60) % 3)
    with contextlib.chdir(folder):
        assert run(*THREE_CLASSES, "--workdir=three").code == 0
    return folder


@pytest.fixture
def three_classes(_three_classes, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run on other data, those beside it in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(_three_classes, tmp_path, dirs_exist_ok=True)
    return Path("three")


def photos(folder="photos", classes=("cat", "dog"), count=12) -> Path:
    """Images of noise, a folder a class."""
    rng = np.random.default_rng(0)
    for name in classes:
        Path(folder, name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{i}.jpg"))
    return Path(folder)


# What is wrong with the data: each function makes a folder or a file and returns the flags.


def missing_path():
    return images("photos")


def images(folder):
    return [f"--config.data.path={folder}", "--config=lenet:image_folder"]


def empty_folder():
    Path("photos").mkdir()
    return images("photos")


def one_class():
    return images(photos(classes=("cat",)))


def no_class_folders():
    return images(photos() / "cat")


def empty_class():
    (photos() / "bird").mkdir()
    return images("photos")


def class_missing_from_training():
    photos("photos/train")
    photos("photos/val", classes=("cat", "zebra"))
    return images("photos")


def text_named_jpg():
    (photos() / "cat" / "notes.jpg").write_text("these are notes")
    return images("photos")


def truncated_jpeg():
    file = photos() / "cat" / "3.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    return images("photos")


def zero_bytes():
    (photos() / "cat" / "3.jpg").write_bytes(b"")
    return images("photos")


def arrays(**stored):
    np.savez("numbers.npz", **stored)
    return ["--config=lenet", "--config.data.source=npz", "--config.data.path=numbers.npz"]


IMAGES = np.zeros((40, 28, 28), np.uint8)
LABELS = np.arange(40) % 4


def label_below_zero():
    return arrays(images=IMAGES, labels=LABELS - 1)


def label_out_of_range():
    return arrays(images=IMAGES, labels=LABELS, class_names=np.array(["a", "b", "c"]))


def lengths_that_differ():
    return arrays(images=IMAGES, labels=LABELS[:30])


def gap_in_the_labels():
    return arrays(images=IMAGES, labels=2 * LABELS)


def no_archive():
    flags = arrays(images=IMAGES)
    Path("numbers.npz").write_text("these are not arrays")
    return flags


# What is wrong with the config.


def digits(*flags):
    return ["--config=lenet", *(f"--config.{flag}" for flag in flags)]


def config_file(text, **more):
    Path("mine.py").write_text(text)
    return ["--config=mine.py"]


MINE = "from flaxcls import config\ndef get_config():\n    c = config.for_dataset('digits')\n    "


@dataclass(frozen=True)
class Mistake:
    """What is given, and what the sentence names: the thing and the remedy."""

    flags: object
    thing: str
    remedy: str


MISTAKES = {
    "misspelt key in the file": Mistake(
        lambda: config_file(f"{MINE}c.train.bacth_size = 3\n    return c\n"),
        "mine.py, line 4: 'bacth_size' is not a key",
        "did you mean 'batch_size'?",
    ),
    "misspelt key on the command line": Mistake(
        lambda: digits("train.bacth_size=3"),
        "train.bacth_size is not a key",
        "did you mean 'batch_size'?",
    ),
    "syntax error in the config": Mistake(
        lambda: config_file(f"{MINE}c.train.epochs = (\n"), "mine.py, line 4", "correct the config"
    ),
    "config that exits": Mistake(
        lambda: config_file(f"import sys\n{MINE}sys.exit()\n"),
        "mine.py, line 5: SystemExit",
        "correct the config file",
    ),
    "no get_config": Mistake(lambda: config_file("c = 3\n"), "mine.py: there is no", "define one"),
    "no such config": Mistake(lambda: ["--config=lenat"], "'lenat'", "did you mean 'lenet'?"),
    "unknown data set": Mistake(
        lambda: ["--config=lenet:fashion_mist"], "'fashion_mist'", "did you mean 'fashion_mnist'?"
    ),
    "unknown model": Mistake(
        lambda: digits("model.name=lenat"), "model.name: no model 'lenat'", "did you mean 'lenet'?"
    ),
    "option of another model": Mistake(
        lambda: digits("model.head_width=8"), "model.head_width: lenet has no such option", "takes"
    ),
    "wrong type": Mistake(
        lambda: digits("train.epochs=many"), "--config.train.epochs: 'many'", "give a whole number"
    ),
    "missing path": Mistake(missing_path, "'photos' does not exist", "set it to the folder of"),
    "path not set": Mistake(
        lambda: ["--config=lenet:image_folder"], "data.path is not set", "--config.data.path=DIR"
    ),
    "empty folder": Mistake(empty_folder, "'photos' is empty", "it should hold images"),
    "one class": Mistake(one_class, "at least 2 classes, found 1 (cat)", "add another class"),
    "no class folders": Mistake(
        no_class_folders, "no class folders in 'photos/cat'", "put each class in its own folder"
    ),
    "empty class": Mistake(
        empty_class, "the class folder 'photos/bird'", "add some or remove the folder"
    ),
    "class missing from training": Mistake(
        class_missing_from_training, "class 'zebra' in 'photos/val'", "add training images"
    ),
    "text file named .jpg": Mistake(
        text_named_jpg, "'cat/notes.jpg' is not an image", "replace or remove them"
    ),
    "truncated JPEG": Mistake(truncated_jpeg, "'cat/3.jpg' is truncated", "replace or remove"),
    "file of zero bytes": Mistake(zero_bytes, "'cat/3.jpg' is empty (0 bytes)", "data.on_bad=skip"),
    "label below zero": Mistake(
        label_below_zero, "'numbers.npz': label -1 of example 0", "number the classes from 0"
    ),
    "label out of range": Mistake(
        label_out_of_range, "label 3 of example 3 is out of range for 3", "number labels from 0"
    ),
    "lengths that differ": Mistake(
        lengths_that_differ, "'numbers.npz' has 40 'images' but 30 'labels'", "give each image one"
    ),
    "gap in the labels": Mistake(gap_in_the_labels, "class '1' has no", "without gaps"),
    "no archive": Mistake(no_archive, "'numbers.npz' cannot be read", "write it anew"),
    "batch larger than the data": Mistake(
        lambda: digits("train.batch_size=5000"), "train.batch_size = 5000", "lower it"
    ),
    "micro-batches": Mistake(
        lambda: digits("optimizer.accumulate=7"), "optimizer.accumulate = 7", "change one of them"
    ),
    "NaN learning rate": Mistake(
        lambda: digits("optimizer.learning_rate=nan"),
        "optimizer.learning_rate: nan is out of range",
        "it must be greater than 0 and finite",
    ),
    "patience without validation": Mistake(
        lambda: digits("train.patience=3", "data.val_fraction=0"),
        "train.stop_by watches 'val/loss', but there is no validation split",
        "set data.val_fraction above 0",
    ),
    "unknown metric": Mistake(
        lambda: digits("train.best_by=val/acuracy"),
        "train.best_by: no metric is called 'val/acuracy'",
        "did you mean 'val/accuracy'?",
    ),
    "class weights of the wrong length": Mistake(
        lambda: digits("loss.class_weights=values", "loss.class_weight_values=(1.0, 2.0)"),
        "loss.class_weight_values: 2 numbers for 10 classes",
        "give one a class",
    ),
    "normalisation of the wrong length": Mistake(
        lambda: digits(
            "normalize.name=values", "normalize.mean=(0.1, 0.2)", "normalize.std=(1.0, 1.0)"
        ),
        "normalize.mean has 2 numbers",
        "give one number",
    ),
    "image too small for the model": Mistake(
        lambda: digits("model.name=vgg13", "data.image_size=16"),
        "images of 16x16 pixels are too small",
        "32x32",
    ),
    "more devices than there are": Mistake(
        lambda: digits("mesh.devices=999"), "mesh.devices: 999 asked for", "set 0 for all"
    ),
    "run folder under a file": Mistake(
        lambda: [*digits(), "--workdir=file/run"], "'file' is a file", "give another --workdir"
    ),
    "run folder that is a file": Mistake(
        lambda: [*digits(), "--workdir=file"], "'file' is a file", "give another --workdir"
    ),
    "run folder that is the data's": Mistake(
        lambda: [*images(photos()), "--workdir=photos"],
        "the run folder 'photos' is data.path 'photos'",
        "give a --workdir outside of it",
    ),
    "run folder inside the data's": Mistake(
        lambda: [*images(photos()), "--workdir=photos/run"],
        "the run folder 'photos/run' lies inside data.path 'photos'",
        "give a --workdir outside of it",
    ),
    "run folder where nothing can be written": Mistake(
        lambda: [*digits(), "--workdir=/proc/run"],
        "cannot write '/proc/run'",
        "give write permission or another --workdir",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_thing_and_the_remedy(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("I am a file")
    mistake = MISTAKES[kind]
    flags = mistake.flags()
    before = contents(tmp_path)
    workdir = [] if any(flag.startswith("--workdir") for flag in flags) else ["--workdir=run"]
    sentence = run(*workdir, *flags).sentence
    assert mistake.thing in sentence
    assert mistake.remedy in sentence
    assert contents(tmp_path) == before


def test_debug_shows_where_a_mistake_was_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="'photos' does not exist"):
        main(["flaxcls", *missing_path(), "--debug"])


def test_unreadable_files_are_left_out_on_demand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = truncated_jpeg()
    sentence = run(*flags, "--config.data.on_bad=skip", "--config.train.batch_size=5000").sentence
    assert "the training split (16 examples)" in sentence  # of 24: one bad, 2 and 5 held out


# Runs that are there already.


def test_two_configs_in_one_folder_show_what_differs(finished):
    before = contents(finished)
    flags = ["--config.optimizer.learning_rate=0.5", "--config.seed=3", f"--workdir={finished}"]
    sentence = run(*SMALL, *flags).sentence
    assert "optimizer.learning_rate: 0.001 there, 0.5 now; seed: 0 there, 3 now" in sentence
    assert "give another --workdir (such as --workdir=run-2), or the same config" in sentence
    assert contents(finished) == before
    Path("run-2").mkdir()
    assert "--workdir=run-3)" in run(*SMALL, *flags).sentence


def test_a_misspelt_name_is_no_other_config(finished):
    flags = [*SMALL, f"--workdir={finished}"]
    assert "no model 'lenat'" in run(*flags, "--config.model.name=lenat").sentence
    said = run(*flags, "--config.data.source=npz", "--config.data.path=gone.npz").sentence
    assert "data.path: 'gone.npz' does not exist" in said


def test_more_epochs_under_a_schedule_of_fixed_length_name_the_schedule(finished):
    sentence = run(*SMALL, "--config.train.epochs=3", f"--workdir={finished}").sentence
    assert "train.epochs: 2 there, 3 now, and schedule 'cosine' is laid out over it" in sentence


def test_other_data_under_the_same_config_change_nothing(three_classes):
    np.savez("numbers.npz", images=255 - NUMBERS, labels=np.arange(60) % 3)
    (three_classes / "summary.json").unlink()
    before = contents(three_classes)
    sentence = run(*THREE_CLASSES, f"--workdir={three_classes}").sentence
    assert "the data differ from those that three was trained on" in sentence
    assert "another --workdir" in sentence
    assert contents(three_classes) == before


def test_other_data_do_not_pass_for_those_of_a_finished_run(three_classes):
    before = contents(three_classes)
    np.savez("moved.npz", images=NUMBERS, labels=np.arange(60) % 3)
    np.savez("other.npz", images=255 - NUMBERS, labels=np.arange(60) % 3)
    flags = [*THREE_CLASSES, f"--workdir={three_classes}"]
    assert "is finished" in run(*flags, "--config.data.path=moved.npz").output
    sentence = run(*flags, "--config.data.path=other.npz").sentence
    assert "the data differ from those that three was trained on" in sentence
    assert "another --workdir" in sentence
    assert "'gone.npz'" in run(*flags, "--config.data.path=gone.npz").sentence
    assert contents(three_classes) == before


@pytest.mark.parametrize("kept", ["config of another model", "checkpoints of another model"])
def test_a_checkpoint_of_other_shapes_is_named_with_both(finished, three_classes, kept):
    if kept == "checkpoints of another model":
        shutil.rmtree(finished / "checkpoints")
        shutil.copytree(three_classes / "checkpoints", finished / "checkpoints")
        array, shapes = "params/head/bias", ("(3,)", "(10,)")
    else:
        stored = json.loads((finished / "config.json").read_text())
        stored["model"]["name"] = "fashion_net0"
        (finished / "config.json").write_text(json.dumps(stored))
        array, shapes = "params/dense1/bias", ("(256,)", "(4096,)")
    before = contents(finished)
    sentence = run("--mode=evaluate", f"--workdir={finished}").sentence
    assert array in sentence
    assert all(shape in sentence for shape in shapes)
    assert "use the config that the run was trained with" in sentence
    assert contents(finished) == before
    (finished / "summary.json").unlink()
    assert array in run(f"--workdir={finished}").sentence
    before.pop("summary.json")
    assert contents(finished) == before


RECORD = '{"epoch": 1, "split": "train", "step": 8, "loss": 0.5, "f1": [1, 0]}\n'


@pytest.mark.parametrize(
    ("file", "text", "mode", "said"),
    [
        ("config.json", "{", "train", "config.json: not a config that this version"),
        ("config.json", '{"train": {"bacth_size": 3}}', "train", "did you mean 'batch_size'?"),
        ("config.json", "", "evaluate", "config.json: not a config that this version"),
        ("summary.json", "{", "train", "summary.json' is not JSON"),
        ("summary.json", "[]", "train", "summary.json' holds no 'model'"),
        ("summary.json", {"val": 3}, "train", "summary.json': 'val' is 3"),
        ("summary.json", {"val": {"loss": "x"}}, "train", "'val' is {'loss': 'x'}"),
        ("summary.json", {"params": "x"}, "train", "summary.json': 'params' is 'x'"),
        ("summary.json", {"seconds": None}, "train", "summary.json': 'seconds' is None"),
        ("metrics.jsonl", b"\xff\xfe\n", "train", "metrics.jsonl', line 1 is not JSON"),
        ("metrics.jsonl", RECORD.replace("8", "null"), "train", "line 1: 'step' is None"),
        ("metrics.jsonl", RECORD.replace("0.5", '"x"'), "train", "line 1: 'loss' is 'x'"),
        ("metrics.jsonl", RECORD.replace("train", "tran"), "train", "line 1: 'split' is 'tran'"),
        ("metrics.jsonl", RECORD.replace(", 0]", ', "x"]'), "train", "line 1: 'f1' is [1, 'x']"),
        ("metrics.jsonl", "?\n", "train", "metrics.jsonl', line 1 is not JSON"),
        ("metrics.jsonl", "3\n", "train", "metrics.jsonl', line 1 is no record of metrics"),
        ("preprocess.json", "", "evaluate", "preprocess.json' is not JSON"),
        ("preprocess.json", "{}", "evaluate", "preprocess.json' holds no 'format_version'"),
        ("preprocess.json", {"class_counts": "x"}, "evaluate", "'class_counts' is 'x'"),
        ("preprocess.json", {"class_counts": [1, 2]}, "evaluate", "2 counts for 10 classes"),
        ("preprocess.json", {"mean": "abc"}, "evaluate", "preprocess.json': 'mean' is 'abc'"),
        ("preprocess.json", {"mean": ["abc"]}, "train", "preprocess.json': 'mean' is ['abc']"),
        ("preprocess.json", {"weights": "w.pth"}, "train", "'weights' is 'w.pth'"),
        ("preprocess.json", '{"format_version": 99}', "evaluate", "preprocess.json' "),
    ],
)
def test_a_damaged_file_of_a_run_is_named(finished, file, text, mode, said):
    if isinstance(text, dict):
        text = json.dumps(json.loads((finished / file).read_text()) | text)
    if file == "preprocess.json":
        (finished / "summary.json").unlink()
    (finished / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(finished)
    given = SMALL if mode == "train" else ()
    sentence = run(*given, f"--mode={mode}", f"--workdir={finished}").sentence
    assert said in sentence
    assert any(remedy in sentence for remedy in ("restore", "remove", "use the version"))
    assert contents(finished) == before


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_environment_is_named(unfinished, text):
    (unfinished / "environment.json").write_text(text)
    sentence = run(*SMALL, f"--workdir={unfinished}").sentence
    assert "environment.json' " in sentence
    assert "restore or remove it" in sentence


def harm(checkpoint: Path, how: str) -> None:
    """Removes, cuts or overwrites the arrays of a checkpoint, or its description."""
    for file in (checkpoint / "state").rglob("*"):
        if how == "description" and file.name == "_METADATA":
            file.write_bytes(file.read_bytes()[:100])
        elif file.parent.name == "d":
            content = file.read_bytes()
            if how == "removed":
                file.unlink()
            elif how == "cut":
                file.write_bytes(content[: len(content) // 2])
            elif how == "overwritten":
                file.write_bytes(bytes(len(content)))


@pytest.mark.parametrize("how", ["removed", "cut", "overwritten", "description"])
def test_a_damaged_checkpoint_is_named(finished, how):
    for step in (8, 16):
        harm(finished / "checkpoints" / str(step), how)
    before = contents(finished)
    sentence = run("--mode=evaluate", f"--workdir={finished}").sentence
    assert "checkpoints/16: the checkpoint is damaged (" in sentence
    assert "restore this folder from a copy" in sentence
    assert contents(finished) == before


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(finished):
    history = (finished / "metrics.jsonl").read_text()
    (finished / "summary.json").unlink()
    harm(finished / "checkpoints" / "16", "cut")
    done = run(*SMALL, f"--workdir={finished}")
    assert done.code == 0
    assert done.error == ""
    assert "checkpoint of step 16 is damaged" in done.output
    assert "resumed: step 8" in done.output
    again = (finished / "metrics.jsonl").read_text()
    for line, other in zip(history.splitlines(), again.splitlines(), strict=True):
        assert json.loads(line)["loss"] == json.loads(other)["loss"]
    assert run("--mode=evaluate", f"--workdir={finished}", "--config.eval.step=16").code == 0


def test_checkpoints_without_their_config_are_not_gone_on_with(unfinished):
    (unfinished / "config.json").unlink()
    before = contents(unfinished)
    sentence = run(*SMALL, f"--workdir={unfinished}").sentence
    assert "'run' holds checkpoints but no config.json" in sentence
    assert "restore that file or give another --workdir" in sentence
    assert contents(unfinished) == before


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/checkpoints").write_text("mine")
    sentence = run(*SMALL, "--workdir=run").sentence
    assert "'run/checkpoints' is a file" in sentence
    assert "move it or give another --workdir" in sentence
    assert contents(Path("run")).keys() == {"checkpoints"}


# Names that are not UTF-8.

LATIN_1 = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf_8_are_trained_on_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = photos(LATIN_1, classes=(LATIN_1, "tea"))
    for path in folder.rglob("*.jpg"):
        path.rename(path.with_name(f"{LATIN_1} {path.name}"))
    flags = (*SMALL, *images(folder), "--config.train.batch_size=8", "--config.train.epochs=1")
    done = run(*flags, "--config.log.plots=True", "--workdir=run")
    assert done.code == 0, done.error
    assert json.loads(Path("run/preprocess.json").read_text())["class_names"] == [LATIN_1, "tea"]
    for path in Path("run").rglob("*.[cj]s*"):
        path.read_text(encoding="utf-8")  # .csv, .json and .jsonl open everywhere
    assert "caf\\udce9/caf\\udce9 " in Path("run/predictions/test.csv").read_text()
    before = Path("run/predictions/test.csv").read_bytes()
    assert run("--mode=evaluate", "--workdir=run").code == 0
    assert Path("run/predictions/test.csv").read_bytes() == before
    assert "is finished" in run(*flags, "--config.log.plots=True", "--workdir=run").output


@pytest.mark.parametrize("place", ["run folder", "working directory"])
def test_a_run_folder_whose_name_is_not_utf_8_is_refused_at_once(tmp_path, monkeypatch, place):
    workdir = f"--workdir={LATIN_1 if place == 'run folder' else 'run'}"
    (tmp_path / LATIN_1).mkdir()
    monkeypatch.chdir(tmp_path if place == "run folder" else tmp_path / LATIN_1)
    sentence = run(*SMALL, workdir).sentence
    assert "the name is not UTF-8" in sentence
    assert "rename it or give another --workdir" in sentence
    assert not contents(tmp_path)


# Losses that are not finite.

DIVERGING = (
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e9",
    "--config.optimizer.momentum=0.0",
    "--config.checkpoint.every_steps=1",
)


def test_a_loss_that_turns_nan_names_the_step_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sentence = run(*SMALL, *DIVERGING, "--workdir=run").sentence
    assert "the loss is not finite at step 3 (epoch 1)" in sentence
    assert "the last good checkpoint is step 2" in sentence
    assert "with a lower optimizer.learning_rate" in sentence
    before = contents(Path("run/checkpoints"))
    assert {name.split("/")[0] for name in before} == {"1", "2"}
    # Going on from it, the same step is the first bad one.
    assert run(*SMALL, *DIVERGING, "--workdir=run").sentence == sentence
    assert contents(Path("run/checkpoints")) == before
    assert "no checkpoint of step" not in run("--mode=evaluate", "--workdir=run").error


def test_a_run_that_diverges_at_once_has_nothing_to_keep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in DIVERGING if "every_steps" not in flag]
    sentence = run(*SMALL, *flags, "--workdir=run").sentence
    assert "the loss is not finite at step 3 (epoch 1); nothing was saved yet" in sentence


# Disks, devices and other processes.


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of its own, which root may mount; skips where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, leaving: int) -> None:
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leaving)))


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(unfinished, tmp_path):
    with small_disk(tmp_path / "disk", 8_000_000):
        folder = Path(shutil.copytree(unfinished, tmp_path / "disk" / "run"))
        saved = contents(folder / "checkpoints")
        fill(tmp_path / "disk", leaving=400_000)
        sentence = run(*SMALL, f"--workdir={folder}").sentence
        assert "No space left on device" in sentence
        assert "then run the same command to resume" in sentence
        assert saved.items() <= contents(folder / "checkpoints").items()
        (tmp_path / "disk" / "filler").unlink()
        done = run(*SMALL, f"--workdir={folder}")
        assert done.code == 0, done.error
        assert "resumed: step 8" in done.output
        assert done.error == ""


def test_a_disk_that_is_full_from_the_start_is_named(unfinished, tmp_path):
    with small_disk(tmp_path / "disk", 8_000_000):
        folder = Path(shutil.copytree(unfinished, tmp_path / "disk" / "run"))
        before = contents(folder)
        fill(tmp_path / "disk", leaving=0)
        sentence = run(*SMALL, f"--workdir={folder}").sentence
        assert os.strerror(errno.ENOSPC) in sentence
        assert "run the same command again" in sentence
        assert contents(folder) == before


def test_files_that_may_not_grow_stop_the_run_in_one_sentence(unfinished):
    saved = contents(unfinished / "checkpoints")
    with files_no_larger_than(50_000):
        sentence = run(*SMALL, f"--workdir={unfinished}").sentence
    assert os.strerror(errno.EFBIG) in sentence
    assert saved.items() <= contents(unfinished / "checkpoints").items()
    assert run(*SMALL, f"--workdir={unfinished}").code == 0


def test_a_full_disk_while_a_finished_run_is_extended_keeps_its_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = (*SMALL, "--config.schedule.name=constant", "--config.train.epochs=1")
    assert run(*constant, "--workdir=run").code == 0
    summary = Path("run/summary.json").read_text()
    with small_disk(tmp_path / "disk", 8_000_000):
        folder = Path(shutil.copytree("run", tmp_path / "disk" / "run"))
        fill(tmp_path / "disk", leaving=0)
        assert run(*constant, "--config.train.epochs=2", f"--workdir={folder}").sentence
        kept = [path.read_text() for path in folder.glob("summary*.json")]
        assert kept == [summary]
        (tmp_path / "disk" / "filler").unlink()
        done = run(*constant, "--config.train.epochs=2", f"--workdir={folder}")
        assert done.code == 0, done.error
        assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
        assert len(list(folder.glob("summary*.json"))) == 1


def command(*flags, **environment):
    """Starts the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flaxcls.main", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(flaxcls.__file__).parents[1]),
            **environment,
        },
    )


def test_a_batch_that_devices_cannot_share_is_named(tmp_path):
    process = command(
        *digits("train.batch_size=20"),
        f"--workdir={tmp_path}/run",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert error == (
        "flaxcls: train.batch_size: 20 cannot be shared by 8 devices; set it to a multiple of 8\n"
    )
    assert output == ""


HUGE = """
from flax import linen as nn
from flaxcls import config, models

class Huge(nn.Module):
    num_classes: int
    dtype: object = None
    param_dtype: object = None

    @nn.compact
    def __call__(self, images, train=False):
        four_terabytes = self.param("bias", nn.initializers.zeros, (2**40,))
        logits = nn.Dense(self.num_classes)(images.reshape(len(images), -1))
        return logits + four_terabytes[: self.num_classes]

models.register("huge", Huge)

def get_config():
    c = config.for_dataset("digits")
    c.model.name = "huge"
    return c
"""


def test_too_little_memory_is_one_sentence(tmp_path):
    (tmp_path / "huge.py").write_text(HUGE)
    process = command(f"--config={tmp_path}/huge.py", f"--workdir={tmp_path}/run")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("flaxcls: there is too little memory; lower train.batch_size, ")
    assert error.count("\n") == 1


def test_a_batch_of_evaluation_is_no_larger_than_what_is_evaluated(tmp_path):
    done = run(*SMALL, "--config.eval.batch_size=1000000000", f"--workdir={tmp_path}/run")
    assert done.code == 0, done.error


def test_nothing_but_the_sentence_is_printed_for_a_damaged_checkpoint(finished):
    for step in (8, 16):
        harm(finished / "checkpoints" / str(step), "cut")
    process = command("--mode=evaluate", f"--workdir={finished}")
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("flaxcls: ")
    assert error.count("\n") == 1
    assert output == ""


HOLD = """
import sys, time
from flaxcls.runlog import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_folder_in_use_names_the_other_process(unfinished):
    before = contents(unfinished)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(unfinished)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(flaxcls.__file__).parents[1])},
    )
    try:
        assert other.stdout.readline() == "held\n"
        sentence = run(*SMALL, f"--workdir={unfinished}").sentence
        assert f"is in use by process {other.pid} on " in sentence
        assert "wait until it ends, stop it, or give another --workdir" in sentence
        assert contents(unfinished) == before
    finally:
        other.kill()
        other.wait()
    assert run(*SMALL, f"--workdir={unfinished}").code == 0
