"""A run folder alone gives the model that `--mode=evaluate` measures, and its predictions."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_line import SMALL, compiled_once, run
from flax.traverse_util import flatten_dict
from PIL import Image

from flaxcls import config as config_module
from flaxcls.analysis.best_checkpoint import restore
from flaxcls.checkpoint import Checkpoints
from flaxcls.deploy.predictor import Predictor
from flaxcls.deploy.trained import load_run
from flaxcls.errors import InputError
from flaxcls.evaluate import Evaluator
from flaxcls.experiment import for_evaluation, read_dataset
from flaxcls.results import read_description

HALVES = ("--config.data.parents=('[0-4]=low', '[5-9]=high')", "--config.loss.name=hierarchical")
KINDS = {
    "plain": (),
    "ema": ("--config.optimizer.ema_decay=0.8",),
    "batch_norm": ("--config.model.name=fashion_net1",),
    "hierarchical": ("--config.model.name=hierarchical", "--config.model.trunk=lenet", *HALVES),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a finished run of a kind, once."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("trained") / kind
            done = run(*SMALL, *KINDS[kind], f"--workdir={made[kind]}")
            assert done.code == 0, done.error
        return made[kind]

    return make


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained("plain"), tmp_path / "run"))


@pytest.fixture
def unfinished(finished) -> Path:
    """A run of two epochs that was stopped in the second: of its checkpoints the first is left."""
    (finished / "summary.json").unlink()
    (finished / "weights.safetensors").unlink()
    shutil.rmtree(finished / "checkpoints" / "16")
    return finished


def evaluated(folder: Path, step: int = 0) -> np.ndarray:
    """The logits of the test images by a checkpoint, read and evaluated as `--mode=evaluate`
    does."""
    config = config_module.load(folder / "config.json")
    config.eval.step, config.eval.split = step, "test"
    resolved, _ = config_module.resolve(config)
    experiment = for_evaluation(resolved, read_description(folder), other_data=False)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        variables = restore(checkpoints, experiment).state.variables()
    return Evaluator(experiment)(variables, "test", keep_logits=True).logits


def predicted(folder: Path, split: str, **settings):
    """What the run folder alone says of the images of a split."""
    images = read_dataset(config_module.load(folder / "config.json")).splits[split].images
    trained = load_run(folder, **settings)
    return trained, Predictor(trained, batch_size=16)(images)


@pytest.mark.parametrize("kind", KINDS)
def test_the_predictor_says_what_evaluation_saved(trained, kind):
    folder = trained(kind)
    with np.load(folder / "predictions" / "test.npz") as file:
        saved = dict(file)
    model, said = predicted(folder, "test")
    assert model.source == "weights.safetensors"
    np.testing.assert_allclose(said.logits, saved["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said.probabilities, saved["probabilities"], atol=1e-6)
    assert saved["logits"].std() > 0.01, "all logits are alike"
    if kind == "hierarchical":
        assert model.parent_names == ("high", "low")
        np.testing.assert_allclose(said.parent_logits, saved["parent_logits"], rtol=1e-4, atol=1e-5)
    else:
        assert said.parent_logits is None


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_best_checkpoint_are_the_same(trained, tmp_path, kind):
    """Both ways of reading, of the averages of parameters and of BatchNorm's statistics too."""
    finished = load_run(trained(kind))
    folder = shutil.copytree(trained(kind), tmp_path / "run")
    (folder / "weights.safetensors").unlink()
    from_checkpoint = load_run(folder)
    assert from_checkpoint.source.startswith("checkpoint of step ")
    a, b = (flatten_dict(one.variables) for one in (finished, from_checkpoint))
    assert a.keys() == b.keys()
    assert any(path[0] == "batch_stats" for path in a) == (kind == "batch_norm")
    for path, array in a.items():
        np.testing.assert_array_equal(array, b[path], err_msg=str(path))


def test_an_unfinished_run_gives_its_best_checkpoint(unfinished):
    logits = evaluated(unfinished)
    model, said = predicted(unfinished, "test")
    assert model.source == "checkpoint of step 8"
    np.testing.assert_allclose(said.logits, logits, rtol=1e-4, atol=1e-5)


def test_the_step_that_eval_step_names_is_read(finished):
    logits = evaluated(finished, step=8)
    config = config_module.load(finished / "config.json")
    config.eval.step = 8
    model, said = predicted(finished, "test", config=config_module.resolve(config)[0])
    assert model.source == "checkpoint of step 8"
    np.testing.assert_allclose(said.logits, logits, rtol=1e-4, atol=1e-5)
    _, best = predicted(finished, "test")
    assert not np.allclose(said.logits, best.logits, atol=1e-3)


def test_a_step_that_is_not_there_is_named(finished):
    config = config_module.load(finished / "config.json")
    config.eval.step = 9
    with pytest.raises(InputError, match=r"eval\.step.* no checkpoint of step 9; choose one of"):
        load_run(finished, config_module.resolve(config)[0])


def test_a_moved_run_needs_neither_its_data_nor_its_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(level - 40, level + 40, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    kept = tmp_path / "kept.png"
    shutil.copy(tmp_path / "photos" / "dark" / "3.png", kept)
    source = ("--config.data.source=image_folder", f"--config.data.path={tmp_path / 'photos'}")
    done = run(*SMALL, *source, "--config.data.test_fraction=0", f"--workdir={tmp_path / 'here'}")
    assert done.code == 0, done.error
    before = Predictor.from_run(tmp_path / "here")([kept])
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "far" / "there")
    shutil.rmtree(tmp_path / "photos")
    shutil.rmtree(tmp_path / "far" / "there" / "checkpoints")
    predictor = Predictor.from_run(str(tmp_path / "far" / "there"))
    assert predictor.trained.class_names == ("dark", "light")
    np.testing.assert_array_equal(predictor([kept]).logits, before.logits)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: _cut(run / "weights.safetensors"), "weights.safetensors"),
        (lambda run: _without_a_tensor(run / "weights.safetensors"), "weights.safetensors"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
        (lambda run: (run / "preprocess.json").write_text("[]"), "preprocess.json"),
        (lambda run: (run / "preprocess.json").unlink(), "holds no trained run"),
        (lambda run: _edit(run / "preprocess.json", format_version=99), "has format 99"),
        (lambda run: _edit(run / "preprocess.json", class_names=["a"], class_counts=[1]), "shape"),
    ],
)
def test_damage_is_named(finished, damage, sentence):
    damage(finished)
    with pytest.raises(InputError, match=sentence) as caught:
        load_run(finished)
    assert "\n" not in str(caught.value)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_a_tensor(path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    del tensors[sorted(tensors)[0]]
    path.write_bytes(safetensors.numpy.save(tensors))


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_checkpoints_are_named(unfinished):
    for file in (unfinished / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="checkpoints"):
        load_run(unfinished)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no trained run"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="holds no trained run"):
        load_run(tmp_path / "nothing")


def test_a_run_without_weights_and_checkpoints_is_named(unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(InputError, match="neither a finished run's weights"):
        load_run(unfinished)


def test_another_config_is_refused(finished):
    config = config_module.load(finished / "config.json")
    config.data.image_size = 32
    with pytest.raises(InputError, match=r"another config .*data\.image_size"):
        load_run(finished, config_module.resolve(config)[0])


def test_the_predictor_takes_batches_of_any_size(trained):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
    model = load_run(trained("plain"))
    together = Predictor(model, batch_size=16)(images)
    for batch_size in (1, 3, 7):
        found = Predictor(model, batch_size=batch_size)(images)
        np.testing.assert_allclose(found.logits, together.logits, rtol=1e-5, atol=1e-6)
    classes, probabilities = together.top_k(3)
    order = np.argsort(-together.probabilities, axis=1)[:, :3]
    np.testing.assert_array_equal(classes, order)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    np.testing.assert_allclose(together.probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 0, 8, 1), np.uint8),
        [],
        ["nothing.png"],
        [b"no image"],
        "photo.png",
    ],
)
def test_the_predictor_refuses_what_are_no_images(trained, images):
    with pytest.raises(InputError):
        Predictor.from_run(trained("plain"))(images)
    with pytest.raises(InputError, match="batch_size"):
        Predictor.from_run(trained("plain"), batch_size=0)


def test_the_predictor_lets_go_of_the_copy_on_the_host(trained):
    predictor = Predictor.from_run(trained("plain"))
    leaves = jax.tree.leaves(predictor.trained.variables)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
