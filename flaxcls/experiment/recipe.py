"""What a step does, from a config: model, loss, optimizer, schedule, augmentation."""

import ast
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import metrics, models
from flaxcls.augment import Augmentation
from flaxcls.batch import Preprocess
from flaxcls.data import loader
from flaxcls.data.dataset import Dataset
from flaxcls.errors import InputError
from flaxcls.freezing import Selection
from flaxcls.history import check_monitor
from flaxcls.losses import class_weights, create_loss, parts_of
from flaxcls.models import create_model
from flaxcls.optimizers import create_optimizer, create_schedule
from flaxcls.step import Recipe

# Keys of the group `model` that are no options of the module.
_OF_WEIGHTS = ("pretrained", "init_from", "frozen", "trainable")
# What `model.options` may not hold, and what decides on it.
_DECIDED_BY = {
    **{key: f"model.{key}" for key in ("name", "options", *_OF_WEIGHTS)},
    **{"dtype": "precision", "param_dtype": "precision"},
    **{"num_classes": "the data", "num_parents": "data.parents", "module_name": "flaxcls"},
}


def create_recipe(
    config: ConfigDict,
    augmentation: Augmentation,
    dataset: Dataset,
    counts: np.ndarray,
    order: loader.TrainOrder,
) -> Recipe:
    """Builds model, loss, optimizer and schedule; the normalisation is yet to be filled in.

    `counts` are the training examples of each class, (C,).
    """
    schedule = create_schedule(
        config.schedule.name,
        config.optimizer.learning_rate,
        steps_per_epoch=order.steps_per_epoch,
        epochs=config.train.epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        **_options(config.schedule, "name", "warmup_epochs", "monitor"),
    )
    optimizer = create_optimizer(
        config.optimizer.name,
        schedule,
        **_options(
            config.optimizer, "name", "learning_rate", "accumulate", "ema_decay", "rate_factors"
        ),
    )
    weights = class_weights(
        config.loss.class_weights,
        counts,
        values=config.loss.class_weight_values or (),
        beta=config.loss.beta,
    )
    parents = {"parents": dataset.class_parents} if is_hierarchical(config) else {}
    loss = create_loss(
        config.loss.name,
        class_weights=weights,
        **parents,
        **_options(
            config.loss, "name", "class_weights", "class_weight_values", "beta", "reduction"
        ),
    )
    return Recipe(
        model=create_model(config.model.name, len(counts), **model_options(config, dataset)),
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        preprocess=Preprocess(config.data.image_size, config.data.channels, (0.0,), (1.0,)),
        augmentation=augmentation,
        num_classes=len(counts),
        seed=config.seed,
        steps_per_epoch=order.steps_per_epoch,
        accumulate=config.optimizer.accumulate,
        ema_decay=config.optimizer.ema_decay,
        sum_loss=config.loss.reduction == "sum",
        dtype=jnp.dtype(config.precision),
        selection=Selection(config.model.frozen, config.model.trainable),
        rates=tuple(map(_rate_factor, config.optimizer.rate_factors)),
        remat=config.train.remat,
    )


def _rate_factor(rule: str) -> tuple[str, float]:
    """PATTERN=FACTOR -> both."""
    pattern, _, factor = rule.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if not pattern or not (math.isfinite(value) and value >= 0):
        raise InputError(
            f"optimizer.rate_factors: {rule!r} is no rule; write PATTERN=FACTOR with a factor of "
            "at least 0, as in 'trunk/*=0.1'"
        )
    return pattern, value


def model_options(config: ConfigDict, dataset: Dataset | None = None) -> dict[str, Any]:
    """Returns the model's options that are set, its dtypes, and what it takes from the data.

    A model may do without the options `dtype` and `param_dtype`, where the config does.
    """
    options = _options(config.model, "name", "options", *_OF_WEIGHTS)
    for rule in config.model.options:
        name, value = _option(rule)
        if name in options:
            raise InputError(
                f"model.options: {name} is given twice, {options[name]!r} and {value!r}; give it "
                "once, as model.options or as a key of its own"
            )
        options[name] = value
    known = models.model_options(config.model.name)
    precision = config.precision
    dtypes = {"dtype": precision, "param_dtype": "float64" if precision == "float64" else "float32"}
    if precision == "float32":
        dtypes = {name: dtype for name, dtype in dtypes.items() if name in known}
    if dataset is not None and is_hierarchical(config):
        options["num_parents"] = len(dataset.parent_names or ())
    return options | dtypes


def _option(rule: str) -> tuple[str, Any]:
    """NAME=VALUE -> both, the value as Python reads it, and as text where it is no Python."""
    name, equals, text = (part.strip() for part in rule.partition("="))
    if not equals or not name.isidentifier():
        raise InputError(
            f"model.options: {rule!r} is no option; write NAME=VALUE, as in 'head_width=512'"
        )
    if name in _DECIDED_BY:
        raise InputError(
            f"model.options: {name} is no option of a model; {_DECIDED_BY[name]} decides on it, so "
            "leave it out here"
        )
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError):
        value = text
    if isinstance(value, str) and re.search(r",\s*[A-Za-z_]\w*\s*=", value):
        raise InputError(
            f"model.options: {rule!r} holds several options; give the flag once for each, as in "
            "--config.model.options=NAME=VALUE, or in a config file a tuple of texts"
        )
    return name, tuple(value) if isinstance(value, list) else value


def is_hierarchical(config: ConfigDict) -> bool:
    """Whether the model has a head for the classes' parents."""
    return "num_parents" in models.model_options(config.model.name)


def weights_source(config: ConfigDict) -> str | None:
    """Returns the file or name of the weights that training starts from, or None.

    Raises:
      InputError: the run of `model.init_from` has none.
    """
    if config.model.init_from is None:
        return config.model.pretrained or None
    path = Path(config.model.init_from).expanduser() / "weights.safetensors"
    if not path.is_file():
        raise InputError(
            f"model.init_from: '{config.model.init_from}' is no folder of a finished run (there is "
            "no weights.safetensors in it); finish that run, or give another"
        )
    return str(path)


def check_hierarchy(config: ConfigDict) -> None:
    """Refuses a hierarchical model without its loss or parents, and the loss without the model."""
    if config.loss.name == "hierarchical" and not config.data.parents:
        raise InputError(
            "loss.name = 'hierarchical' needs the parent of each class; write rules such as "
            "--config.data.parents=\"('[A-Z].*=cat', '[a-z].*=dog')\""
        )
    if is_hierarchical(config) != (config.loss.name == "hierarchical"):
        raise InputError(
            f"model.name = {config.model.name!r} and loss.name = {config.loss.name!r} do not go "
            "together; a hierarchical model needs loss.name = 'hierarchical', and no other does"
        )


def _options(group: ConfigDict, *without: str) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in without and v is not None}


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    size = config.train.batch_size // config.optimizer.accumulate
    if size % mesh.size:
        micro = " a micro-batch" if config.optimizer.accumulate > 1 else ""
        raise InputError(
            f"train.batch_size: {size}{micro} cannot be shared by {mesh.size} devices; "
            f"set it to a multiple of {mesh.size * config.optimizer.accumulate}"
        )


def check_monitors(config: ConfigDict, dataset: Dataset) -> None:
    """Refuses to watch what will not be measured."""
    parts = parts_of(config.loss.name)
    parents = dataset.class_parents if is_hierarchical(config) else ()
    empty = metrics.empty(len(dataset.class_names), config.eval.top_k, parts, parents)
    known = metrics.compute(empty)
    names = [name for name, value in known.items() if not isinstance(value, list)]
    watched = {"train.best_by": config.train.best_by, "schedule.monitor": config.schedule.monitor}
    if config.train.patience:
        watched["train.stop_by"] = config.train.stop_by
    for key, monitor in watched.items():
        if monitor is None or monitor == "auto":
            continue
        if monitor.startswith("val/") and "val" not in dataset.splits:
            raise InputError(
                f"{key} watches {monitor!r}, but there is no validation split; set "
                "data.val_fraction above 0, or watch 'train/loss'"
            )
        try:
            check_monitor(monitor, names)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
