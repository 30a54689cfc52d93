"""Every key of a run with its default and a comment, and the presets of data sets.

Keys whose default is `None` either belong to one choice of their group (`momentum` to SGD and
RMSprop) or are derived from the data.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flaxcls.errors import InputError, did_you_mean

Choice = TypeVar("Choice")


def default() -> ConfigDict:
    """Returns the whole tree, locked: a key that is not in it cannot be set."""
    c = ConfigDict()
    c.seed = 0  # initialisation, data order, augmentation and dropout all derive from it

    c.model = ConfigDict()
    c.model.name = ""  # one of flaxcls.models.list_models()
    # Weights to start from: a file (.safetensors, .pth, .pt, .bin), or hf-hub:OWNER/NAME; empty:
    # none ...
    c.model.pretrained = placeholder(str)
    c.model.init_from = placeholder(str)  # ... or the folder of a finished run of ours
    c.model.frozen = ()  # patterns over parameter paths, such as 'trunk/*', that are not trained
    c.model.trainable = ()  # patterns that are, whatever `frozen` says; alone: nothing else is
    # None keeps the model's own default; an option that the model does not have is refused.
    c.model.init = placeholder(str)  # flax, pytorch, kaiming_uniform, torchvision
    c.model.batch_norm = placeholder(bool)
    c.model.head_width = placeholder(int)  # width of the hidden dense layers
    c.model.dropout = placeholder(float)
    c.model.pool_size = placeholder(int)  # adaptive average pooling in front of the classifier
    c.model.depth = placeholder(int)  # expanding_cnn: convolutions, 1 to 4
    c.model.expansion = placeholder(str)  # expanding_cnn: add13, double, triple
    c.model.variant = placeholder(str)  # googlenet: published, torchvision
    c.model.patch_size = placeholder(int)  # lstm_cnn: pixels
    c.model.lstm_layers = placeholder(int)  # lstm_cnn
    c.model.last_pool = placeholder(bool)  # lstm_cnn: the pool after the trunk
    c.model.biases = placeholder(int)  # lstm_cnn: 2 a gate, as published, or 1
    c.model.heads = placeholder(int)  # local_attention_cnn: None, as many as channels
    c.model.trunk = placeholder(str)  # hierarchical, residual_cam: a model's name
    c.model.cam_dropout = placeholder(float)  # residual_cam: of what its maps are drawn from
    c.model.options = ()  # 'NAME=VALUE': any option of the model, also one that has no key above

    c.data = ConfigDict()
    c.data.source = "digits"  # digits, idx, image_folder, image_files, npy, npz, tfds
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
    c.data.label_pattern = placeholder(str)  # image_files: its first group is a file's class
    # Hierarchical models: rules 'PATTERN=PARENT'; the first that matches a class's name counts.
    c.data.parents = ()
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
    # dataset (its training split), imagenet, none, values; auto: as imported weights, else dataset
    c.normalize.name = "auto"
    c.normalize.mean = placeholder(tuple)  # of pixels in [0, 1], one number or one a channel
    c.normalize.std = placeholder(tuple)

    c.loss = ConfigDict()
    # cross_entropy, focal, kl_divergence, mse, multi_margin, hierarchical (child and parent)
    c.loss.name = "cross_entropy"
    c.loss.label_smoothing = placeholder(float)
    c.loss.form = placeholder(str)  # focal: softmax, or sigmoid (a binary loss a class, summed)
    c.loss.alpha = placeholder(tuple)  # focal: factor, one number or one a class; (): 1
    c.loss.gamma = placeholder(float)  # focal: the more, the less easy examples count
    c.loss.kl_reduction = placeholder(str)  # batchmean, or mean over all examples and classes
    c.loss.activation = placeholder(str)  # mse, of what: none (the logits), softmax
    c.loss.margin = placeholder(float)  # multi_margin
    c.loss.p = placeholder(int)  # multi_margin: power of the hinge, 1 or 2
    c.loss.child_weight = placeholder(float)  # hierarchical: cross-entropy of the child ...
    c.loss.parent_weight = placeholder(float)  # ... and of its parent
    c.loss.kl_weight = placeholder(float)  # ... and divergence from the parent's children
    c.loss.reduction = "mean"  # mean, or sum over the batch
    # none, balanced, complement (1 - n_c / N), effective_number, values
    c.loss.class_weights = "none"
    c.loss.class_weight_values = placeholder(tuple)  # values: one number a class
    c.loss.beta = placeholder(float)  # effective_number: 0 to 1; more weighs rare classes more

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
    c.optimizer.rate_factors = ()  # 'PATTERN=FACTOR' of the learning rate; the first match counts
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
    # Patterns over module paths, such as 'trunk/stage*', whose inside the backward pass computes
    # again instead of keeping it: less memory for a longer step.
    c.train.remat = ()
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
    c.ops.backend = "auto"  # auto, xla, native (C++, for CPU), flax (plain flax.linen)
    c.ops.precision = "default"  # of native convolutions; high: the error of a direct one
    return c.lock()


# The keys that belong to one choice of their group, with the default they take there.
BRANCHES: dict[str, dict[str, dict[str, Any]]] = {
    "data.source": {
        "digits": {"channels": 1},
        "idx": {"channels": 1, "name": "fashion_mnist"},
        "image_folder": {"channels": 3, "on_bad": "error"},
        "image_files": {"channels": 3, "on_bad": "error", "label_pattern": ""},
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
    "loss.name": {
        "cross_entropy": {"label_smoothing": 0.0},
        "focal": {"form": "softmax", "alpha": (), "gamma": 2.0},
        "kl_divergence": {"label_smoothing": 0.0, "kl_reduction": "batchmean"},
        "mse": {"activation": "none"},
        "multi_margin": {"margin": 1.0, "p": 1},
        "hierarchical": {
            "label_smoothing": 0.0,
            "child_weight": 1.0,
            "parent_weight": 1.0,
            "kl_weight": 1.0,
            "kl_reduction": "batchmean",
        },
    },
    "loss.class_weights": {
        "none": {},
        "balanced": {},
        "complement": {},
        "effective_number": {"beta": 0.999},
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
    "product_photos": Preset(
        "image_folder",
        image_size=224,
        val_fraction=0.1,
        test_fraction=0.2,
        path="data/product_photos",
        options={"per_class": 500.0, "crop_fraction": 0.8, "crop_order": "before"},
    ),
    "image_folder": Preset("image_folder", image_size=64, val_fraction=0.1, test_fraction=0.2),
    "pets": Preset(
        "image_files",
        image_size=224,
        val_fraction=0.33,
        path="data/pets/images",
        options={"label_pattern": r"(.+)_\d+\.jpg"},
    ),
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


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def choose(argument: str, choices: Mapping[str, Choice]) -> Choice:
    """Returns what the text after the colon of `--config=FILE:ARGUMENT` stands for.

    For config files of several experiments, whose `get_config` takes the one to run.

    Raises:
      InputError: the text is none of the choices.
    """
    if argument not in choices:
        raise InputError(
            f"--config: unknown experiment {argument!r} after the colon; "
            f"{did_you_mean(argument, choices)}"
        )
    return choices[argument]
