"""A config turned into the objects that it names: data, model, recipe, mesh and state."""

import dataclasses
import math
import re
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import metrics, pretrained, rematerialisation
from flaxcls.augment import Augmentation
from flaxcls.checkpoint import abstract
from flaxcls.data import loader
from flaxcls.data.dataset import Dataset, class_counts, fingerprint, match_classes
from flaxcls.data.load import load_dataset
from flaxcls.data.splits import merged
from flaxcls.errors import InputError
from flaxcls.experiment.placement import (
    Data,
    image_spec,
    normalization,
    place,
    with_resampler,
)
from flaxcls.experiment.recipe import (
    check_batch,
    check_hierarchy,
    check_monitors,
    create_recipe,
    is_hierarchical,
    model_options,
    weights_source,
)
from flaxcls.freezing import check as check_patterns
from flaxcls.freezing import partition
from flaxcls.losses import parts_of
from flaxcls.models import create_model
from flaxcls.sharding import create_mesh, replicated, state_shardings
from flaxcls.state import TrainState, create_state
from flaxcls.step import Recipe


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, apart from its state and its folder.

    Attributes:
      config: resolved.
      data: the splits on this machine.
      mesh: the devices.
      recipe: what a step does.
      order: the examples of each training step.
      weights: what training starts from; None where that is drawn, and in evaluation.
      evaluated: in evaluation, the name of what is evaluated: a split, or
        DATASET-FINGERPRINT-SPLIT of other data than the run's.
    """

    config: ConfigDict
    data: Data
    mesh: Mesh
    recipe: Recipe
    order: loader.TrainOrder
    weights: pretrained.Origin | None = None
    evaluated: str = ""

    @property
    def num_classes(self) -> int:
        return self.recipe.num_classes

    @property
    def eval_batch_size(self) -> int:
        """Batch of evaluation, rounded up to what the devices can share: padding does not count.

        At most the largest split: more would be nothing but padding.
        """
        largest = max(len(feed.split) for feed in self.data.feeds.values())
        size = min(self.config.eval.batch_size or self.config.train.batch_size, largest)
        return -(-size // self.mesh.size) * self.mesh.size

    @property
    def best_by(self) -> str:
        """The monitor that chooses the best checkpoint."""
        if self.config.train.best_by != "auto":
            return self.config.train.best_by
        return "val/accuracy" if "val" in self.data.dataset.splits else "train/loss"

    def create_state(self) -> TrainState:
        return new_state(self.config, self.recipe)

    @cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self.create_state)

    def state_sharding(self) -> Any:
        return state_shardings(self._shapes, self.mesh, shard_params=self.config.mesh.shard_params)

    def abstract_state(self) -> Any:
        return abstract(self._shapes, self.state_sharding())

    def empty_metrics(self) -> metrics.MetricState:
        parts = parts_of(self.config.loss.name)
        parents = self.data.dataset.class_parents if is_hierarchical(self.config) else ()
        return metrics.empty(self.num_classes, self.config.eval.top_k, parts, parents)

    def abstract_metrics(self) -> Any:
        return abstract(jax.eval_shape(self.empty_metrics), replicated(self.mesh))

    def count_parameters(self) -> int:
        return _count(self._shapes.params)

    def count_trained_parameters(self) -> int:
        return _count(partition(self._shapes.params, self.recipe.selection)[0])


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def for_training(config: ConfigDict, earlier: dict[str, Any] | None = None) -> Experiment:
    """Builds what a resolved config names, checking all of it before anything is compiled.

    Args:
      config: resolved.
      earlier: the `preprocess.json` of the run when it is resumed: its normalisation and the
        version of its weights stay, and so does a placement that was chosen automatically, which
        another moment's memory would change.

    Raises:
      InputError: something in the config or the data does not fit.
    """
    mesh = create_mesh(config.mesh.devices)
    check_batch(config, mesh)
    create_model(config.model.name, 2, **model_options(config))  # checked before data are read
    check_hierarchy(config)
    augmentation = Augmentation(**config.augment.to_dict())
    dataset = read_dataset(config)
    check_monitors(config, dataset)
    counts = class_counts(dataset)["train"]
    order = loader.train_order(
        int(counts.sum()), config.train.batch_size, epochs=config.train.epochs, seed=config.seed
    )
    recipe = create_recipe(config, augmentation, dataset, counts, order)  # before images are read
    if earlier is not None and earlier["fingerprint"] != fingerprint(dataset):
        earlier = None
    check_model(config, recipe)
    imported = imported_weights(config, recipe) if earlier is None else None
    data = place(config, dataset, mesh, augmentation, earlier["placement"] if earlier else None)
    if earlier is not None:
        data = with_resampler(data, image_spec(config), earlier["resampler"])
        mean, std = tuple(earlier["mean"]), tuple(earlier["std"])
        weights = pretrained.Origin(**earlier["weights"]) if earlier["weights"] else None
    else:
        published = imported[1].normalization if imported else None
        mean, std = normalization(config, data.feeds["train"], published)
        weights = imported[1].origin if imported else None
    preprocess = dataclasses.replace(recipe.preprocess, mean=mean, std=std)
    return Experiment(config, data, mesh, recipe._replace(preprocess=preprocess), order, weights)


def new_state(config: ConfigDict, recipe: Recipe) -> TrainState:
    """Draws the state that training starts from; to be called under `jax.jit` or `eval_shape`."""
    p = recipe.preprocess
    return create_state(
        recipe.model,
        recipe.optimizer,
        (p.size, p.size, p.channels),
        seed=config.seed,
        ema=config.optimizer.ema_decay > 0,
        plateau=config.schedule.name == "plateau",
        dtype=recipe.dtype,
        selection=recipe.selection,
    )


def imported_weights(
    config: ConfigDict, recipe: Recipe, expected: pretrained.Origin | None = None
) -> tuple[dict[str, Any], pretrained.Report] | None:
    """Returns the weights that training starts from and a report, or None where they are drawn.

    They are {"params", "batch_stats"}, in which what is imported is arrays and all else shapes.
    `expected` is what the run began with, where that is known: other weights are an InputError.
    """
    source = weights_source(config)
    if source is None:
        return None
    shapes = jax.eval_shape(partial(new_state, config, recipe))
    variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    p = recipe.preprocess
    return pretrained.load(
        source,
        recipe.model,
        variables,
        expected=expected,
        image_shape=(p.size, p.size, p.channels),
    )


def check_model(config: ConfigDict, recipe: Recipe) -> None:
    """Traces the model once: an image too small for it, or a pattern in vain, is an error here."""
    params = jax.eval_shape(partial(new_state, config, recipe)).params
    check_patterns(params, recipe.selection, recipe.rates)
    rematerialisation.check(params, recipe.remat)


def for_evaluation(
    config: ConfigDict, trained: dict[str, Any], *, other_data: bool = False
) -> Experiment:
    """Builds a finished run again to evaluate it, on its own data or on others.

    The run's own data, wherever they lie now, are split as in training. Of any other data set
    nothing is drawn: its own split `eval.split` is used, or all of it where it has no splits.

    Args:
      config: the run's, perhaps with another `data.path`.
      trained: the run's `preprocess.json`.
      other_data: whether `data` names another place than the run's.

    Raises:
      InputError: the data have classes that the model does not know, cannot be read, or are the
        run's but have changed.
    """
    mesh = create_mesh(config.mesh.devices)
    dataset, evaluated = _read_for_evaluation(config, trained, other_data)
    counts = np.array(trained["class_counts"])
    order = loader.train_order(
        int(counts.sum()), config.train.batch_size, epochs=config.train.epochs, seed=config.seed
    )
    recipe = create_recipe(config, Augmentation(), dataset, counts, order)
    preprocess = dataclasses.replace(
        recipe.preprocess, mean=tuple(trained["mean"]), std=tuple(trained["std"])
    )
    recipe = recipe._replace(preprocess=preprocess)
    check_model(config, recipe)
    data = place(config, dataset, mesh, Augmentation())
    if not other_data:
        data = with_resampler(data, image_spec(config), trained["resampler"])
    return Experiment(config, data, mesh, recipe, order, evaluated=evaluated)


def untrained_model(config: ConfigDict) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """Returns the model of a config and the shape of one image as it sees it, (1, H, W, C).

    Raises:
      InputError: the data, which say how many classes there are, cannot be read.
    """
    dataset = read_dataset(config)
    model = create_model(
        config.model.name, len(dataset.class_names), **model_options(config, dataset)
    )
    return model, (1, config.data.image_size, config.data.image_size, config.data.channels)


def read_dataset(config: ConfigDict, known_classes: tuple[str, ...] = ()) -> Dataset:
    """Reads what `data` names; with a model's `known_classes` nothing is drawn from it."""
    d = config.data
    return load_dataset(
        d.source,
        d.path or "",
        name=d.name or "",
        classes=d.classes,
        num_classes_drawn=d.num_classes_drawn,
        per_class=d.per_class,
        val_fraction=d.val_fraction,
        test_fraction=d.test_fraction,
        split_mode=d.split_mode,
        stratify=d.stratify,
        max_per_class=d.max_per_class,
        on_bad=d.on_bad or "error",
        label_pattern=d.label_pattern or "",
        parents=d.parents,
        seed=config.seed,
        spec=image_spec(config),
        known_classes=known_classes,
    )


def _read_for_evaluation(
    config: ConfigDict, trained: dict[str, Any], other_data: bool
) -> tuple[Dataset, str]:
    """Returns a data set of one split, and the name of what it is."""
    split = config.eval.split
    try:
        dataset = read_dataset(config)
        own = fingerprint(dataset) == trained["fingerprint"]
        if own:
            dataset = _with_taught(dataset, trained)
    except InputError:  # not fit to train on; whether it can be evaluated is found out below
        own = False
    if not own:
        dataset = read_dataset(_with_rules(config, trained), tuple(trained["class_names"]))
        if not other_data and split != "all":
            raise InputError(
                f"{dataset.name} has changed since the run was trained, so that its split "
                f"{split!r} is no longer known; restore the data, or evaluate all of them, "
                "training images included, with --config.eval.split=all"
            )
        if split not in dataset.splits and set(dataset.splits) == {"train"}:
            note = f"data: {dataset.name} has no splits, so all of it is evaluated"
            dataset, split = dataclasses.replace(dataset, notes=(*dataset.notes, note)), "all"
    # Two folders of the same base name are two data sets.
    name = split if own else f"{Path(dataset.name).name}-{fingerprint(dataset)[:8]}-{split}"
    if split == "all":
        return dataclasses.replace(dataset, splits={"test": merged(dataset)}), name
    if split not in dataset.splits:
        raise InputError(
            f"eval.split: {split!r} is not a split of {dataset.name}, which has "
            f"{', '.join(dataset.splits)}; choose one of them, or 'all'"
        )
    return dataclasses.replace(dataset, splits={split: dataset.splits[split]}), name


def _with_taught(dataset: Dataset, trained: dict[str, Any]) -> Dataset:
    """Returns the run's data with the classes that it was taught, of which they have no images."""
    if not trained.get("taught"):
        return dataset
    dataset = match_classes(dataset, tuple(trained["class_names"]))
    return dataclasses.replace(dataset, class_parents=tuple(trained["class_parents"]))


def _with_rules(config: ConfigDict, trained: dict[str, Any]) -> ConfigDict:
    """Returns the config with a rule for the parent of each class that the run was taught."""
    rules = [
        f"{re.escape(lesson['name'])}={lesson['parent']}"
        for lesson in trained.get("taught", ())
        if lesson.get("parent")
    ]
    if not rules:
        return config
    config = config.copy_and_resolve_references()
    config.data.parents = (*rules, *config.data.parents)
    return config
