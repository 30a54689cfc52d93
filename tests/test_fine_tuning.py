"""Runs that start from weights, freeze a part of them, or learn classes with their parents."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_line import SMALL, compiled_once, run
from flax import linen as nn
from flax.traverse_util import flatten_dict
from small_experiments import lenet
from small_hub import COMMITS, Hub, serve

from flaxcls import models, pretrained
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.experiment import for_training
from flaxcls.train import Loop, StopRequest

HALVES = ("--config.data.parents=('[0-4]=low', '[5-9]=high')", "--config.loss.name=hierarchical")
HIERARCHICAL = ("--config.model.name=hierarchical", "--config.model.trunk=lenet", *HALVES)


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of lenet on all ten digits."""
    folder = tmp_path_factory.mktemp("source") / "run"
    done = run(*SMALL, f"--workdir={folder}", "--config.normalize.name=imagenet")
    assert done.code == 0, done.error
    return folder


class Nothing:
    """Stands for files and progress, whatever they are asked."""

    def __getattr__(self, name):
        return lambda *args, **options: None


def weights(folder):
    return safetensors.numpy.load_file(folder / "weights.safetensors")


def test_a_run_starts_from_another_with_other_classes_and_keeps_what_is_frozen(source):
    """Only the head is trained, for three classes; the normalisation is that of the weights."""
    arguments = (
        *SMALL,
        "--config.data.classes=('3', '5', '7')",
        f"--config.model.init_from={source}",
        "--config.model.trainable=('head/*',)",
        "--workdir=tuned",
    )
    done = run(*arguments)
    assert done.code == 0, done.error
    assert "weights: 6 arrays from" in done.output
    assert "left at initialisation: params/head/" in done.output
    before, after = weights(source), weights(Path("tuned"))
    for name in after:
        if name.startswith("params/head/"):
            assert after[name].shape[-1] == 3
        else:
            np.testing.assert_array_equal(after[name], before[name])
    described = [json.loads((f / "preprocess.json").read_text()) for f in (source, Path("tuned"))]
    assert described[0]["mean"] == described[1]["mean"]
    assert described[1]["mean"] == pytest.approx([0.449])


def test_a_resumed_run_needs_its_weights_no_more(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    arguments = [*SMALL, f"--config.model.init_from={copy}", "--workdir=tuned"]
    arguments.append("--config.schedule.name=constant")
    assert run(*arguments).code == 0
    shutil.rmtree(copy)
    done = run(*arguments, "--config.train.epochs=3")
    assert done.code == 0, done.error
    assert "resumed: step 16" in done.output


def weights_of(folder):
    """What a run says that it started from."""
    return json.loads((folder / "preprocess.json").read_text())["weights"]


def forget_training(folder):
    """Leaves what a run that was killed before its first checkpoint leaves."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints")


def test_a_run_keeps_to_the_commit_of_the_hub_that_it_began_with(source, tmp_path, monkeypatch):
    """Also where it is killed before its first checkpoint, or resumed without the hub."""
    content = (source / "weights.safetensors").read_bytes()
    config = json.dumps({"mean": [0.25], "std": [0.5]}).encode()
    first = {"model.safetensors": content, "config.json": config}
    hub, tuned = Hub({COMMITS[0]: first, COMMITS[1]: {}}), Path("tuned")
    arguments = [*SMALL, "--config.model.pretrained=hf-hub:owner/name", f"--workdir={tuned}"]
    arguments.append("--config.schedule.name=constant")
    with serve(hub, monkeypatch, tmp_path / "cache"):
        done = run(*arguments)
        assert done.code == 0, done.error
        assert hub.asked.count(("GET", "main", "model.safetensors")) == 1
        assert f"weights: 8 arrays from hf-hub:owner/name (commit {COMMITS[0][:12]}" in done.output
        began = {"source": "hf-hub:owner/name", "commit": COMMITS[0], "sha256": None}
        assert weights_of(tuned) == began
        trained = weights(tuned)

        hub.asked.clear()
        forget_training(tuned)
        done = run(*arguments)
        assert done.code == 0, done.error
        assert hub.asked == []
        assert weights_of(tuned) == began
        for name, array in weights(tuned).items():
            np.testing.assert_array_equal(array, trained[name])

        shutil.rmtree(tmp_path / "cache")
        done = run(*arguments, "--config.train.epochs=3")
        assert done.code == 0, done.error
        assert hub.asked == []
        assert weights_of(tuned) == began


def test_a_run_knows_the_file_that_it_began_with(source, tmp_path):
    file, tuned = tmp_path / "w.safetensors", Path("tuned")
    shutil.copy(source / "weights.safetensors", file)
    arguments = (*SMALL, f"--config.model.pretrained={file}", f"--workdir={tuned}")
    assert run(*arguments).code == 0
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights_of(tuned) == {"source": str(file), "commit": None, "sha256": digest}
    assert weights_of(source) is None

    forget_training(tuned)
    shutil.copy(tuned / "weights.safetensors", file)
    done = run(*arguments)
    assert done.code == 2
    assert f"flaxcls: '{file}' has SHA-256 " in done.error
    assert f"the run began with SHA-256 {digest[:12]}; restore those weights" in done.error
    assert weights_of(tuned)["sha256"] == digest


def test_a_run_that_does_not_say_what_it_began_with_is_resumed(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "run")
    described = json.loads((folder / "preprocess.json").read_text())
    del described["weights"]
    (folder / "preprocess.json").write_text(json.dumps(described))
    (folder / "summary.json").unlink()
    done = run(*SMALL, f"--workdir={folder}", "--config.normalize.name=imagenet")
    assert done.code == 0, done.error
    assert weights_of(folder) is None


def test_an_explicit_normalisation_wins_over_the_weights(source):
    keys = {"model__init_from": str(source), "data__image_size": 28}
    assert for_training(lenet(**keys)).recipe.preprocess.mean == pytest.approx((0.449,), abs=1e-3)
    explicit = for_training(lenet(**keys, normalize__name="values", normalize__mean=(0.2,),
                                  normalize__std=(0.3,)))  # fmt: skip
    assert explicit.recipe.preprocess.mean == (0.2,)
    own = for_training(lenet(**keys, normalize__name="dataset"))
    assert own.recipe.preprocess.mean[0] not in (0.2, 0.449)


class Own(nn.Module):
    """As a user writes it: no layer has a name."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(nn.relu(nn.Conv(3, (3, 3))(images)).mean((1, 2)))


def test_a_users_own_model_starts_from_a_run_with_other_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(models.registry, "own", None)  # taken out again after the test
    models.register("own", Own)
    params = Own(10).init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    pretrained.save(tmp_path / "weights.safetensors", Own(10), jax.device_get(params))
    keys = {"model__name": "own", "model__init_from": str(tmp_path)}
    experiment = for_training(lenet(**keys, data__classes=("3", "5", "7")))
    assert experiment.num_classes == 3
    assert experiment.weights.source.endswith("weights.safetensors")


def test_weights_in_the_state_are_those_of_the_file_also_in_the_average(source):
    config = lenet(
        model__init_from=str(source), data__image_size=28, optimizer__ema_decay=0.9, eval__top_k=1
    )
    with Checkpoints(Path("checkpoints"), keep=1) as checkpoints:
        loop = Loop(for_training(config), checkpoints, Nothing(), Nothing(), StopRequest())
        loop.restore_or_initialise()
    expected = weights(source)
    for params in (loop.state.params, loop.state.ema["params"]):
        for path, leaf in flatten_dict(params, sep="/").items():
            np.testing.assert_array_equal(leaf, expected[f"params/{path}"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model__init_from": "nowhere"}, "'nowhere' is no folder of a finished run"),
        ({"model__pretrained": "w.safetensors"}, "there is no file 'w.safetensors'"),
        ({"model__frozen": ("trunc/*",)}, "model.frozen: no parameter matches 'trunc/"),
        ({"optimizer__rate_factors": ("head/*",)}, "'head/.*' is no rule; write PATTERN=FACTOR"),
        ({"optimizer__rate_factors": ("head/*=-1",)}, "is no rule; write PATTERN=FACTOR"),
        ({"loss__name": "hierarchical", "data__parents": (".=a",)}, "do not go together"),
        ({"model__name": "hierarchical", "model__trunk": "lenet"}, "do not go together"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(keys, message):
    with pytest.raises(InputError, match=message):
        for_training(lenet(**keys))


def test_weights_and_init_from_exclude_each_other():
    with pytest.raises(InputError, match=r"model.pretrained and model.init_from are both set"):
        lenet(model__init_from="a", model__pretrained="b")


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_hierarchical_run_counts_parents_and_saves_both_predictions(placement):
    arguments = (*SMALL, *HIERARCHICAL, f"--config.data.placement={placement}")
    done = run(*arguments, "--workdir=pets")
    assert done.code == 0, done.error
    folder = Path("pets")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        parts = [record[name] for name in ("child", "parent", "kl")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 <= record["parent_accuracy"] <= 1
    summary = json.loads((folder / "summary.json").read_text())
    with np.load(folder / "predictions" / "test.npz") as file:
        arrays = dict(file)
    right = arrays["parent_logits"].argmax(1) == arrays["parent_label"]
    assert summary["test"]["parent_accuracy"] == right.mean()
    np.testing.assert_array_equal(arrays["parent_names"], ["high", "low"])
    np.testing.assert_array_equal(arrays["parent_label"], arrays["label"] < 5)
    guess, wrong = arrays["logits"].argmax(1), arrays["logits"].argmax(1) != arrays["label"]
    mild = (guess < 5) == (arrays["label"] < 5)
    assert summary["test"]["errors_within_parent"] == pytest.approx(mild[wrong].mean())
    with open(folder / "predictions" / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["parent"] == ("low" if row["truth"] < "5" else "high") for row in rows)

    done = run("--mode=evaluate", "--workdir=pets", "--config.eval.split=val")
    assert done.code == 0, done.error
    evaluated = json.loads((folder / "predictions" / "val.json").read_text())
    assert evaluated["parent_accuracy"] == summary["val"]["parent_accuracy"]


def test_a_frozen_run_can_be_evaluated(source):
    """The optimizer's state has another shape than without freezing, and the checkpoint fits it."""
    arguments = (
        *SMALL,
        f"--config.model.init_from={source}",
        "--config.model.frozen=('trunk/*',)",
        "--config.optimizer.name=adam",
        "--config.optimizer.rate_factors=('head/*=0.1',)",
        "--workdir=frozen",
    )
    assert run(*arguments).code == 0
    done = run("--mode=evaluate", "--workdir=frozen")
    assert done.code == 0, done.error
    before, after = weights(source), weights(Path("frozen"))
    same = {name for name in after if np.array_equal(before[name], after[name])}
    assert same == {name for name in after if "/trunk/" in name}
