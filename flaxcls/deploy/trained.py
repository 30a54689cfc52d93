"""A trained run, as what is deployed needs it: model, variables and preprocessing, no data set."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import pretrained
from flaxcls.analysis.best_checkpoint import FREE, PAUSES, best_step
from flaxcls.batch import Preprocess
from flaxcls.checkpoint import Checkpoints, DamagedCheckpoint
from flaxcls.data.dataset import Dataset
from flaxcls.data.decode import ImageSpec
from flaxcls.errors import InputError
from flaxcls.experiment import image_spec
from flaxcls.experiment.recipe import model_options
from flaxcls.models import create_model
from flaxcls.results import read_description


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a run folder holds of its best model.

    Attributes:
      folder: of the run.
      config: resolved.
      model: a flax module; `apply(variables, images, train=False)` gives logits.
      variables: {"params", "batch_stats"}, NumPy arrays.
      preprocess: final size and normalisation of the images.
      spec: how an image of any shape becomes that size.
      class_names: K names.
      parent_names: of the classes' parents, P names; () without.
      class_parents: the position of each class's parent, K; () without.
      description: `preprocess.json`.
      source: what the variables were read from, for the log.
    """

    folder: Path
    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    preprocess: Preprocess
    spec: ImageSpec
    class_names: tuple[str, ...]
    parent_names: tuple[str, ...]
    class_parents: tuple[int, ...]
    description: dict[str, Any]
    source: str

    @property
    def dtype(self) -> Any:
        """Of the images that the model sees."""
        return jnp.dtype(self.config.precision)


def load_run(folder: str | Path, config: ConfigDict | None = None) -> TrainedModel:
    """Reads the best model of a run, or that of the checkpoint `eval.step`.

    Nothing of the data set is read, and the run may be training meanwhile. A finished run needs
    no `checkpoints/`: its `weights.safetensors` are the best.

    Args:
      folder: of the run.
      config: resolved, the run's but for keys that evaluation may have otherwise; None: the run's.

    Raises:
      InputError: the folder holds no checkpoint, is damaged, or is of another config.
    """
    folder = Path(folder).expanduser()
    if not (folder / "preprocess.json").is_file():
        raise InputError(
            f"--workdir: '{folder}' holds no trained run; train it first, or give the folder of "
            "another run"
        )
    stored, _ = config_module.resolve(config_module.load(folder / "config.json"))
    config = stored if config is None else config
    differing = config_module.differences(stored, config, FREE)
    if differing:
        raise InputError(
            f"{folder} was trained with another config ({'; '.join(differing)}); leave out "
            "--config and these keys to use it as it was trained"
        )
    description = read_description(folder)
    names = tuple(description["class_names"])
    parents = tuple(description.get("parent_names") or ())
    class_parents = tuple(description.get("class_parents") or ())
    classes = Dataset(str(folder), names, {}, parents or None, class_parents)
    model = create_model(config.model.name, len(names), **model_options(config, classes))
    spec = image_spec(config)
    preprocess = Preprocess(
        spec.size, spec.channels, tuple(description["mean"]), tuple(description["std"])
    )
    shapes = _shapes(model, preprocess, config)
    variables, source = _read_variables(folder, model, preprocess, config, shapes)
    return TrainedModel(
        folder,
        config,
        model,
        variables,
        preprocess,
        spec,
        names,
        parents,
        class_parents,
        description,
        source,
    )


def _shapes(model: nn.Module, p: Preprocess, config: ConfigDict) -> Any:
    """Returns shapes and dtypes of {"params", "batch_stats"}."""
    images = jax.ShapeDtypeStruct((1, p.size, p.size, p.channels), jnp.dtype(config.precision))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _read_variables(
    folder: Path, model: nn.Module, p: Preprocess, config: ConfigDict, shapes: Any
) -> tuple[dict[str, Any], str]:
    """Returns the variables, and what they were read from."""
    weights = folder / "weights.safetensors"
    # A finished run that is given more epochs has no summary until they are done.
    if not config.eval.step and weights.is_file() and (folder / "summary.json").is_file():
        shape = (p.size, p.size, p.channels)
        variables, report = pretrained.load(weights, model, shapes, image_shape=shape)
        if report.initialised:
            raise InputError(
                f"'{weights}' lacks {next(iter(report.initialised))} or has it in another shape; "
                "restore it, or remove it to use the run's best checkpoint"
            )
        return variables, weights.name
    if not (folder / "checkpoints").is_dir():
        raise InputError(
            f"--workdir: '{folder}' holds neither a finished run's weights.safetensors nor "
            "checkpoints; train it first, or give the folder of another run"
        )
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        for pause in PAUSES:
            try:
                step = config.eval.step or best_step(checkpoints)
                return checkpoints.restore_variables(step, shapes), f"checkpoint of step {step}"
            except DamagedCheckpoint:
                if pause is None:
                    raise
                time.sleep(pause)
                checkpoints.reload()
    raise AssertionError("the last attempt returns or raises")
