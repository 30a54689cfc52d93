"""Teaches a trained model one class more, from a few photos, by its last layer alone.

What the model was trained on is not needed: the run's own `exemplars.npz` stands for the old
classes. What comes out is a run of its own, which evaluates, predicts, explains and exports like
any other, and may be taught again.
"""

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import metrics, pretrained, runlog
from flaxcls.augment import Augmentation
from flaxcls.batch import resize
from flaxcls.checkpoint import Checkpoints, check_directory
from flaxcls.data import loader
from flaxcls.data.dataset import Dataset, fingerprint
from flaxcls.deploy.head import (
    BATCH,
    Eye,
    Head,
    Layer,
    Seen,
    finetune,
    head_logits,
    head_of,
    imprint,
)
from flaxcls.deploy.trained import TrainedModel
from flaxcls.errors import InputError, out_of_memory
from flaxcls.experiment import image_spec, read_dataset, stored_images
from flaxcls.experiment.build import new_state
from flaxcls.experiment.recipe import create_recipe, is_hierarchical
from flaxcls.freezing import partition
from flaxcls.history import Record, best_record, summary
from flaxcls.losses import parts_of

METHODS = ("imprint", "finetune")
FEWEST, MOST = 3, 20
LONGEST_NAME = 100
# Share of the exemplars that may be lost to the new class, where three points of accuracy are
# promised. By imprinting they are judged with the features of training images, of which fewer are
# lost than of others: 2 % of them are up to 3.1 % of test images (benchmarks/teach_class.py).
COST = {"imprint": 0.015, "finetune": 0.03}
# How the photos are varied for finetuning, besides what the run's own training flips.
LIGHT = Augmentation(rotation=8.0, translation=0.07)
VARIANTS = 4

Progress = Callable[[float, str], None]


class Exemplars(NamedTuple):
    """Training images that a run keeps.

    Attributes:
      images: uint8 (N, S', S', C), S' the model's size or smaller.
      labels: int32 (N,).
      positions: int64 (N,), in the training split; -1 of photos that were taught.
    """

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


class Accuracy(NamedTuple):
    """How many of some images of the old classes are recognised, before and after.

    Attributes:
      before: share of all images.
      after: likewise.
      class_before: share of each old class, K; NaN of one without images.
      class_after: likewise.
      images: how many there are.
    """

    before: float
    after: float
    class_before: tuple[float, ...]
    class_after: tuple[float, ...]
    images: int

    @property
    def cost(self) -> float:
        """Points of accuracy that are lost."""
        return 100 * (self.before - self.after)


@dataclasses.dataclass(frozen=True)
class Taught:
    """A model that knows one class more.

    Attributes:
      trained: it, with the new class's name in the run's place; its folder is that of the run it
        came from, until `save_taught` makes one.
      name: of the new class, which is the last.
      parent: of the new class, or None.
      method: one of `METHODS`.
      exemplars: accuracy on the exemplars of the old classes, which the model was trained on; by
        heads that were not finetuned on them.
      recall: share of the photos that are recognised; they are what it learned from.
      examples: how many photos those are.
      seconds: that it took.
      learned: the layers that give the logits, as they are now.
    """

    trained: TrainedModel
    name: str
    parent: str | None
    method: str
    exemplars: Accuracy
    recall: float
    examples: int
    seconds: float
    learned: tuple[Layer, ...] = dataclasses.field(repr=False)

    @property
    def model(self) -> nn.Module:
        return self.trained.model

    @property
    def variables(self) -> dict[str, Any]:
        return self.trained.variables

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.trained.class_names

    @property
    def before(self) -> float:
        """Accuracy on the exemplars of the old classes before."""
        return self.exemplars.before

    @property
    def after(self) -> float:
        """Accuracy on the exemplars of the old classes after."""
        return self.exemplars.after


def silent(fraction: float, doing: str) -> None:
    """A callback of progress that shows nothing."""


def teach(
    trained: TrainedModel,
    examples: np.ndarray,
    name: str,
    *,
    method: str = "imprint",
    parent: str | None = None,
    progress: Progress = silent,
) -> Taught:
    """Returns the model with one class more, the last.

    `imprint` appends a row to the last layer, see `head.imprint`: old parameters and logits stay.
    `finetune` trains the layers that give the logits, see `head.finetune`.

    Args:
      trained: a run's model.
      examples: uint8 (M, S, S, C), M from 3 to 20, as `Predictor.decode` returns photos.
      name: of the new class.
      method: one of `METHODS`.
      parent: of the new class, one of the run's; None where the classes have no parents.
      progress: called with the share that is done, 0 to 1, and what is being done.

    Raises:
      InputError: the name, the parent or the photos do not fit, the run has no exemplars, or its
        head cannot learn a class by this method.
    """
    began = time.monotonic()
    name, parent = check_request(trained, name, method=method, parent=parent)
    check_examples(trained, examples)
    exemplars = read_exemplars(trained)
    head = head_of(trained)
    if method == "imprint" and len(head.layers) > 1:
        raise InputError(
            f"method: the logits of {trained.config.model.name} are the product of two layers, so "
            "that no row of one is a prototype; give --method=finetune"
        )
    with out_of_memory("stop other programs, or teach on a machine that has more"):
        learned, lesson = _learn(trained, head, method, exemplars, examples, progress)
    recognised = head_logits(learned, lesson.photos.features).argmax(axis=1)
    taught = Taught(
        trained=_grown(trained, head.paths, learned, name, parent, method, len(examples)),
        name=name,
        parent=parent,
        method=method,
        exemplars=compare(lesson.before, lesson.after, exemplars.labels),
        recall=_share(recognised == len(trained.class_names)),
        examples=len(examples),
        seconds=time.monotonic() - began,
        learned=learned,
    )
    progress(1.0, "done")
    return taught


class _Lesson(NamedTuple):
    """What was seen: logits of the exemplars, (N, K) and then (N, K + 1), and the photos."""

    before: np.ndarray
    after: np.ndarray
    photos: Seen


def _learn(
    trained: TrainedModel,
    head: Head,
    method: str,
    exemplars: Exemplars,
    examples: np.ndarray,
    progress: Progress,
) -> tuple[tuple[Layer, ...], _Lesson]:
    times = 1 + VARIANTS if method == "finetune" else 1
    batches = -(-len(exemplars.images) // BATCH) + times * -(-len(examples) // BATCH)
    count = _Counter(progress, batches, method)
    eye = Eye(trained, head)
    old = eye(exemplars.images, count.batch("looking at the run's exemplars"))
    new = eye(examples, count.batch("looking at the photos"))
    if method == "imprint":
        layers = (imprint(head.layers[0], old, exemplars.labels, new, COST[method]),)
        return layers, _Lesson(old.logits, head_logits(layers, old.features), new)
    flips = trained.config.augment
    light = dataclasses.replace(
        LIGHT, horizontal_flip=flips.horizontal_flip, vertical_flip=flips.vertical_flip
    )
    doing = count.batch("looking at variants of the photos")
    varied = eye(examples, doing, augmentation=light, times=VARIANTS)
    shown = jax.tree.map(lambda *arrays: np.concatenate(arrays), new, varied)
    learned, after = finetune(head.layers, old, exemplars.labels, shown, COST[method], count.share)
    return learned, _Lesson(old.logits, after, new)


class _Counter:
    """Turns batches and steps that are done into progress; finetuning is a third of it."""

    def __init__(self, progress: Progress, batches: int, method: str):
        self._progress = progress
        self._batches = batches
        self._looking = 1.0 if method == "imprint" else 0.67
        self._done = 0

    def batch(self, doing: str) -> Callable[[], None]:
        def on_batch() -> None:
            self._done += 1
            self._progress(0.99 * self._looking * self._done / self._batches, doing)

        return on_batch

    def share(self, share: float) -> None:
        self._progress(self._looking + 0.99 * (1 - self._looking) * share, "training the head")


def check_request(
    trained: TrainedModel, name: str, *, method: str, parent: str | None
) -> tuple[str, str | None]:
    """Returns the name of a new class and its parent, without the spaces around them.

    Raises:
      InputError: the name is none or taken, the method is unknown, or the parent does not fit.
    """
    name = name.strip()
    if not name:
        raise InputError("class_name: the name is empty; give the new class a name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"class_name: {name[:LONGEST_NAME]!r} is no name that can be shown; give one line of "
            f"at most {LONGEST_NAME} characters"
        )
    if name in trained.class_names:
        raise InputError(
            f"class_name: the run has a class {name!r} already; give the new class another name"
        )
    if method not in METHODS:
        raise InputError(f"method: {method!r} is none of {', '.join(METHODS)}; give one of them")
    parent = (parent or "").strip() or None
    parents = ", ".join(trained.parent_names)
    if parent is None and trained.parent_names:
        raise InputError(f"parent: the run's classes have parents ({parents}); give one of them")
    if parent is not None and not trained.parent_names:
        raise InputError("parent: the run's classes have no parents; leave it out")
    if parent is not None and parent not in trained.parent_names:
        raise InputError(f"parent: {parent!r} is none of {parents}; give one of them")
    return name, parent


def check_count(photos: int) -> None:
    """Raises InputError unless there are 3 to 20 photos."""
    if not FEWEST <= photos <= MOST:
        count = "is 1 photo" if photos == 1 else f"are {photos} photos"
        raise InputError(f"photos: there {count}; give {FEWEST} to {MOST} of the new class")


def check_examples(trained: TrainedModel, examples: np.ndarray) -> None:
    """Raises InputError unless `examples` are uint8 (M, S, S, C), M from 3 to 20."""
    p = trained.preprocess
    check_count(len(examples))
    if examples.dtype != np.uint8 or examples.shape[1:] != (p.size, p.size, p.channels):
        raise InputError(
            f"photos are {examples.dtype} of shape {examples.shape}; give uint8 "
            f"(M, {p.size}, {p.size}, {p.channels})"
        )


def read_exemplars(trained: TrainedModel) -> Exemplars:
    """Returns the training images that the run keeps.

    Raises:
      InputError: there are none, or the file is damaged or of other classes.
    """
    path = trained.folder / "exemplars.npz"
    try:
        with np.load(path) as stored:
            images, labels, index = (stored[key] for key in ("image", "label", "index"))
            names = tuple(stored["class_names"].tolist())
    except FileNotFoundError as error:
        raise InputError(
            f"'{path}' is missing, which stands for the old classes; restore it, or train anew"
        ) from error
    except Exception as error:  # zipfile and NumPy raise anything on a damaged file
        raise InputError(f"'{path}' cannot be read ({error}); restore it") from error
    labels = labels[:, 0] if labels.ndim == 2 else labels
    fits = (
        names == trained.class_names
        and images.dtype == np.uint8
        and images.ndim == 4
        and len(images) == len(labels) == len(index) > 0
        and 0 <= labels.min() <= labels.max() < len(names)
    )
    if not fits:
        raise InputError(f"'{path}' is not of this run's classes; restore it")
    return Exemplars(images, labels, index)


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Returns the accuracy of logits (N, K) and of those after, (N, K + 1), on old classes.

    `labels` are int (N,), below K; images of other classes are left out.
    """
    hits = [logits.argmax(axis=1) == labels for logits in (before, after)]
    each = [tuple(_share(hit[labels == label]) for label in range(before.shape[1])) for hit in hits]
    return Accuracy(_share(hits[0]), _share(hits[1]), each[0], each[1], len(labels))


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _grown(
    trained: TrainedModel,
    paths: tuple[tuple[str, ...], ...],
    learned: tuple[Layer, ...],
    name: str,
    parent: str | None,
    method: str,
    count: int,
) -> TrainedModel:
    """Returns the model with the layers that have learned, and with the new class's name."""
    arrays = flatten_dict(trained.variables, keep_empty_nodes=True)
    for path, layer in zip(paths, learned, strict=True):
        arrays["params", *path, "kernel"] = layer.kernel
        arrays["params", *path, "bias"] = layer.bias
    names = (*trained.class_names, name)
    parents = trained.class_parents
    if parent is not None:
        parents = (*parents, trained.parent_names.index(parent))
    lesson = {
        "name": name,
        "parent": parent,
        "method": method,
        "images": count,
        "run": trained.folder.resolve().name,
    }
    described = trained.description
    return dataclasses.replace(
        trained,
        model=trained.model.clone(num_classes=len(names)),
        variables=unflatten_dict(arrays),
        class_names=names,
        class_parents=parents,
        description={
            **described,
            "class_names": list(names),
            "class_parents": list(parents),
            "class_counts": [*described["class_counts"], count],
            "taught": [*described.get("taught", []), lesson],
        },
    )


def validation(
    trained: TrainedModel, taught: Taught, *, most: int = 1000, progress: Progress = silent
) -> Accuracy | None:
    """Returns the accuracy on images that neither training nor teaching saw.

    They are of the run's own validation split, `most` of them evenly over it.

    Returns:
      None where the run has no such split, or its data are not where they were, or have changed.
    """
    try:
        dataset = read_dataset(trained.config)
    except InputError:
        return None
    if fingerprint(dataset) != trained.description["fingerprint"] or "val" not in dataset.splits:
        return None
    split = dataset.splits["val"]
    split = split.take(np.unique(np.linspace(0, len(split) - 1, most).round().astype(int)))
    images = stored_images(split, image_spec(trained.config))
    count = _Counter(progress, -(-len(images) // BATCH), "imprint")
    seen = Eye(trained, head_of(trained))(images, count.batch("looking at validation images"))
    return compare(seen.logits, head_logits(taught.learned, seen.features), split.labels)


def default_folder(run: Path, name: str) -> Path:
    """Returns `RUN-plus-NAME`, beside the run, with what a folder may be called of the name."""
    run = run if run.name else run.resolve()
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.").encode(errors="ignore")[:60]
    return run.with_name(f"{run.name}-plus-{plain.decode(errors='ignore') or 'class'}")


def check_new(folder: Path) -> None:
    """Raises InputError where a taught run cannot be made: there is something already."""
    if os.path.lexists(folder):
        raise InputError(
            f"--output: '{folder}' is there already, and nothing is overwritten; give the new run "
            "another folder"
        )
    check_directory(folder / "checkpoints")


def save_taught(trained: TrainedModel, taught: Taught, folder: Path, examples: np.ndarray) -> Path:
    """Makes a run of a model that has learned a class.

    It is found whole or not at all. Its config is that of the run it came from, and its data are
    that run's, which need not hold the new class; its curves are those of that run's training.
    What it scores is not known before it is evaluated, so that its summary does not say.

    Args:
      trained: the run's model, as it was.
      taught: what `teach` made of it.
      folder: of the new run, which must not exist; see `default_folder`.
      examples: the photos that it learned from, as for `teach`; they become exemplars.

    Returns:
      The folder.

    Raises:
      InputError: the folder exists or cannot be written.
    """
    folder = Path(folder).expanduser()
    check_new(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with runlog.writing(folder):
            draft.mkdir(parents=True)
        _write_run(trained, taught, draft, examples)
        with runlog.writing(folder):
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_run(trained: TrainedModel, taught: Taught, folder: Path, examples: np.ndarray) -> None:
    grown = taught.trained
    config = _new_config(trained)
    config_module.save(config, folder / "config.json")
    runlog.write_json(folder / "preprocess.json", grown.description)
    _write_exemplars(trained, taught, folder / "exemplars.npz", examples)
    _write_session(trained, taught, folder / "environment.json")
    history = [_padded(r) for r in runlog.read_metrics(trained.folder / "metrics.jsonl")]
    runlog.write_metrics(folder / "metrics.jsonl", history)
    with runlog.writing(folder):
        pretrained.save(
            folder / "weights.safetensors",
            grown.model,
            grown.variables,
            layout="flaxcls",
            about={
                "model": config.model.name,
                "mean": grown.preprocess.mean,
                "std": grown.preprocess.std,
            },
        )
    best_by = _best_by(config, history)
    best = best_record(history, best_by)
    last = history[-1]["step"] if history else 0
    step = max(1, best["step"] if best else last)
    log = {"history": history, "best_by": best_by, "data": grown.description["fingerprint"]}
    state, empty = _state(grown, config, step)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(step, state, empty, log, step)
        checkpoints.wait()
    count = sum(x.size for x in jax.tree.leaves(grown.variables["params"]))
    summarised = summary(history, model=config.model.name, params=count, monitor=best_by, best=best)
    # They are of the classes that there were.
    runlog.write_json(folder / "summary.json", {**summarised, "val": None, "test": None})


def _new_config(trained: TrainedModel) -> ConfigDict:
    """Returns the config that the run was trained with, for one class more."""
    config, _ = config_module.resolve(config_module.load(trained.folder / "config.json"))
    config.eval.step = 0  # of the new run there is one checkpoint
    if config.loss.class_weight_values:
        values = tuple(config.loss.class_weight_values)
        config.loss.class_weight_values = (*values, sum(values) / len(values))
    return config


def _best_by(config: ConfigDict, history: list[Record]) -> str:
    """Returns what chose the best checkpoint of a run, as `Experiment.best_by`."""
    if config.train.best_by != "auto":
        return config.train.best_by
    return "val/accuracy" if any(r["split"] == "val" for r in history) else "train/loss"


def _padded(record: Record) -> Record:
    """Returns a record whose lists have a place for one class more, of which nothing is known."""
    return {
        key: [*value, 0 if key == "support" else None] if isinstance(value, list) else value
        for key, value in record.items()
    }


def _write_exemplars(
    trained: TrainedModel, taught: Taught, path: Path, examples: np.ndarray
) -> None:
    """Writes the run's exemplars with the examples behind them, all of one shape."""
    old = read_exemplars(trained)
    images, p = old.images, trained.preprocess
    if images.shape[1] != p.size:  # smaller, to be enlarged in the step
        larger = [resize(jnp.asarray(part), p.size) for part in np.array_split(images, 16)]
        images = np.concatenate(larger).round().clip(0, 255).astype(np.uint8)
    if images.shape[3] != p.channels:
        images = np.repeat(images, p.channels, axis=3)
    count = len(examples)
    labels = np.full(count, len(trained.class_names))
    arrays = {
        "image": np.concatenate([images, examples]),
        "label": np.append(old.labels, labels).astype(np.int32),
        "index": np.append(old.positions, np.full(count, -1)).astype(np.int64),
        "class_names": np.array(taught.class_names),
    }
    runlog.write_arrays(path, arrays)


def _write_session(trained: TrainedModel, taught: Taught, path: Path) -> None:
    """Writes how the run came about: the sessions of the one before it, and this."""
    before = trained.folder / "environment.json"
    stored = runlog.read_json(before) if before.is_file() else {}
    sessions = stored.get("sessions", []) if isinstance(stored, dict) else []
    lesson = {
        **taught.trained.description["taught"][-1],
        "run": trained.folder.resolve(),
        "weights": trained.source,
        "seconds": taught.seconds,
        "exemplars_before": taught.before,
        "exemplars_after": taught.after,
        "photos_recognised": taught.recall,
    }
    session = {**runlog.environment(), "taught": lesson}
    runlog.write_json(path, {"sessions": [*sessions, session]})


def _state(grown: TrainedModel, config: ConfigDict, step: int) -> tuple[Any, Any]:
    """Returns a train state that holds the variables, and metrics that have seen nothing.

    The optimizer's moments are zero: they are of other parameters, and training does not go on.
    """
    names, parents = grown.class_names, grown.class_parents
    dataset = Dataset(str(grown.folder), names, {}, grown.parent_names or None, parents)
    counts = np.array(grown.description["class_counts"])
    t = config.train
    order = loader.train_order(int(counts.sum()), t.batch_size, epochs=t.epochs, seed=config.seed)
    recipe = create_recipe(config, Augmentation(), dataset, counts, order)
    recipe = recipe._replace(preprocess=grown.preprocess)
    shapes = jax.eval_shape(partial(new_state, config, recipe))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params, batch_stats = grown.variables["params"], grown.variables["batch_stats"]
    state = state.replace(step=jnp.int32(step), params=params, batch_stats=batch_stats)
    if state.ema is not None:
        learning, _ = partition(params, recipe.selection)
        state = state.replace(ema={"params": learning, "batch_stats": batch_stats})
    of_parents = parents if is_hierarchical(config) else ()
    empty = metrics.empty(len(names), config.eval.top_k, parts_of(config.loss.name), of_parents)
    return jax.device_put(state), empty
