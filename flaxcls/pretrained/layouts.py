"""Which tensor of torchvision's and timm's networks is which parameter of ours."""

import dataclasses
import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from flaxcls.models.googlenet import STAGES, GoogLeNet
from flaxcls.models.hierarchical import Hierarchical
from flaxcls.models.registry import create_model, model_options
from flaxcls.models.residual_cam import ResidualCAM
from flaxcls.models.resnet import ResNet
from flaxcls.models.vgg import CHANNELS, VGG

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# The options that decide which of torchvision's networks a model is.
CHOICES = (("batch_norm", True), ("batch_norm", False), ("variant", "torchvision"))


class Entry(NamedTuple):
    """One array of ours.

    Attributes:
      path: in the variables, as ("params", "trunk", "conv1", "kernel").
      names: what torchvision calls it, then what others do.
      kind: conv (O, I, H, W), dense (O, I), flat (O, C * H * W) or vector (C,) on their side.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    kind: str

    @property
    def of_head(self) -> bool:
        """Whether it is a part of the network's last layer, which has the name `head` in ours."""
        return self.path[-2] == "head"


class Layout(NamedTuple):
    """All arrays of a model that torchvision's has too.

    Attributes:
      entries: see `Entry`.
      normalization: mean and standard deviation of the inputs that published weights expect.
    """

    entries: tuple[Entry, ...]
    normalization: tuple[tuple[float, ...], tuple[float, ...]]


def layout_of(model: nn.Module) -> Layout | None:
    """Returns torchvision's layout of a model, or None where torchvision has no such network."""
    if isinstance(model, VGG) and not model.pointwise_last:
        return Layout(tuple(_vgg(model.convs, model.batch_norm)), IMAGENET)
    if isinstance(model, ResNet):
        return Layout(tuple(_resnet(model)), IMAGENET)
    if isinstance(model, GoogLeNet) and model.variant == "torchvision":
        return Layout(tuple(_googlenet()), HALF)
    if isinstance(model, Hierarchical | ResidualCAM):
        trunk = create_model(model.trunk, 1, **model.trunk_options)
        layout = layout_of(trunk)
        if layout is None:
            return None
        if isinstance(model, Hierarchical):
            return _without_head(layout, "trunk")
        # VGG's own classifier is a part of that head, under the same names.
        return layout if isinstance(trunk, VGG) else _without_head(layout)
    return None


def _without_head(layout: Layout, *under: str) -> Layout:
    """The layout of a model's part in front of its head, which another has at the path `under`."""
    entries = [
        entry._replace(path=(entry.path[0], *under, *entry.path[1:]))
        for entry in layout.entries
        if not entry.of_head
    ]
    return layout._replace(entries=tuple(entries))


def remedy(model: nn.Module, tensors: Container[str]) -> str | None:
    """Returns what to set so that a file with these tensors fits, as `model.batch_norm=False`.

    None where no single option of the model or of its trunk makes it the network of the file.
    """
    fields = {field.name for field in dataclasses.fields(model)}
    of_trunk = model_options(model.trunk) if "trunk_options" in fields else {}
    for option, value in CHOICES:
        changes: dict[str, Any] = {option: value}
        if option not in fields:
            if option not in of_trunk:
                continue
            changes = {"trunk_options": {**model.trunk_options, option: value}}
        layout = layout_of(model.clone(**changes))
        if layout is not None and all(
            entry.of_head or any(name in tensors for name in entry.names)
            for entry in layout.entries
        ):
            return f"model.{option}={value}"
    return None


def sizes(entry: Entry, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str | None:
    """Returns the options that make an array of ours as large as theirs, or None if none does."""
    if entry.kind != "flat" or len(theirs) != 2:
        return None
    side = math.isqrt(theirs[0] // CHANNELS[-1])
    if theirs[0] != side * side * CHANNELS[-1]:
        return None
    wanted = (("model.pool_size", side), ("model.head_width", theirs[1]))
    pairs = zip(wanted, theirs, ours, strict=True)
    return " and ".join(f"{option}={value}" for (option, value), a, b in pairs if a != b)


def _layer(
    path: tuple[str, ...], *names: str, kind: str = "conv", bias: bool = True
) -> Iterator[Entry]:
    yield Entry(("params", *path, "kernel"), tuple(f"{name}.weight" for name in names), kind)
    if bias:
        yield Entry(("params", *path, "bias"), tuple(f"{name}.bias" for name in names), "vector")


def _norm(path: tuple[str, ...], name: str) -> Iterator[Entry]:
    for collection, ours, theirs in (
        ("params", "scale", "weight"),
        ("params", "bias", "bias"),
        ("batch_stats", "mean", "running_mean"),
        ("batch_stats", "var", "running_var"),
    ):
        yield Entry((collection, *path, ours), (f"{name}.{theirs}",), "vector")


def _vgg(convs: tuple[int, ...], batch_norm: bool) -> Iterator[Entry]:
    """torchvision/models/vgg.py; timm keeps the dense layers as convolutions (`pre_logits`)."""
    index = 0
    for stage, count in enumerate(convs, 1):
        for i in range(1, count + 1):
            yield from _layer(("trunk", f"conv{stage}_{i}"), f"features.{index}")
            if batch_norm:
                yield from _norm(("trunk", f"norm{stage}_{i}"), f"features.{index + 1}")
            index += 3 if batch_norm else 2
        index += 1
    yield from _layer(("classifier", "dense1"), "classifier.0", "pre_logits.fc1", kind="flat")
    yield from _layer(("classifier", "dense2"), "classifier.3", "pre_logits.fc2", kind="dense")
    yield from _layer(("classifier", "head"), "classifier.6", "head.fc", kind="dense")


def _resnet(model: ResNet) -> Iterator[Entry]:
    """torchvision/models/resnet.py, whose names timm has too."""
    yield from _layer(("trunk", "conv1"), "conv1", bias=False)
    yield from _norm(("trunk", "norm1"), "bn1")
    for stage, blocks in enumerate(model.blocks, 1):
        for block in range(blocks):
            path, name = ("trunk", f"stage{stage}_block{block + 1}"), f"layer{stage}.{block}"
            for i in range(1, 4 if model.bottleneck else 3):
                yield from _layer((*path, f"conv{i}"), f"{name}.conv{i}", bias=False)
                yield from _norm((*path, f"norm{i}"), f"{name}.bn{i}")
            if block == 0 and (stage > 1 or model.bottleneck):
                shortcut = f"{name}.downsample"
                yield from _layer((*path, "conv_shortcut"), f"{shortcut}.0", bias=False)
                yield from _norm((*path, "norm_shortcut"), f"{shortcut}.1")
    yield from _layer(("head",), "fc", kind="dense")


def _googlenet() -> Iterator[Entry]:
    """torchvision/models/googlenet.py."""
    stems = {"stem1": "conv1", "stem2": "conv2", "stem3": "conv3"}
    branches = {
        "one": "branch1",
        "three_reduced": "branch2.0",
        "three": "branch2.1",
        "five_reduced": "branch3.0",
        "five": "branch3.1",
        "pooled": "branch4.1",
    }
    pairs: list[tuple[tuple[str, ...], str]] = [(("trunk", o), t) for o, t in stems.items()]
    for stage, blocks in enumerate(STAGES, 3):
        for letter in "abcde"[: len(blocks)]:
            block = f"inception{stage}{letter}"
            pairs += [(("trunk", block, o), f"{block}.{t}") for o, t in branches.items()]
    for path, name in pairs:
        yield from _layer((*path, "conv"), f"{name}.conv", bias=False)
        yield from _norm((*path, "norm"), f"{name}.bn")
    yield from _layer(("head",), "fc", kind="dense")


def to_ours(kind: str, array: np.ndarray) -> np.ndarray:
    """Turns their tensor into our array; a 1x1 or whole-map convolution serves as a dense layer."""
    if kind == "vector":
        return array
    if kind == "conv" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if kind == "flat" and array.ndim == 2:
        side = math.isqrt(array.shape[1] // CHANNELS[-1])
        if side * side * CHANNELS[-1] != array.shape[1]:
            return array.T
        array = array.reshape(-1, CHANNELS[-1], side, side)
    if kind in ("flat", "dense") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T


def to_theirs(kind: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`, in torchvision's form."""
    if kind == "vector":
        return array
    if kind == "conv":
        return array.transpose(3, 2, 0, 1)
    if kind == "flat":
        side = math.isqrt(array.shape[0] // CHANNELS[-1])
        maps = array.reshape(side, side, CHANNELS[-1], -1)
        return maps.transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
    return array.T
