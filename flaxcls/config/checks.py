"""What a config must hold before anything is compiled."""

import math
from typing import Any

from ml_collections import ConfigDict

from flaxcls.config.keys import BRANCHES, default, flatten, key_types
from flaxcls.errors import InputError, did_you_mean, nearest

CHOICES = {
    "data.resize": ("squash", "crop", "pad"),
    "data.crop_order": ("after", "before"),
    "data.split_mode": ("auto", "own", "drawn"),
    "data.placement": ("auto", "device", "host", "files"),
    "data.on_bad": ("error", "skip"),
    "data.channels": (1, 3),
    "loss.form": ("softmax", "sigmoid"),
    "loss.kl_reduction": ("batchmean", "mean"),
    "loss.activation": ("none", "softmax"),
    "loss.p": (1, 2),
    "loss.reduction": ("mean", "sum"),
    "eval.split": ("train", "val", "test", "all"),
    "precision": ("float32", "bfloat16", "float64"),
    "ops.backend": ("auto", "xla", "native", "flax"),
    "ops.precision": ("default", "high"),
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
    "data.parents": str,
    "model.frozen": str,
    "model.options": str,
    "model.trainable": str,
    "optimizer.rate_factors": str,
    "train.remat": str,
    "loss.alpha": float,
    "loss.class_weight_values": float,
    "normalize.mean": float,
    "normalize.std": float,
    "schedule.milestones": int,
}


def resolve(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Checks a config and fills in what depends on its choices.

    Returns:
      The complete config, and one sentence for each key that was set but has no effect.

    Raises:
      InputError: a value is out of its range, unknown, or contradicts another.
    """
    c = ConfigDict(config).copy_and_resolve_references()
    check_tree(c)
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


def check_tree(c: ConfigDict) -> None:
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
    same_name = {key.rpartition(".")[0]: repr(key) for key in known if key.endswith(f".{last}")}
    near = nearest(group, same_name)
    same_group = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == group]
    if same_name:
        meant = [same_name[near]] if near else same_name.values()
        remedy = f"did you mean {' or '.join(meant)}?"
    elif group and same_group:
        remedy = did_you_mean(last, same_group)
        if group == "model":  # a model's own option, perhaps
            mark = "?" if remedy.endswith("?") else ""
            remedy = f"{remedy.removesuffix('?')} or model.options={last}=VALUE{mark}"
    else:
        remedy = did_you_mean(path, known)
    raise InputError(f"{path} is not a key of the config; {remedy}")


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
    if c.model.pretrained is not None and c.model.init_from is not None:
        raise InputError(
            "model.pretrained and model.init_from are both set; set one of them, as weights can "
            "come from one place only"
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
    if c.loss.name == "hierarchical" and (c.augment.mixup or c.augment.cutmix):
        raise InputError(
            "loss.name = 'hierarchical' needs the child and the parent of each image, which "
            "augment.mixup and augment.cutmix mix away; set both to 0 or choose another loss"
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


def _get(config: ConfigDict, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config
