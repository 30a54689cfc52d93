"""Every key of a run with its default and a comment; data set presets; checks; save and load.

A config file builds on `for_dataset(name)` and sets only what differs. Keys whose default is
`None` either belong to one choice of their group (`momentum` to SGD and RMSprop) or are derived
from the data; `resolve` fills them in, and reports those that were set but have no effect.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flaxcls.errors import InputError, did_you_mean


def default() -> ConfigDict:
    """Returns the whole tree, locked: a key that is not in it cannot be set."""
    c = ConfigDict()
    c.seed = 0  # initialisation, data order, augmentation and dropout all derive from it

    c.model = ConfigDict()
    c.model.name = ""  # one of flaxcls.models.list_models()
    # None keeps the model's own default; an option that the model does not have is refused.
    c.model.init = placeholder(str)  # flax, pytorch, kaiming_uniform, torchvision
    c.model.batch_norm = placeholder(bool)
    c.model.head_width = placeholder(int)  # width of the hidden dense layers
    c.model.dropout = placeholder(float)
    c.model.pool_size = placeholder(int)  # adaptive average pooling in front of the classifier

    c.data = ConfigDict()
    c.data.source = "digits"  # digits, idx, image_folder, npy, npz, tfds
    c.data.path = placeholder(str)  # folder or file of the data; digits needs none
    c.data.image_size = 32  # pixels; images are square in training
    c.data.channels = placeholder(int)  # 1 or 3; None: as the source has them
    c.data.resize = "squash"  # squash, crop (shorter side, then the centre), pad (letterbox)
    c.data.crop_fraction = 1.0  # centre crop of this share of the image ...
    c.data.crop_order = "after"  # ... after or before resizing
    c.data.split_mode = "auto"  # auto: the source's own, the missing ones drawn; own; drawn
    c.data.val_fraction = 0.1  # of what is drawn from
    c.data.test_fraction = 0.2
    c.data.stratify = True  # drawn splits keep the shares of the classes
    c.data.max_per_class = 0  # training examples of a class at most; 0: all
    c.data.classes = ()  # names of the classes to use, in this order; (): all
    c.data.num_classes_drawn = 0  # use so many classes, drawn with the seed and recorded; 0: all
    c.data.per_class = 0.0  # use of each class: below 1 a share, else a number; 0: all
    c.data.placement = "auto"  # device, host, files; auto chooses by size
    c.data.workers = 0  # processes that decode files; 0: threads of this process
    c.data.prefetch = 2  # batches ready on the device before they are needed
    c.data.on_bad = placeholder(str)  # image_folder: error, or skip (counted and listed)
    c.data.name = placeholder(str)  # tfds: data set name; idx: fashion_mnist or mnist

    c.augment = ConfigDict()  # training only
    c.augment.random_resized_crop = False
    c.augment.crop_area = (0.08, 1.0)  # of the image
    c.augment.crop_ratio = (0.75, 4 / 3)  # width / height
    c.augment.horizontal_flip = 0.0  # probability
    c.augment.vertical_flip = 0.0  # probability
    c.augment.crop_padding = 0  # pixels of padding before a random crop to the same size
    c.augment.rotation = 0.0  # degrees, at most
    c.augment.translation = 0.0  # share of the image, at most
    c.augment.erasing = 0.0  # probability of random erasing, after normalisation
    c.augment.erasing_area = (0.02, 0.33)
    c.augment.erasing_ratio = (0.3, 3.3)
    c.augment.erasing_value = 0.0
    c.augment.mixup = 0.0  # alpha of the beta distribution; 0: off
    c.augment.cutmix = 0.0

    c.normalize = ConfigDict()
    c.normalize.name = "auto"  # auto, dataset (its training split), imagenet, none, values
    c.normalize.mean = placeholder(tuple)  # of pixels in [0, 1], one number or one a channel
    c.normalize.std = placeholder(tuple)

    c.loss = ConfigDict()
    c.loss.name = "cross_entropy"
    c.loss.label_smoothing = placeholder(float)
    c.loss.reduction = "mean"  # mean, or sum over the batch
    c.loss.class_weights = "none"  # none, balanced, complement (1 - n_c / N), values
    c.loss.class_weight_values = placeholder(tuple)  # values: one number a class

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"  # sgd, adam, adamw, rmsprop
    c.optimizer.learning_rate = 0.01
    c.optimizer.weight_decay = 0.0  # adamw: decoupled; others: L2 in the gradient
    c.optimizer.momentum = placeholder(float)
    c.optimizer.nesterov = placeholder(bool)
    c.optimizer.b1 = placeholder(float)
    c.optimizer.b2 = placeholder(float)
    c.optimizer.eps = placeholder(float)
    c.optimizer.decay = placeholder(float)  # of rmsprop's running square (PyTorch's alpha)
    c.optimizer.centered = placeholder(bool)
    c.optimizer.clip_norm = 0.0  # global norm of the gradient at most; 0: off
    c.optimizer.accumulate = 1  # micro-batches a step; the batch size stays what it is
    c.optimizer.ema_decay = 0.0  # average of the parameters, used for evaluation; 0: off

    c.schedule = ConfigDict()
    # constant, step, multi_step, cosine, linear, polynomial, one_cycle, plateau
    c.schedule.name = "constant"
    c.schedule.warmup_epochs = 0.0
    c.schedule.step_epochs = placeholder(int)
    c.schedule.milestones = placeholder(tuple)  # epochs
    c.schedule.gamma = placeholder(float)
    c.schedule.end_fraction = placeholder(float)  # of the learning rate, at the end
    c.schedule.power = placeholder(float)
    c.schedule.pct_start = placeholder(float)
    c.schedule.div_factor = placeholder(float)
    c.schedule.final_div_factor = placeholder(float)
    c.schedule.monitor = placeholder(str)  # plateau: split/metric
    c.schedule.factor = placeholder(float)
    c.schedule.patience = placeholder(int)  # epochs
    c.schedule.min_delta = placeholder(float)
    c.schedule.cooldown = placeholder(int)
    c.schedule.min_scale = placeholder(float)

    c.train = ConfigDict()
    c.train.batch_size = 64  # over all devices and processes
    c.train.epochs = 10
    c.train.steps_per_call = 1  # steps in one compiled call; more saves dispatch on accelerators
    c.train.patience = 0  # epochs without a better train.stop_by before stopping; 0: never
    c.train.min_delta = 0.0  # an improvement is more than this
    c.train.stop_by = "val/loss"  # split/metric
    c.train.best_by = "auto"  # split/metric of the checkpoint kept; auto: val/accuracy

    c.eval = ConfigDict()
    c.eval.batch_size = 0  # 0: that of training
    c.eval.top_k = 5
    c.eval.split = "test"  # --mode=evaluate: train, val, test, or all (drawn splits put together)
    c.eval.step = 0  # --mode=evaluate: the checkpoint's step; 0: the best

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # latest ones kept, besides the best
    c.checkpoint.every_steps = 0  # within an epoch too; 0: at the end of each epoch

    c.log = ConfigDict()
    c.log.every_seconds = 10.0
    c.log.tensorboard = True
    c.log.plots = True

    c.mesh = ConfigDict()
    c.mesh.devices = 0  # 0: all
    c.mesh.shard_params = False  # split large parameters over the devices

    c.precision = "float32"  # of the computation: float32, bfloat16, float64; parameters >= float32

    c.ops = ConfigDict()
    c.ops.backend = "auto"  # auto, xla, flax (plain flax.linen)
    return c.lock()


# The keys that belong to one choice of their group, with the default they take there.
BRANCHES: dict[str, dict[str, dict[str, Any]]] = {
    "data.source": {
        "digits": {"channels": 1},
        "idx": {"channels": 1, "name": "fashion_mnist"},
        "image_folder": {"channels": 3, "on_bad": "error"},
        "npy": {"channels": 1},
        "npz": {"channels": 3},
        "tfds": {"channels": 3, "name": None},
    },
    "normalize.name": {
        "auto": {},
        "dataset": {},
        "imagenet": {},
        "none": {},
        "values": {"mean": (), "std": ()},
    },
    "loss.name": {"cross_entropy": {"label_smoothing": 0.0}},
    "loss.class_weights": {
        "none": {},
        "balanced": {},
        "complement": {},
        "values": {"class_weight_values": ()},
    },
    "optimizer.name": {
        "sgd": {"momentum": 0.9, "nesterov": False},
        "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "rmsprop": {"decay": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    },
    "schedule.name": {
        "constant": {},
        "step": {"step_epochs": 7, "gamma": 0.1},
        "multi_step": {"milestones": (), "gamma": 0.1},
        "cosine": {"end_fraction": 0.0},
        "linear": {"end_fraction": 0.0},
        "polynomial": {"end_fraction": 0.0, "power": 1.0},
        "one_cycle": {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
        "plateau": {
            "monitor": "val/loss",
            "factor": 0.1,
            "patience": 10,
            "min_delta": 1e-4,
            "cooldown": 0,
            "min_scale": 0.0,
        },
    },
}

CHOICES = {
    "data.resize": ("squash", "crop", "pad"),
    "data.crop_order": ("after", "before"),
    "data.split_mode": ("auto", "own", "drawn"),
    "data.placement": ("auto", "device", "host", "files"),
    "data.on_bad": ("error", "skip"),
    "data.channels": (1, 3),
    "loss.reduction": ("mean", "sum"),
    "eval.split": ("train", "val", "test", "all"),
    "precision": ("float32", "bfloat16", "float64"),
    "ops.backend": ("auto", "xla", "flax"),
}

# What must hold of a number, in words: (smallest, largest, whether the smallest itself is allowed).
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**32 - 1, True),
    "data.image_size": (1, 4096, True),
    "data.crop_fraction": (0, 1, False),
    "data.val_fraction": (0, 0.99, True),
    "data.test_fraction": (0, 0.99, True),
    "data.num_classes_drawn": (0, math.inf, True),
    "data.per_class": (0, math.inf, True),
    "data.max_per_class": (0, math.inf, True),
    "data.workers": (0, 256, True),
    "data.prefetch": (1, 64, True),
    "optimizer.learning_rate": (0, math.inf, False),
    "optimizer.weight_decay": (0, math.inf, True),
    "optimizer.clip_norm": (0, math.inf, True),
    "optimizer.accumulate": (1, math.inf, True),
    "optimizer.ema_decay": (0, 0.999999999, True),
    "schedule.warmup_epochs": (0, math.inf, True),
    "train.batch_size": (1, math.inf, True),
    "train.epochs": (1, math.inf, True),
    "train.steps_per_call": (1, math.inf, True),
    "train.patience": (0, math.inf, True),
    "train.min_delta": (0, math.inf, True),
    "eval.batch_size": (0, math.inf, True),
    "eval.top_k": (1, math.inf, True),
    "eval.step": (0, math.inf, True),
    "checkpoint.keep": (1, math.inf, True),
    "checkpoint.every_steps": (0, math.inf, True),
    "log.every_seconds": (0, math.inf, False),
    "mesh.devices": (0, math.inf, True),
}

# What a value must be, in words.
KINDS: dict[type, str] = {
    bool: "a bool; give True or False",
    int: "an int; give a whole number such as 3",
    float: "a float; give a number such as 0.1",
    str: "a str; give text in quotes, such as 'cat'",
    tuple: "a tuple; give one in brackets, such as '(1, 2)'",
}
# What the values of tuples must be.
ELEMENTS: dict[str, type] = {
    "augment.crop_area": float,
    "augment.crop_ratio": float,
    "augment.erasing_area": float,
    "augment.erasing_ratio": float,
    "data.classes": str,
    "loss.class_weight_values": float,
    "normalize.mean": float,
    "normalize.std": float,
    "schedule.milestones": int,
}

# A run may be resumed with other values of these; all else is part of what the run is.
MAY_CHANGE = ("mesh", "log", "checkpoint", "eval", "data.path", "data.workers", "data.placement")
LENGTH_FREE_SCHEDULES = ("constant", "step", "multi_step", "plateau")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where a data set comes from and how it is split, as its users publish results on it."""

    source: str
    image_size: int
    val_fraction: float
    test_fraction: float = 0.0
    path: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PRESETS = {
    "digits": Preset("digits", image_size=8, val_fraction=0.1, test_fraction=0.2),
    "fashion_mnist": Preset(
        "idx",
        image_size=28,
        val_fraction=0.3,
        path="data/fashion_mnist",
        options={"name": "fashion_mnist"},
    ),
    "caltech101_3": Preset(
        "image_folder", image_size=64, val_fraction=0.4, path="data/caltech101_3"
    ),
    "image_folder": Preset("image_folder", image_size=64, val_fraction=0.1, test_fraction=0.2),
    "quickdraw": Preset(
        "npy",
        image_size=28,
        val_fraction=0.2,
        path="data/quickdraw",
        options={"num_classes_drawn": 200, "per_class": 0.01},
    ),
    "tfds": Preset("tfds", image_size=64, val_fraction=0.1, test_fraction=0.2),
}


def for_dataset(dataset: str, *, min_size: int = 1) -> ConfigDict:
    """Returns the default tree set up for one data set.

    Args:
      dataset: a name of `PRESETS`, or `tfds/NAME`.
      min_size: smallest image side, in pixels, that the experiment's model takes; smaller
        images are enlarged to it.

    Raises:
      InputError: the name is not known.
    """
    name, _, tfds_name = dataset.partition("/")
    if name not in PRESETS or (name == "tfds") != bool(tfds_name):
        known = [n for n in PRESETS if n != "tfds"] + ["tfds/NAME"]
        raise InputError(
            f"--config: unknown data set {dataset!r} after the colon; "
            f"{did_you_mean(dataset, known)}"
        )
    preset = PRESETS[name]
    c = default()
    c.data.source = preset.source
    c.data.path = preset.path
    c.data.image_size = max(preset.image_size, min_size)
    c.data.val_fraction = preset.val_fraction
    c.data.test_fraction = preset.test_fraction
    c.data.update(preset.options)
    if tfds_name:
        c.data.name = tfds_name
    return c


def resolve(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Checks a config and fills in what depends on its choices.

    Returns:
      The complete config, and one sentence for each key that was set but has no effect.

    Raises:
      InputError: a value is out of its range, unknown, or contradicts another.
    """
    c = ConfigDict(config).copy_and_resolve_references()
    _check_tree(c)
    notes = _fill_branches(c)
    for path, choices in CHOICES.items():
        value = _get(c, path)
        if value is not None and value not in choices:
            known = [str(choice) for choice in choices]
            raise InputError(f"{path}: unknown value {value!r}; {did_you_mean(str(value), known)}")
    for path, (low, high, closed) in RANGES.items():
        value = _get(c, path)
        if not (low <= value <= high) or (value == low and not closed) or not math.isfinite(value):
            bound = f"at least {low:g}" if closed else f"greater than {low:g}"
            upper = "finite" if high == math.inf else f"at most {high:.10g}"
            raise InputError(f"{path}: {value} is out of range; it must be {bound} and {upper}")
    _check_combinations(c)
    return c.lock(), notes


def _check_tree(c: ConfigDict) -> None:
    """Refuses keys that are not in the default tree, or are missing, and values of other types.

    A config file can unlock the tree, and Python takes True for a whole number.
    """
    given = flatten(c)
    for path in given:
        check_key(path)
    optional = {path for path, value in flatten(default()).items() if value is None}
    for path, kind in key_types().items():
        if path not in given:
            raise InputError(
                f"{path} is missing from the config; build it on flaxcls.config.for_dataset"
            )
        value = given[path]
        if value is None and path in optional:
            continue
        if not _is(value, kind):
            raise InputError(f"{path}: {value!r} is not {KINDS[kind]}")
        if kind is tuple:
            element = ELEMENTS[path]
            for one in value:
                if not _is(one, element):
                    raise InputError(f"{path}: {one!r} in {value!r} is not {KINDS[element]}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a type; a whole number serves as a float, True not as a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_key(path: str) -> None:
    """Raises InputError, with the nearest one, unless `path` is a key such as train.epochs."""
    known = key_types()
    if path in known:
        return
    if any(key.startswith(path + ".") for key in known):
        raise InputError(f"{path} is a group of keys; set one of them, as in {path}.KEY=VALUE")
    group, _, last = path.rpartition(".")
    same_name = [repr(key) for key in known if key.rpartition(".")[2] == last]
    same_group = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == group]
    if same_name:
        remedy = f"did you mean {' or '.join(same_name)}?"
    elif group and same_group:
        remedy = did_you_mean(last, same_group)
    else:
        remedy = did_you_mean(path, known)
    raise InputError(f"{path} is not a key of the config; {remedy}")


@functools.cache
def key_types() -> dict[str, type]:
    """Returns the type of each key's value by the key's dotted path."""
    return dict(_key_types(default(), ""))


def _key_types(config: ConfigDict, prefix: str) -> Iterator[tuple[str, type]]:
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from _key_types(config[key], f"{prefix}{key}.")
        else:
            yield prefix + key, config.get_type(key)


def _fill_branches(c: ConfigDict) -> list[str]:
    """Gives the active choice of each group its defaults; returns what is set to no effect."""
    notes = []
    for selector, branches in BRANCHES.items():
        group_name, _, _ = selector.partition(".")
        group, choice = c[group_name], _get(c, selector)
        if choice not in branches:
            raise InputError(
                f"{selector}: unknown value {choice!r}; {did_you_mean(choice, branches)}"
            )
        active = branches[choice]
        for key in sorted({key for branch in branches.values() for key in branch}):
            if key not in active and group[key] is not None:
                users = [name for name, branch in branches.items() if key in branch]
                notes.append(
                    f"{group_name}.{key} = {group[key]} has no effect with {selector} = {choice!r} "
                    f"(only with {', '.join(users)})"
                )
                with c.unlocked():
                    group[key] = None
            elif key in active and group[key] is None:
                group[key] = active[key]
    return notes


def _check_combinations(c: ConfigDict) -> None:
    if not c.model.name:
        raise InputError(
            "model.name is not set; name a model in the config file or with --config.model.name"
        )
    if c.data.source != "digits" and c.data.path is None:
        raise InputError(
            f"data.path is not set, and data.source = {c.data.source!r} needs it; "
            "give the folder with --config.data.path=DIR"
        )
    if c.data.val_fraction + c.data.test_fraction >= 1 and c.data.split_mode != "own":
        raise InputError(
            f"data.val_fraction + data.test_fraction = "
            f"{c.data.val_fraction + c.data.test_fraction:g} leaves nothing to train on; "
            "make their sum smaller than 1"
        )
    if c.train.batch_size % c.optimizer.accumulate:
        raise InputError(
            f"train.batch_size = {c.train.batch_size} does not divide into "
            f"optimizer.accumulate = {c.optimizer.accumulate} micro-batches; change one of them"
        )
    if c.normalize.name == "values" and not (c.normalize.mean and c.normalize.std):
        raise InputError(
            "normalize.mean and normalize.std must both be given with normalize.name = 'values', "
            "for example --config.normalize.mean='(0.5,)' --config.normalize.std='(0.5,)'"
        )
    for path in ("train.stop_by", "train.best_by", "schedule.monitor"):
        check_monitor(path, _get(c, path))
    if c.schedule.warmup_epochs > c.train.epochs:
        raise InputError(
            f"schedule.warmup_epochs = {c.schedule.warmup_epochs} is longer than train.epochs = "
            f"{c.train.epochs}; shorten the warm-up"
        )


def check_monitor(path: str, monitor: str | None) -> None:
    """Raises InputError unless `monitor` reads as split/metric (or is None or "auto")."""
    if monitor in (None, "auto") or (
        monitor.count("/") == 1 and monitor.split("/")[0] in ("train", "val")
    ):
        return
    raise InputError(
        f"{path}: {monitor!r} is not a monitor; write the split and the metric, "
        "as in 'val/accuracy' or 'train/loss'"
    )


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> ConfigDict:
    """Returns the config that `save` wrote.

    Raises:
      InputError: the file does not hold a config of this version of flaxcls.
    """
    c = default()
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise InputError("it is no tree of keys")
        _assign(c, stored)
        _check_tree(c)
    except (AttributeError, KeyError, TypeError) as error:
        raise _unreadable(path, _explain(error)) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, _first_line(error)) from error
    return c


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: not a config that this version of flaxcls can read ({reason}); restore the file "
        "or give another --workdir"
    )


def _assign(config: ConfigDict, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _assign(config[key], value)
        else:
            setattr(config, key, tuple(value) if isinstance(value, list) else value)


def from_file(path: Path, *dataset: str) -> ConfigDict:
    """Returns what `get_config(*dataset)` of a Python file returns.

    Raises:
      InputError: the file cannot be read or run, or returns no config; with the line at fault.
    """
    # Not through importlib, which would leave compiled files beside the user's.
    module = types.ModuleType("flaxcls_config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(_read(path), str(path), "exec"), vars(module))
        if hasattr(module, "get_config"):
            config = module.get_config(*dataset)
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.lineno else str(path)
        raise InputError(f"{where}: not Python ({error.msg}); correct the config file") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = str(path) + "".join(lines[-1:])
        if "config_dict" in frames[-1].filename:
            raise InputError(f"{where}: {_explain(error)}") from error
        raise InputError(
            f"{where}: {type(error).__name__}: {_first_line(error)}; correct the config file"
        ) from error
    if not hasattr(module, "get_config"):
        raise InputError(
            f"{path}: there is no function get_config(dataset) in it; define one that returns the "
            "config, or give another file"
        )
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: get_config returned {type(config).__name__}, not a config; return what "
            "flaxcls.config.for_dataset gave"
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--config: cannot read '{path}' ({error.strerror}); give a config file"
        ) from error


def _explain(error: Exception) -> str:
    """Says in short what ml_collections says of a key or a value, with the whole tree around it."""
    text = str(error)
    wrong = re.search(r"field '(\w+)'.*?\. (.*) is of original .* to type <class '(.*)'>", text)
    if wrong:
        key, value, name = wrong.groups()
        kinds = {kind.__name__: words for kind, words in KINDS.items()}
        return f"{key}: {value!r} is not {kinds.get(name, 'a group of keys; set one of them')}"
    named = re.search(r"Key \W*(\w+)", text) or re.search(r"(\w+)", text)
    name = named[1] if named else text
    keys = sorted({part for path in key_types() for part in path.split(".")})
    return f"{name!r} is not a key of the config; {did_you_mean(name, keys)}"


def differences(
    stored: ConfigDict, given: ConfigDict, also_free: tuple[str, ...] = ()
) -> list[str]:
    """Returns one line for each key that differs and may not, on resuming or evaluating a run."""
    old, new = flatten(stored), flatten(given)
    may_change = [*MAY_CHANGE, *also_free]
    if given.schedule.name in LENGTH_FREE_SCHEDULES:
        may_change.append("train.epochs")
    return [
        f"{key}: {old[key]!r} there, {new[key]!r} now"
        for key in sorted(old)
        if old[key] != new[key]
        and not any(key == free or key.startswith(free + ".") for free in may_change)
    ]


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _get(config: ConfigDict, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
