"""A config turned into the objects that it names: data, model, recipe, mesh and state."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import metrics
from flaxcls.augment import Augmentation
from flaxcls.batch import Preprocess, dataset_statistics
from flaxcls.checkpoint import abstract
from flaxcls.data import loader
from flaxcls.data.dataset import Dataset, Split, class_counts, fingerprint
from flaxcls.data.decode import ImageSpec, decode_all, resize_array
from flaxcls.data.load import load_dataset
from flaxcls.data.splits import merged
from flaxcls.errors import InputError
from flaxcls.history import check_monitor
from flaxcls.losses import class_weights, create_loss, parts_of
from flaxcls.models import create_model
from flaxcls.optimizers import create_optimizer, create_schedule
from flaxcls.sharding import create_mesh, replicated, state_shardings
from flaxcls.state import TrainState, create_state
from flaxcls.step import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Random resized crops cut from images stored a little larger than training needs (256 for 224).
STORED_MARGIN = 8 / 7


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set, ready to be read.

    Attributes:
      dataset: its splits as the source has them (files stay files).
      feeds: by split.
      placement: device, host or files.
      notes: sentences for the log.
      fingerprint: of the content, so that a resumed run notices other data.
    """

    dataset: Dataset
    feeds: dict[str, loader.Feed]
    placement: str
    notes: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, apart from its state and its folder.

    Attributes:
      config: resolved.
      data: the splits on this machine.
      mesh: the devices.
      recipe: what a step does.
      order: the examples of each training step.
      evaluated: in evaluation, the name of what is evaluated: a split, or
        DATASET-FINGERPRINT-SPLIT of other data than the run's.
    """

    config: ConfigDict
    data: Data
    mesh: Mesh
    recipe: Recipe
    order: loader.TrainOrder
    evaluated: str = ""

    @property
    def num_classes(self) -> int:
        return self.recipe.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        p = self.recipe.preprocess
        return (p.size, p.size, p.channels)

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
        return create_state(
            self.recipe.model,
            self.recipe.optimizer,
            self.image_shape,
            seed=self.config.seed,
            ema=self.config.optimizer.ema_decay > 0,
            plateau=self.config.schedule.name == "plateau",
            dtype=self.recipe.dtype,
        )

    def state_sharding(self) -> Any:
        shapes = jax.eval_shape(self.create_state)
        return state_shardings(shapes, self.mesh, shard_params=self.config.mesh.shard_params)

    def abstract_state(self) -> Any:
        return abstract(jax.eval_shape(self.create_state), self.state_sharding())

    def empty_metrics(self) -> metrics.MetricState:
        parts = parts_of(self.config.loss.name)
        return metrics.empty(self.num_classes, self.config.eval.top_k, parts)

    def abstract_metrics(self) -> Any:
        return abstract(jax.eval_shape(self.empty_metrics), replicated(self.mesh))

    def count_parameters(self) -> int:
        params = jax.eval_shape(self.create_state).params
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def for_training(config: ConfigDict, earlier: dict[str, Any] | None = None) -> Experiment:
    """Builds what a resolved config names, checking all of it before anything is compiled.

    Args:
      config: resolved.
      earlier: the `preprocess.json` of the run when it is resumed: its normalisation stays, and so
        does a placement that was chosen automatically, which another moment's memory would change.

    Raises:
      InputError: something in the config or the data does not fit.
    """
    mesh = create_mesh(config.mesh.devices)
    _check_batch(config, mesh)
    create_model(config.model.name, 2, **model_options(config))  # checked before data are read
    augmentation = Augmentation(**config.augment.to_dict())
    dataset = read_dataset(config)
    _check_monitors(config, dataset)
    counts = class_counts(dataset)["train"]
    order = loader.train_order(
        int(counts.sum()), config.train.batch_size, epochs=config.train.epochs, seed=config.seed
    )
    recipe = _create_recipe(config, augmentation, counts, order)  # checked before images are read
    if earlier is not None and earlier["fingerprint"] != fingerprint(dataset):
        earlier = None
    data = place(config, dataset, mesh, augmentation, earlier["placement"] if earlier else None)
    if earlier is not None:
        mean, std = tuple(earlier["mean"]), tuple(earlier["std"])
    else:
        mean, std = normalization(config, data.feeds["train"])
    preprocess = dataclasses.replace(recipe.preprocess, mean=mean, std=std)
    return _checked(Experiment(config, data, mesh, recipe._replace(preprocess=preprocess), order))


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
    data = place(config, dataset, mesh, Augmentation())
    counts = np.array(trained["class_counts"])
    order = loader.train_order(
        int(counts.sum()), config.train.batch_size, epochs=config.train.epochs, seed=config.seed
    )
    recipe = _create_recipe(config, Augmentation(), counts, order)
    preprocess = dataclasses.replace(
        recipe.preprocess, mean=tuple(trained["mean"]), std=tuple(trained["std"])
    )
    recipe = recipe._replace(preprocess=preprocess)
    return _checked(Experiment(config, data, mesh, recipe, order, evaluated))


def untrained_model(config: ConfigDict) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """Returns the model of a config and the shape of one image as it sees it, (1, H, W, C).

    Raises:
      InputError: the data, which say how many classes there are, cannot be read.
    """
    dataset = read_dataset(config)
    model = create_model(config.model.name, len(dataset.class_names), **model_options(config))
    return model, (1, config.data.image_size, config.data.image_size, config.data.channels)


def _checked(experiment: Experiment) -> Experiment:
    """Traces the model once: an image that is too small for it is an error here."""
    jax.eval_shape(experiment.create_state)
    return experiment


def _create_recipe(
    config: ConfigDict,
    augmentation: Augmentation,
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
        **_options(config.optimizer, "name", "learning_rate", "accumulate", "ema_decay"),
    )
    weights = class_weights(
        config.loss.class_weights,
        counts,
        values=config.loss.class_weight_values or (),
        beta=config.loss.beta,
    )
    loss = create_loss(
        config.loss.name,
        class_weights=weights,
        **_options(
            config.loss, "name", "class_weights", "class_weight_values", "beta", "reduction"
        ),
    )
    return Recipe(
        model=create_model(config.model.name, len(counts), **model_options(config)),
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
    )


def model_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the model's options that are set, and its dtypes."""
    param_dtype = "float64" if config.precision == "float64" else "float32"
    return _options(config.model, "name") | {"dtype": config.precision, "param_dtype": param_dtype}


def _options(group: ConfigDict, *without: str) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in without and v is not None}


def image_spec(config: ConfigDict) -> ImageSpec:
    """Returns how images come to their size, in training, evaluation and prediction alike."""
    d = config.data
    return ImageSpec(d.image_size, d.channels, d.resize, d.crop_fraction, d.crop_order)


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
    except InputError:  # not fit to train on; whether it can be evaluated is found out below
        own = False
    if not own:
        dataset = read_dataset(config, tuple(trained["class_names"]))
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


def place(
    config: ConfigDict,
    dataset: Dataset,
    mesh: Mesh,
    augmentation: Augmentation,
    earlier: str | None = None,
) -> Data:
    """Chooses where the images live, and puts them there.

    `earlier` is the placement that the run had before, which an automatic choice keeps.
    """
    d, spec = config.data, image_spec(config)
    stored = dataclasses.replace(
        spec, size=round(spec.size * STORED_MARGIN), resize="squash", crop_fraction=1.0
    )
    crops = augmentation.random_resized_crop
    specs = {key: stored if key == "train" and crops else spec for key in dataset.splits}
    in_files = any(not isinstance(s.images, np.ndarray) for s in dataset.splits.values())
    device_bytes, host_bytes = free_memory()
    placement, note = loader.choose_placement(
        earlier or "auto" if d.placement == "auto" else d.placement,
        bytes_needed=sum(_stored_bytes(s, specs[k]) for k, s in dataset.splits.items()),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        in_files=in_files,
        crops_files=crops and in_files,
        describe=describe_bytes,
    )
    notes = [*dataset.notes, note]
    if crops and in_files and placement != "files":
        notes.append(
            f"data: random crops are cut from copies of {stored.size} pixels; data.placement=files "
            "cuts them from the images as they are"
        )
    feeds = {}
    for key, split in dataset.splits.items():
        if isinstance(split.images, np.ndarray):
            _, height, width, _ = split.images.shape
            aspect = np.full(len(split), width / height, np.float32)
            split = dataclasses.replace(split, aspect=aspect)
        if placement != "files":
            split = dataclasses.replace(split, images=stored_images(split, specs[key]))
        feeds[key] = loader.create_feed(
            split, mesh, spec, placement=placement, workers=d.workers, prefetch=d.prefetch
        )
    return Data(dataset, feeds, placement, tuple(notes), fingerprint(dataset))


def stored_images(split: Split, spec: ImageSpec) -> np.ndarray:
    """Returns the split's images, uint8 (N, S, S, C), S = spec.size or smaller."""
    if isinstance(split.images, np.ndarray):
        return resize_array(split.images, spec)
    return decode_all(split.images, spec)


def _stored_bytes(split: Split, spec: ImageSpec) -> int:
    if isinstance(split.images, np.ndarray) and split.images.shape[1] <= spec.size:
        return split.images.nbytes
    return len(split) * spec.size * spec.size * spec.channels


def free_memory() -> tuple[int, int]:
    """Returns the free bytes of a device and of the host, the least of all processes."""
    host = _free_host_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        device = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        device = host // jax.local_device_count()
    if jax.process_count() > 1:
        # In megabytes: JAX's integers have 32 bits. Processes that choose otherwise would hang.
        megabytes = np.array([device >> 20, host >> 20], np.int32)
        device, host = (int(m) << 20 for m in process_allgather(megabytes).min(axis=0))
    return device, host


def _free_host_bytes() -> int:
    """What Linux says can be had without swapping, within the container's limit."""
    if not Path("/proc/meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    free = int(kilobytes) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free


def describe_bytes(count: int) -> str:
    """Returns a size in words: 3.2 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def normalization(
    config: ConfigDict, train: loader.Feed
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of pixels in [0, 1], never from validation or test."""
    name, channels = config.normalize.name, config.data.channels
    if name == "values":
        return tuple(config.normalize.mean), tuple(config.normalize.std)
    if name == "imagenet":
        if channels == 1:
            return (float(np.mean(IMAGENET_MEAN)),), (float(np.mean(IMAGENET_STD)),)
        return IMAGENET_MEAN, IMAGENET_STD
    if name == "none":
        return (0.0,), (1.0,)
    return dataset_statistics(_image_chunks(train))


def _image_chunks(feed: loader.Feed) -> Any:
    """Yields the split's images, uint8 (n, S, S, C), a few hundred at a time."""
    images = feed.split.images
    for start in range(0, len(images), 256):
        chunk = images[start : start + 256]
        yield chunk if isinstance(chunk, np.ndarray) else decode_all(chunk, feed.spec)


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    size = config.train.batch_size // config.optimizer.accumulate
    if size % mesh.size:
        micro = " a micro-batch" if config.optimizer.accumulate > 1 else ""
        raise InputError(
            f"train.batch_size: {size}{micro} cannot be shared by {mesh.size} devices; "
            f"set it to a multiple of {mesh.size * config.optimizer.accumulate}"
        )


def _check_monitors(config: ConfigDict, dataset: Dataset) -> None:
    """Refuses to watch what will not be measured."""
    parts = parts_of(config.loss.name)
    known = metrics.compute(metrics.empty(len(dataset.class_names), config.eval.top_k, parts))
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
