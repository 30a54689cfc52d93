"""A trained run as a program that runs without this package: StableHLO, weights and a script.

`--mode=export` writes five files to RUN/export, or to `--output`: the program, through
`jax.export`, with the run's preprocessing inside and a batch size that is left open; its weights as
safetensors; `model.json`, what a person or a program needs to know of both; a script that says what
is in a photo; and a README.

The weights are the program's first argument, a dict by the names in their file, and no constants
inside it: vgg13 at 224 px exports in 1 s, to 29 KB beside the weights. With constants it takes 8 s
and 2.2 GB more of memory, the weights are on the disk twice, and from 2 GB on, where a flatbuffer
ends, there is no program at all.

The program holds the model twice, and a platform compiles its own half: for CPUs in the forms that
XLA:CPU runs fast (backend `xla`), for others as flax.linen has it. The native operators cannot be
in it: they are this package's.

There is no ONNX, since no library that is kept up converts these models well. jax2onnx 0.17.1
converts lenet, vgg11 and fashion_net2, to what onnxruntime computes within 1e-6 of the largest
logit. But it refuses resnet18 and googlenet (pooling with explicit padding) and attention_cnn (with
an open batch size), replaces `flax.linen.max_pool` by one that takes no positional arguments, and
needs orbax-checkpoint < 0.11.37, so that installing it would take our checkpoints' library back.
tf2onnx needs TensorFlow, by way of jax2tf. What torchvision has too can go through PyTorch:
`pretrained.save(..., layout="torchvision")` writes what its networks load.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jinja2
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from ml_collections import ConfigDict

from flaxcls import __version__, ops, pretrained, runlog
from flaxcls.data.dataset import Dataset
from flaxcls.data.decode import ImageSpec
from flaxcls.deploy.counter import say
from flaxcls.deploy.predictor import logits_of_pixels, sees_light_on_dark
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError
from flaxcls.experiment.recipe import model_options

FORMAT_VERSION = 1
_Arrays: TypeAlias = dict[str, jax.Array]
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Files(NamedTuple):
    """The names of what an export consists of, in the order in which they are written."""

    program: str = "model.jaxexport"
    weights: str = "weights.safetensors"
    script: str = "predict.py"
    readme: str = "README.md"
    description: str = "model.json"


FILES = Files()


def export_run(config: ConfigDict | None, workdir: Path, output: str | None = None) -> Path:
    """Writes the export of a run's best model, says what it is, and returns its folder.

    Files of an earlier export are replaced, each of them at once, and nothing else in the folder
    is touched. `model.json` is whole only when everything is.

    Args:
      config: resolved, of the run; see `trained.load_run`.
      workdir: the run folder.
      output: the folder; None: `export` in the run folder.

    Raises:
      InputError: the run cannot be read, or the folder cannot be written or holds files of these
        names that are no export's.
    """
    trained = load_run(workdir, config)
    folder = _make_folder(Path(output).expanduser() if output else trained.folder / "export")
    exported = export_program(trained)
    program = bytes(exported.serialize())
    about = describe(trained, exported)
    # Until the end it has no class names: a half-written export answers nothing.
    runlog.write_json(folder / FILES.description, _origin())
    runlog.write_bytes(folder / FILES.program, program)
    with runlog.writing(folder / FILES.weights):
        pretrained.save(
            folder / FILES.weights,
            trained.model,
            jax.device_get(trained.variables),
            layout="flaxcls",
            about=_of_weights(about),
        )
    runlog.write_bytes(folder / FILES.script, runlog.encode(render_script(about)))
    runlog.write_bytes(folder / FILES.readme, runlog.encode(render_readme(about, trained.folder)))
    runlog.write_json(folder / FILES.description, about)
    size = (folder / FILES.weights).stat().st_size
    say(
        f"{trained.source} of {trained.folder} is exported to {folder}: a program of "
        f"{len(program) / 1e3:.0f} KB with {size / 1e6:.1f} MB of weights, for any batch size on "
        f"{', '.join(PLATFORMS)}"
    )
    say(f"try it, without flaxcls too: python {folder / FILES.script} PHOTO")
    return folder


def export_program(trained: TrainedModel) -> export.Exported:
    """Returns the program of a run: preprocessing, model and probabilities.

    It maps (weights, images) to a dict. The weights are a dict of arrays by name, as in
    `params/trunk/conv1_1/kernel`; images are uint8 (batch, S, S, C). The dict holds `logits` and
    `probabilities` (batch, K), which are float64 of a run in float64 and else float32; those of a
    hierarchical model are of the child classes, and `parent_logits` and `parent_probabilities`
    (batch, P) are there too.
    """
    p = trained.preprocess

    def outputs(backend: str, weights: _Arrays, images: jax.Array) -> _Arrays:
        variables = unflatten_dict(weights, sep="/")
        with ops.use_backend(backend):
            logits = logits_of_pixels(trained.model, p, trained.dtype, variables, images)
        if not isinstance(logits, tuple):
            return _with_probabilities(logits)
        child, parent = logits
        of_parents = _with_probabilities(parent)
        return _with_probabilities(child) | {f"parent_{k}": v for k, v in of_parents.items()}

    weights = flatten_dict(dict(trained.variables), sep="/")
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()}
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, p.size, p.size, p.channels), np.uint8)

    def predict(weights: _Arrays, images: jax.Array) -> _Arrays:
        on_cpu, elsewhere = partial(outputs, "xla"), partial(outputs, "flax")
        return jax.lax.platform_dependent(weights, images, cpu=on_cpu, default=elsewhere)

    with _without_paths():
        return export.export(jax.jit(predict), platforms=PLATFORMS)(shapes, images)


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Leaves out where each operation stands in which file of this machine.

    A program would tell it to whoever it is given to, and differ with the lines that called.
    """
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    jax.config.update(limit, 0)
    try:
        yield
    finally:
        jax.config.update(limit, before)


def _with_probabilities(logits: jax.Array) -> dict[str, jax.Array]:
    return {"logits": logits, "probabilities": jax.nn.softmax(logits)}


def describe(trained: TrainedModel, exported: export.Exported) -> dict[str, Any]:
    """Returns `model.json`: what the program takes and gives, and what a class is called."""
    p, spec = trained.preprocess, trained.spec
    names, parents = trained.class_names, trained.parent_names
    classes = Dataset(str(trained.folder), names, {}, parents or None, trained.class_parents)
    return {
        **_origin(),
        "weights_of": trained.source,
        "model": trained.config.model.name,
        "options": model_options(trained.config, classes),
        "precision": trained.config.precision,
        "class_names": names,
        "parent_names": parents or None,
        "class_parents": trained.class_parents,
        **dataclasses.asdict(spec),
        "mean": p.mean,
        "std": p.std,
        "light_on_dark": sees_light_on_dark(trained),
        "input": {"dtype": "uint8", "shape": ["batch", p.size, p.size, p.channels]},
        "outputs": _shapes(exported),
        "platforms": exported.platforms,
        "calling_convention_version": exported.calling_convention_version,
    }


def _origin() -> dict[str, Any]:
    versions = {"flaxcls": __version__, "jax": jax.__version__}
    date = datetime.now(UTC).date().isoformat()
    return {"export_format": FORMAT_VERSION, "exported_by": {**versions, "date": date}}


def _of_weights(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the metadata of the weights say: what the arrays are of, for any reader."""
    of_program = ("export_format", "input", "outputs", "platforms", "calling_convention_version")
    return {key: value for key, value in about.items() if key not in of_program}


def _shapes(exported: export.Exported) -> dict[str, Any]:
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        name: {"dtype": str(aval.dtype), "shape": ["batch", int(aval.shape[1])]}
        for name, aval in outputs.items()
    }


def render_script(about: Mapping[str, Any]) -> str:
    """Returns the script that says what is in a photo, brought to its size as the run does it.

    It is 15 lines of code, and up to five more where images are padded, classes have parents or
    names outside ASCII, or the model computes in float64.
    """
    spec = ImageSpec(**{f.name: about[f.name] for f in dataclasses.fields(ImageSpec)})
    kinds = [("probabilities", "class_names")]
    if about["parent_names"]:
        kinds.append(("parent_probabilities", "parent_names"))
    names = [*about["class_names"], *(about["parent_names"] or ())]
    # decode() leaves out the finest frequencies of a JPEG down to twice the size that is shown.
    decoded = 2 * spec.size / spec.crop_fraction
    return _render(
        "predict_exported.py.jinja",
        size=spec.size,
        channels=spec.channels,
        mode="L" if spec.channels == 1 else "RGB",
        resize=spec.resize,
        fraction=spec.crop_fraction,
        order=spec.crop_order,
        bleed=(1 - spec.crop_fraction) / 2,
        decoded=int(decoded) if spec.resize == "squash" else decoded,
        kinds=kinds,
        ascii_names="".join(names).isascii(),
        x64=about["precision"] == "float64",
    )


def render_readme(about: Mapping[str, Any], run: Path) -> str:
    """Returns the page that says what is in the folder of an export."""
    return _render(
        "export_readme.md.jinja",
        about=about,
        run=run.absolute().name,
        size=about["size"],
        channels=about["channels"],
        x64=about["precision"] == "float64",
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flaxcls.deploy", "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(template).render(files=FILES, **values)


def _make_folder(folder: Path) -> Path:
    """Makes the folder, or sees that an export may be written to one that is there."""
    _try(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    taken = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if taken and not _is_export(folder):
        raise InputError(
            f"--output: '{folder}' holds {taken[0]}, which no export wrote and which an export "
            "would replace; give another folder"
        )
    _try(folder, lambda: tempfile.TemporaryFile(dir=folder).close())
    return folder


def _try(folder: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--output: '{folder}' is, or lies in, a file; give a folder") from error
    except OSError as error:
        raise InputError(
            f"--output: cannot write to '{folder}': {error.strerror}; give a folder that may be "
            "written"
        ) from error


def _is_export(folder: Path) -> bool:
    path = folder / FILES.description
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and "export_format" in about
