"""Exports: the program runs without this package, and its script sees a photo as the run does."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from command_line import SMALL, compiled_once, contents, run
from PIL import Image
from small_experiments import lenet

from flaxcls import config as config_module
from flaxcls import models, pretrained, runlog
from flaxcls.batch import Preprocess
from flaxcls.data.dataset import Dataset
from flaxcls.data.decode import ImageSpec, decode
from flaxcls.deploy.export import FILES, export_program, export_run, render_script
from flaxcls.deploy.predictor import Predictor
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError
from flaxcls.experiment.recipe import model_options

# What a process does with an export that has nothing of flaxcls, which cannot be imported there.
READER = """
import sys
sys.modules["flaxcls"] = None
import jax, numpy, pathlib, json
import jax.export, safetensors.numpy
folder, images, results = sys.argv[1:]
folder = pathlib.Path(folder)
if json.loads((folder / "model.json").read_bytes())["precision"] == "float64":
    jax.config.update("jax_enable_x64", True)
program = jax.export.deserialize(bytearray((folder / "model.jaxexport").read_bytes()))
weights = safetensors.numpy.load_file(folder / "weights.safetensors")
images, found = numpy.load(images), {}
for batch in (1, 7):
    outputs = program.call(weights, images[:batch])
    found.update({f"{name}/{batch}": numpy.asarray(value) for name, value in outputs.items()})
numpy.savez(results, **found)
assert not [name for name in sys.modules if name.startswith("flaxcls.")]
"""
RUN_SCRIPT = (
    "import sys, runpy; sys.modules['flaxcls'] = None; "
    "script, *sys.argv[1:] = sys.argv[1:]; runpy.run_path(script)"
)


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A finished run of lenet."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run(*SMALL, f"--workdir={folder}")
    assert done.code == 0, done.error
    return folder


def untrained_run(
    folder, name, *, size=32, channels=3, class_names=("a", "b", "c", "d", "e"), parents=(), **keys
):
    """What a finished run holds of its model, with random weights of usual sizes."""
    folder.mkdir(parents=True)
    config = lenet(model__name=name, data__image_size=size, data__channels=channels, **keys)
    config_module.save(config, folder / "config.json")
    of_classes = tuple(i % len(parents) for i in range(len(class_names))) if parents else ()
    spec = ImageSpec(
        size, channels, config.data.resize, config.data.crop_fraction, config.data.crop_order
    )
    description = {
        "format_version": 1,
        **vars(spec),
        "mean": [0.4] * channels,
        "std": [0.25] * channels,
        "class_names": class_names,
        "parent_names": parents or None,
        "class_parents": of_classes,
        "class_counts": [5] * len(class_names),
        "placement": "device",
        "fingerprint": "none",
    }
    runlog.write_json(folder / "preprocess.json", description)
    data = Dataset("", tuple(class_names), {}, tuple(parents) or None, of_classes)
    model = models.create_model(name, len(class_names), **model_options(config, data))
    variables = random_variables(model, size, channels, config.precision)
    pretrained.save(folder / "weights.safetensors", model, variables, layout="flaxcls")
    runlog.write_json(folder / "summary.json", {})
    return folder


def random_variables(model, size, channels, precision="float32"):
    """Kernels that keep the size of what passes, and scales, biases and variances about 1/2."""
    dtype = np.dtype("float64" if precision == "float64" else "float32")
    images = jax.ShapeDtypeStruct((1, size, size, channels), dtype)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    random = np.random.default_rng(0)

    def draw(shape):
        if len(shape.shape) > 1:
            scale = np.sqrt(2 / np.prod(shape.shape[:-1]))
            return (random.standard_normal(shape.shape) * scale).astype(dtype)
        return random.uniform(0.4, 0.6, shape.shape).astype(dtype)

    return jax.tree.map(draw, shapes)


def read_elsewhere(folder, images, tmp_path):
    """What the export gives in a process without flaxcls, by output and batch size."""
    np.save(tmp_path / "images.npy", images)
    results = tmp_path / "results.npz"
    python(READER, folder, tmp_path / "images.npy", results, cwd=tmp_path)
    with np.load(results) as arrays:
        return dict(arrays)


def python(program, *arguments, cwd):
    """Output of a program in a process that does not find this package."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def images_of(trained, count=7):
    p = trained.preprocess
    shape = (count, p.size, p.size, p.channels)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def assert_as_its_own(found, own, tolerance):
    """Logits within `tolerance` of the largest, and probabilities."""
    names = ["logits", "probabilities", "parent_logits", "parent_probabilities"]
    there = {name: value for name, value in zip(names, own, strict=True) if value is not None}
    assert found.keys() == {f"{name}/{batch}" for name in there for batch in (1, 7)}
    for name, value in there.items():
        scale = max(1, np.abs(value).max())
        for batch in (1, 7):
            assert found[f"{name}/{batch}"].shape == value[:batch].shape
            error = np.abs(found[f"{name}/{batch}"] - value[:batch]).max()
            assert error <= tolerance * scale, (name, batch, error, scale)


def test_an_export_gives_the_runs_own_logits_without_flaxcls(trained_run, tmp_path):
    done = run("--mode=export", f"--workdir={trained_run}")
    assert done.code == 0, done.error
    assert sorted(os.listdir(trained_run / "export")) == sorted(FILES)
    predictor = Predictor.from_run(trained_run)
    with np.load(trained_run / "exemplars.npz") as arrays:
        images = np.stack(
            [np.asarray(Image.fromarray(i[..., 0]).resize((28, 28))) for i in arrays["image"][::30]]
        )[:7, ..., None]
    found = read_elsewhere(trained_run / "export", images, tmp_path)
    own = predictor(images)
    assert np.ptp(own.logits) > 0.1
    assert_as_its_own(found, own, 1e-5)


MODELS = {
    "resnet18": {"size": 32},
    "attention_cnn": {"size": 32},
    "float64": {"name": "lenet", "size": 28, "channels": 1, "precision": "float64"},
    "hierarchical": {
        "parents": ("one", "other"),
        "model__trunk": "lenet",
        "loss__name": "hierarchical",
        "size": 28,
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_gives_its_own_logits_without_flaxcls(kind, tmp_path, request):
    options = {"name": kind, **MODELS[kind]}
    if kind == "float64":
        request.getfixturevalue("x64")
    folder = untrained_run(tmp_path / "run", options.pop("name"), **options)
    exported = export_run(None, folder)
    own = load_run(folder)
    found = read_elsewhere(exported, images_of(own), tmp_path)
    if kind == "float64":
        assert found["logits/7"].dtype == np.float64
        own_logits = Predictor(own)(images_of(own)).logits
        np.testing.assert_allclose(found["logits/7"], own_logits, rtol=1e-12, atol=1e-12)
    assert_as_its_own(found, Predictor(own)(images_of(own)), 1e-5)
    if kind == "hierarchical":
        assert found["parent_logits/7"].shape == (7, 2)


def test_bfloat16_gives_float32_logits_to_its_own_precision(tmp_path):
    """Another order of sums rounds to another of 256 values, here too."""
    folder = untrained_run(tmp_path / "run", "lenet", size=28, channels=1, precision="bfloat16")
    exported = export_run(None, folder)
    own = load_run(folder)
    found = read_elsewhere(exported, images_of(own), tmp_path)
    assert found["logits/7"].dtype == np.float32
    assert_as_its_own(found, Predictor(own)(images_of(own)), 2**-5)


@pytest.mark.parametrize(
    "name", ["vgg11", "resnet18", "googlenet", "vgg16_residual_cam", "lstm_cnn", "fashion_net2"]
)
def test_a_program_needs_no_operator_of_ours_and_no_constants(name):
    trained = trained_model(models.create_model(name, 5), lenet(model__name=name))
    exported = export_program(trained)
    called = set(re.findall(r"custom_call @?\"?(\w+)", exported.mlir_module()))
    assert called <= {"shape_assertion"}
    assert set(exported.platforms) >= {"cpu", "cuda"}
    assert str(exported.in_avals[-1].shape) == "(batch, 64, 64, 3)"
    program = bytes(exported.serialize())
    assert len(program) < 500_000  # of 5 to 130 million parameters
    assert b".py" not in program  # nothing says where files lie on this machine


def trained_model(model, config):
    p = Preprocess(64, 3, (0.5,), (0.2,))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    names = tuple("abcde")
    spec = ImageSpec(64)
    return TrainedModel(Path(), config, model, variables, p, spec, names, (), (), {}, "nothing")


def test_the_weights_say_what_they_are_and_are_read_again(trained_run, tmp_path):
    folder = export_run(None, trained_run, str(tmp_path / "out"))
    with safetensors.safe_open(folder / FILES.weights, "numpy") as file:
        about = json.loads(file.metadata()["flaxcls"])
    expected = json.loads((trained_run / "preprocess.json").read_text())
    kept = ("class_names", "mean", "std", "size", "channels", "resize", "crop_fraction")
    assert {key: about[key] for key in kept} == {key: expected[key] for key in kept}
    assert about["model"] == "lenet"
    assert about["options"] == {"dtype": "float32", "param_dtype": "float32"}
    own = load_run(trained_run)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), own.variables)
    variables, report = pretrained.load(folder / FILES.weights, own.model, shapes)
    assert not report.initialised
    jax.tree.map(np.testing.assert_array_equal, variables, own.variables)


# Seeing as the run does.


def photo(width, height, seed=0):
    """Something smooth with sharp edges, in colour."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 90)
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of every kind that is usual."""
    folder = tmp_path_factory.mktemp("photos")
    photo(640, 480).save(folder / "large.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(500, 301).save(folder / "turned.jpg", exif=turned)
    photo(37, 51).save(folder / "small.png")
    photo(300, 20).save(folder / "wide.png")
    photo(60, 80).convert("L").save(folder / "grey.png")
    clear = photo(90, 70).convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(90, dtype=np.uint8) * 2, (70, 1))))
    clear.save(folder / "clear.png")
    photo(64, 48).quantize(16).save(folder / "palette.gif")
    photo(200, 120).convert("CMYK").save(folder / "print.jpg")
    return sorted(folder.iterdir())


SPECS = [
    ImageSpec(32),
    ImageSpec(33, 1),
    ImageSpec(32, 3, "squash", 0.8),
    ImageSpec(32, 3, "crop"),
    ImageSpec(28, 3, "crop", 0.875),
    ImageSpec(33, 3, "pad"),
    ImageSpec(32, 1, "pad", 0.7, "before"),
    ImageSpec(32, 3, "pad", 0.7, "after"),
]


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{s.resize}-{s.crop_fraction}-{s.crop_order}"
)
def test_the_script_sees_a_photo_as_the_run_does(spec, photos, monkeypatch, tmp_path):
    script = render_script(about_of(spec))
    # What follows needs a program.
    (tmp_path / "see.py").write_text(script[: script.index("said = ")].replace(LOADING, "\n"))
    for path in photos:
        monkeypatch.setattr(sys, "argv", ["see.py", str(path)])
        seen = runpy.run_path(str(tmp_path / "see.py"))["images"]
        own = decode(path, spec)
        assert seen.shape == (1, *own.shape)
        difference = np.abs(seen[0].astype(int) - own)
        # Ours resamples with another library, one level beside Pillow's here and there.
        assert difference.max() <= 1, (path.name, difference.max())
        assert (difference > 0).mean() < 0.3, path.name


LOADING = """
about = json.loads((here / "model.json").read_bytes())
program = jax.export.deserialize(bytearray((here / "model.jaxexport").read_bytes()))
"""


def about_of(spec, **other):
    names = {"class_names": ["a", "b"], "parent_names": None, "precision": "float32"}
    return {**vars(spec), **names, **other}


def test_the_script_is_fifteen_lines():
    for spec in (ImageSpec(224), ImageSpec(224, 3, "squash", 0.8)):
        lines = render_script(about_of(spec)).split('"""')[2].splitlines()
        code = [line for line in lines if line and not line.startswith("#")]
        assert len(code) <= 15 + (spec.crop_fraction < 1)
        assert max(map(len, lines)) <= 100


def test_the_script_names_the_five_likeliest_classes(tmp_path):
    names = ("wolf", "café", "caf\udce9", "<b>", "鳥", "sixth")
    folder = untrained_run(
        tmp_path / "run",
        "hierarchical",
        class_names=names,
        parents=("one", "other"),
        model__trunk="lenet",
        loss__name="hierarchical",
        data__resize="crop",
    )
    exported = export_run(None, folder)
    photo(120, 90).save(tmp_path / "photo.png")
    script = exported / FILES.script
    printed = python(RUN_SCRIPT, script, tmp_path / "photo.png", cwd=tmp_path).splitlines()
    own = Predictor.from_run(folder)([tmp_path / "photo.png"])
    shown = [name.encode(errors="backslashreplace").decode() for name in names]
    for chances, known, lines in (
        (own.probabilities[0], shown, printed[:5]),
        (own.parent_probabilities[0], ["one", "other"], printed[5:]),
    ):
        assert len(lines) == min(5, len(known))
        for line, i in zip(lines, np.argsort(-chances), strict=False):
            percent, name = line.split()
            assert name == known[i]
            assert float(percent.rstrip("%")) == pytest.approx(100 * chances[i], abs=0.3)


def test_the_script_refuses_16_bits(tmp_path, photos, monkeypatch):
    script = render_script(about_of(ImageSpec(8)))
    (tmp_path / "see.py").write_text(script.replace(LOADING, "\n"))
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr(sys, "argv", ["see.py", str(tmp_path / "deep.png")])
    with pytest.raises(SystemExit, match=r"deep\.png: save it with 8 bits a channel"):
        runpy.run_path(str(tmp_path / "see.py"))


# What is written, and what is not.


def test_exporting_again_replaces_its_own_files_alone(trained_run, tmp_path):
    before = contents(trained_run)
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "data").mkdir()
    (output / "data" / "model.json").write_text("mine too")
    export_run(None, trained_run, str(output))
    first = contents(output)
    (output / FILES.program).write_bytes(b"damaged")
    export_run(None, trained_run, str(output))
    assert contents(output) == first
    assert (output / "notes.txt").read_text() == "mine"
    assert contents(trained_run) == before


def test_an_export_that_was_cut_off_says_so_and_is_made_again(trained_run, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        export_run(None, trained_run, str(output))
    assert "class_names" not in json.loads((output / FILES.description).read_text())
    monkeypatch.undo()
    export_run(None, trained_run, str(output))
    assert sorted(os.listdir(output)) == sorted(FILES)


def test_files_of_others_are_not_replaced(trained_run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"holds README\.md, which no export wrote"):
        export_run(None, trained_run, str(tmp_path))
    before = contents(trained_run)
    with pytest.raises(InputError, match=r"holds weights\.safetensors, which no export wrote"):
        export_run(None, trained_run, str(trained_run))
    assert contents(trained_run) == before
    assert sorted(os.listdir(tmp_path)) == ["README.md", "model.json"]


def test_an_output_that_cannot_be_is_refused_in_a_sentence(trained_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run("--mode=export", f"--workdir={trained_run}", f"--output={output}")
        assert done.sentence == f"--output: '{output}' is, or lies in, a file; give a folder"
    done = run("--mode=export", f"--workdir={trained_run}", "--output=/proc/out")
    assert "--output: cannot write to '/proc/out'" in done.sentence
    done = run("--mode=export", f"--workdir={tmp_path / 'none'}")
    assert "none" in done.sentence
    assert not (tmp_path / "none").exists()
