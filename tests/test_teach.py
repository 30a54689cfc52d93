"""A run is taught a class from a few photos; what it knew stays, and it is a run like any other."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import compiled_once, contents, run
from flax.traverse_util import flatten_dict
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import accuracy_score

from flaxcls import models
from flaxcls.data.load import load_dataset
from flaxcls.deploy import head as head_module
from flaxcls.deploy import teach as teach_module
from flaxcls.deploy.head import Layer, Seen, head_logits
from flaxcls.deploy.predictor import Predictor
from flaxcls.deploy.teach import default_folder, save_taught, teach, validation
from flaxcls.deploy.trained import load_run
from flaxcls.errors import InputError
from flaxcls.pretrained.heads import class_layers

OLD = tuple("01234568")  # 7 and 9 are held back
HELD = "7"
COMMON = (
    "--config=lenet",
    f"--config.data.classes={OLD!r}",
    "--config.data.max_per_class=100",
    "--config.train.batch_size=32",
    "--config.train.epochs=5",
    "--config.optimizer.learning_rate=0.003",
    "--config.log.plots=False",
    "--config.log.tensorboard=False",
)
HALVES = ("--config.data.parents=('[0-4]=low', '[5-9]=high')", "--config.loss.name=hierarchical")
RUNS = {
    "flat": (),
    "ema": ("--config.optimizer.ema_decay=0.9",),
    "product": (
        "--config.model.name=residual_cam",
        "--config.model.trunk=lenet",
        "--config.model.head_width=32",
        "--config.model.pool_size=4",
        "--config.train.epochs=20",
    ),
    "hierarchical": (
        "--config.model.name=hierarchical",
        "--config.model.trunk=lenet",
        "--config.train.epochs=12",
        *HALVES,
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs, which share what they compile."""
    folder = tmp_path_factory.mktemp("teach")
    with compiled_once(folder / "compiled"):
        yield folder


@pytest.fixture(scope="module")
def trained(place):
    """Name of a run -> its folder; trained when it is first asked for."""

    def get(name):
        folder = place / name
        if not (folder / "summary.json").exists():
            done = run(*COMMON, *RUNS[name], f"--workdir={folder}")
            assert done.code == 0, done.error
        return folder

    return get


@pytest.fixture(scope="module")
def digits():
    """All images uint8 (N, 8, 8, 1) and their digits."""
    split = load_dataset("digits").splits["train"]
    return split.images, split.labels


@pytest.fixture(scope="module")
def sevens(digits):
    images, labels = digits
    return images[labels == int(HELD)]


def as_photos(model, images):
    """Images (N, 8, 8, 1) as the model sees a file that holds them."""
    predictor = Predictor(model)
    return np.stack([predictor.fit(image) for image in images])


def write_photos(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        larger = Image.fromarray(image[:, :, 0]).resize((56, 56), Image.Resampling.BILINEAR)
        larger.save(folder / f"{i}.png")
    return folder


def held_out(folder):
    """Images and labels of the run's own test split."""
    config = load_run(folder).config
    split = load_dataset(
        "digits",
        classes=OLD,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        max_per_class=config.data.max_per_class,
        seed=config.seed,
    ).splits["test"]
    return split.images, split.labels


@pytest.fixture(scope="module")
def imprinted(trained, sevens):
    model = load_run(trained("flat"))
    return model, teach(model, as_photos(model, sevens[:10]), HELD)


def test_imprinting_leaves_every_old_parameter_as_it_was_bit_for_bit(imprinted):
    model, taught = imprinted
    before, after = flatten_dict(model.variables), flatten_dict(taught.variables)
    assert before.keys() == after.keys()
    grown = {path for path in before if before[path].shape != after[path].shape}
    assert grown == {("params", "head", "kernel"), ("params", "head", "bias")}
    for path, array in before.items():
        old = after[path][..., : len(OLD)] if path in grown else after[path]
        assert old.dtype == array.dtype
        np.testing.assert_array_equal(old.view(np.uint8), np.asarray(array).view(np.uint8))


def test_imprinting_changes_no_old_logit(imprinted, trained, sevens):
    model, taught = imprinted
    images = np.concatenate([held_out(trained("flat"))[0], sevens])
    photos = as_photos(model, images)
    before, after = Predictor(model)(photos), Predictor(taught.trained)(photos)
    assert after.logits.shape == (len(photos), len(OLD) + 1)
    np.testing.assert_allclose(after.logits[:, : len(OLD)], before.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["imprint", "finetune"])
def test_the_new_class_is_recognised_at_little_cost_to_the_old(method, trained, sevens):
    folder = trained("flat")
    model = load_run(folder)
    taught = teach(model, as_photos(model, sevens[:10]), HELD, method=method)
    assert taught.class_names == (*OLD, HELD)
    if method == "imprint":
        assert taught.exemplars.cost <= 3
    images, labels = held_out(folder)
    old, new = as_photos(model, images), as_photos(model, sevens[10:])
    before = accuracy_score(labels, Predictor(model)(old).logits.argmax(axis=1))
    predictor = Predictor(taught.trained)
    after = accuracy_score(labels, predictor(old).logits.argmax(axis=1))
    recall = (predictor(new).logits.argmax(axis=1) == len(OLD)).mean()
    assert before > 0.9, "the run is too weak to lose anything"
    assert before - after <= 0.03
    assert recall > (0.6 if method == "imprint" else 0.75)


def test_the_bias_takes_no_more_exemplars_than_it_may():
    """A class that lies on an old one's examples is not given them."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    features = (6 * np.eye(3, 8)[labels] + rng.normal(size=(300, 8))).astype(np.float32)
    layer = Layer(6 * np.eye(8, 3, dtype=np.float32), np.zeros(3, np.float32))
    shown = (6 * np.eye(1, 8) + rng.normal(size=(10, 8))).astype(np.float32)  # like class 0
    old, new = (Seen((x,), head_logits([layer], [x])) for x in (features, shown))
    before = (old.logits.argmax(axis=1) == labels).mean()
    for cost in (0.0, 0.02, 0.1):
        grown = head_module.imprint(layer, old, labels, new, cost)
        after = (head_logits([grown], [features]).argmax(axis=1) == labels).mean()
        assert before - after <= cost + 1e-9
    assert after < before, "a tenth of them may be lost, and the class is just there"


@pytest.mark.parametrize("width", [5, 200])
def test_a_prototype_is_divided_by_scikit_learns_shrunk_covariance(width):
    """With fewer features than exemplars, and with more."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 15)
    features = rng.normal(size=(60, width)) @ rng.normal(size=(width, width)) + labels[:, None]
    features -= features.mean(axis=0)
    reference = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=head_module.SHRINKAGE, store_covariance=True
    ).fit(features, labels)
    mean = rng.normal(size=width)
    expected = np.linalg.solve(reference.covariance_, mean)
    (found,) = head_module._directions(features, labels, mean[None])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", models.list_models())
def test_the_layers_of_every_models_classes_are_found(name):
    options = {"trunk": "lenet"} if "trunk" in models.model_options(name) else {}
    model = models.create_model(name, 4, **options)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    found = class_layers(model, flatten_dict(shapes), (64, 64, 3))
    product = ("cam_head",) if name == "fashion_net2" or "residual_cam" in name else None
    assert (product in found) == (product is not None)
    assert len(found) == (1 if product is None else 2)
    assert all(path[-1] in ("head", "cam_head") for path in found)


def test_a_product_is_taught_by_finetuning_both_factors_alone(trained, sevens):
    model = load_run(trained("product"))
    photos = as_photos(model, sevens)
    with pytest.raises(InputError, match=r"residual_cam are the product of two .*finetune"):
        teach(model, photos[:10], HELD)
    taught = teach(model, photos[:10], HELD, method="finetune")
    before, after = flatten_dict(model.variables), flatten_dict(taught.variables)
    changed = {path[1:-1] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {("cam_head",), ("classifier", "head")}
    recall = (Predictor(taught.trained)(photos[10:]).logits.argmax(axis=1) == len(OLD)).mean()
    assert recall > 0.5
    assert taught.exemplars.cost <= 5


def test_progress_goes_from_0_to_1_and_says_what_is_done(trained, sevens):
    model = load_run(trained("flat"))
    for method in ("imprint", "finetune"):
        calls = []
        photos = as_photos(model, sevens[:5])
        teach(model, photos, HELD, method=method, progress=lambda *call: calls.append(call))  # noqa: B023
        shares = [share for share, _ in calls]
        assert shares == sorted(shares)
        assert shares[0] < 0.3
        assert shares[-1] == 1
        assert len(shares) > 5
        assert all(doing for _, doing in calls)


def test_validation_before_is_what_the_run_has_saved(imprinted, trained):
    model, taught = imprinted
    measured = validation(model, taught)
    with np.load(trained("flat") / "predictions" / "val.npz") as saved:
        hits = saved["logits"].argmax(axis=1) == saved["label"]
        labels = saved["label"]
    assert measured.images == len(hits)
    assert measured.before == pytest.approx(hits.mean(), abs=1e-12)
    assert measured.class_before[3] == pytest.approx(hits[labels == 3].mean(), abs=1e-12)
    assert measured.cost <= 3


def saved(trained, sevens, folder, name="flat", **options):
    """A run that was taught the held-back class, made by the Python interface."""
    model = load_run(trained(name))
    photos = as_photos(model, sevens[:10])
    taught = teach(model, photos, HELD, **options)
    return save_taught(model, taught, folder, photos), taught, model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flat", {}),
        ("ema", {"method": "finetune"}),
        ("product", {"method": "finetune"}),
        ("hierarchical", {"parent": "high", "method": "finetune"}),
    ],
)
def test_a_taught_run_evaluates_on_its_own_data_and_on_others(
    name, options, trained, sevens, digits, tmp_path
):
    folder, taught, _ = saved(trained, sevens, tmp_path / "new", name, **options)
    again = load_run(folder)
    assert again.class_names == (*OLD, HELD)
    assert again.class_parents == taught.trained.class_parents
    ours, theirs = flatten_dict(again.variables), flatten_dict(taught.variables)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)

    done = run("--mode=evaluate", f"--workdir={folder}")
    assert done.code == 0, done.error
    images, labels = held_out(trained(name))
    with np.load(folder / "predictions" / "test.npz") as file:
        assert file["logits"].shape == (len(labels), len(OLD) + 1)
        np.testing.assert_array_equal(file["label"], labels)
        found = Predictor(again)(images).logits
        np.testing.assert_allclose(file["logits"], found, atol=1e-4)

    everything, of = digits
    for digit in (0, 1, int(HELD)):
        write_photos(tmp_path / "others" / str(digit), everything[of == digit][-20:])
    done = run(
        "--mode=evaluate",
        f"--workdir={folder}",
        "--config.data.source=image_folder",
        f"--config.data.path={tmp_path / 'others'}",
    )
    assert done.code == 0, done.error
    (found,) = (folder / "predictions").glob("others-*-all.npz")
    with np.load(found) as file:
        is_new = file["label"] == len(OLD)
        assert is_new.sum() == 20
        assert (file["logits"].argmax(axis=1) == len(OLD))[is_new].mean() > 0.4
        if name == "hierarchical":
            assert (file["parent_label"][is_new] == again.parent_names.index("high")).all()


def test_a_taught_run_holds_what_a_run_holds(trained, sevens, tmp_path):
    folder, taught, model = saved(trained, sevens, tmp_path / "new", method="finetune")
    base = trained("flat")
    made = {path.name for path in folder.iterdir()}
    assert made >= {
        *("config.json", "preprocess.json", "environment.json", "exemplars.npz", "metrics.jsonl"),
        *("summary.json", "weights.safetensors", "checkpoints"),
    }
    described = json.loads((folder / "preprocess.json").read_text())
    assert described["class_names"] == [*OLD, HELD]
    assert described["class_counts"][-1] == 10
    assert described["taught"] == [
        {"name": HELD, "parent": None, "method": "finetune", "images": 10, "run": "flat"}
    ]
    with np.load(base / "exemplars.npz") as old, np.load(folder / "exemplars.npz") as new:
        count = len(old["image"])
        assert new["image"].shape == (count + 10, 28, 28, 1)
        assert new["label"].tolist() == [*old["label"], *[len(OLD)] * 10]
        # The old ones are kept as digits of 8x8 pixels, and enlarged as in the step.
        shown = Predictor(model)(old["image"]).logits
        kept = Predictor(model)(new["image"][:count]).logits
        assert (shown.argmax(axis=1) == kept.argmax(axis=1)).mean() > 0.99
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    lesson = sessions[-1]["taught"]
    assert lesson["run"] == str(base.resolve())
    assert lesson["exemplars_before"] == taught.before
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val"] is None
    assert summary["test"] is None
    assert summary["params"] == json.loads((base / "summary.json").read_text())["params"] + 257


def test_a_taught_run_is_taught_again(trained, sevens, digits, tmp_path):
    images, labels = digits
    nines = images[labels == 9]
    folder, *_ = saved(trained, sevens, tmp_path / "once", method="finetune")
    model = load_run(folder)
    photos = as_photos(model, nines)
    for method in ("imprint", "finetune"):
        taught = teach(model, photos[:10], "9", method=method)
        twice = save_taught(model, taught, tmp_path / method, photos[:10])
        done = run("--mode=evaluate", f"--workdir={twice}")
        assert done.code == 0, done.error
        predictor = Predictor.from_run(twice)
        assert predictor.trained.class_names == (*OLD, HELD, "9")
        assert (predictor(photos[10:]).logits.argmax(axis=1) == 9).mean() > 0.3
        known = predictor(as_photos(model, sevens[10:])).logits.argmax(axis=1)
        assert (known == 8).mean() > 0.5
    lessons = json.loads((twice / "preprocess.json").read_text())["taught"]
    assert [lesson["name"] for lesson in lessons] == [HELD, "9"]


def test_the_command_teaches_saves_and_says_what_it_cost(trained, sevens, tmp_path):
    base = trained("flat")
    photos = write_photos(tmp_path / "photos", sevens[:10])
    before = contents(base)
    done = run(
        "--mode=add_class",
        f"--workdir={base}",
        f"--input={photos}",
        f"--class_name={HELD}",
        f"--output={tmp_path / 'new'}",
    )
    assert done.code == 0, done.error
    assert contents(base) == before
    for said in ("exemplars (training images)", "validation images", "before", "knows 9 classes"):
        assert said in done.output
    done = run("--mode=predict", f"--workdir={tmp_path / 'new'}", f"--input={photos / '3.png'}")
    assert done.code == 0, done.error
    assert HELD in done.output
    again = run(
        "--mode=add_class",
        f"--workdir={base}",
        f"--input={photos}",
        f"--class_name={HELD}",
        f"--output={tmp_path / 'new'}",
    )
    assert "is there already" in again.sentence


def test_training_a_taught_run_further_is_refused(trained, sevens, tmp_path):
    folder, *_ = saved(trained, sevens, tmp_path / "new")
    before = contents(folder)
    done = run(f"--workdir={folder}", "--mode=train")
    assert done.code == 0  # finished: nothing to do
    more = run(f"--workdir={folder}", "--mode=train", "--config.train.epochs=90")
    assert more.code == 2
    assert contents(folder) == before


def test_weights_given_by_class_have_one_for_the_new(trained, sevens, place, tmp_path):
    folder = place / "weighted"
    weights = tuple(float(i + 1) for i in range(len(OLD)))
    done = run(
        *COMMON,
        "--config.train.epochs=1",
        "--config.loss.class_weights=values",
        f"--config.loss.class_weight_values={weights}",
        f"--workdir={folder}",
    )
    assert done.code == 0, done.error
    model = load_run(folder)
    photos = as_photos(model, sevens[:5])
    new = save_taught(model, teach(model, photos, HELD), tmp_path / "new", photos)
    done = run("--mode=evaluate", f"--workdir={new}")
    assert done.code == 0, done.error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "3"}, "has a class '3' already"),
        ({"name": "  "}, "the name is empty"),
        ({"name": "a\nb"}, "no name that can be shown"),
        ({"name": "x" * 200}, "at most 100 characters"),
        ({"method": "magic"}, "'magic' is none of imprint, finetune"),
        ({"parent": "low"}, "have no parents; leave it out"),
        ({"count": 2}, "there are 2 photos; give 3 to 20"),
        ({"count": 1}, "there is 1 photo; give 3 to 20"),
        ({"count": 21}, "there are 21 photos; give 3 to 20"),
        ({"dtype": np.float32}, "photos are float32 .*give uint8"),
        ({"run": "hierarchical"}, "have parents .high, low.; give one"),
        ({"run": "hierarchical", "parent": "middle"}, "'middle' is none of high, low"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changes, words, trained, sevens):
    given = {"name": HELD, "method": "imprint", "parent": None, "run": "flat"} | changes
    model = load_run(trained(given["run"]))
    photos = as_photos(model, sevens[: given.get("count", 10)]).astype(given.get("dtype", np.uint8))
    with pytest.raises(InputError, match=words):
        teach(model, photos, given["name"], method=given["method"], parent=given["parent"])


@pytest.mark.parametrize("damage", ["missing", "cut off", "of other classes"])
def test_exemplars_that_cannot_be_used_are_named(damage, trained, sevens, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained("flat"), folder)
    path = folder / "exemplars.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:500])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **{**arrays, "class_names": arrays["class_names"][::-1]})
    model = load_run(folder)
    with pytest.raises(InputError, match=r"exemplars\.npz.*restore"):
        teach(model, as_photos(model, sevens[:5]), HELD)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--class_name is missing"),
        (("--class_name=7",), "--input is missing"),
        (("--class_name=7", "--input=nowhere"), "does not exist"),
        (("--class_name=7", "--input=broken.png"), "broken.png"),
        (("--class_name=7", "--input=two"), "there are 2 photos"),
        (("--class_name=7", "--input=0"), "is no photo"),
    ],
)
def test_a_command_that_does_not_fit_leaves_nothing(
    flags, words, trained, sevens, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", sevens[:5])
    write_photos(tmp_path / "two", sevens[:2])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    if "--input=broken.png" in flags:
        flags = (*flags, "--input=photos")
    base = trained("flat")
    done = run("--mode=add_class", f"--workdir={base}", *flags, "--output=new")
    assert words in done.sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "photos", "two"]


def test_a_run_that_cannot_be_finished_is_not_there(trained, sevens, tmp_path, monkeypatch):
    model = load_run(trained("flat"))
    photos = as_photos(model, sevens[:5])
    taught = teach(model, photos, HELD)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teach_module.pretrained, "save", fail)
    with pytest.raises(InputError, match="No space left on device"):
        save_taught(model, taught, tmp_path / "new", photos)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Sneaker", "a-plus-Sneaker"),
        ("T-shirt/top", "a-plus-T-shirt-top"),
        ("../../etc", "a-plus-etc"),
        ("Çay & <b>", "a-plus-Çay-b"),
        ("\udce9", "a-plus-class"),
        ("貓" * 100, "a-plus-" + "貓" * 20),
    ],
)
def test_the_new_run_lies_beside_the_old_whatever_the_class_is_called(name, folder):
    assert default_folder(Path("runs/a"), name) == Path("runs", folder)
