"""Which arrays of a model are its head, so that weights of other classes may lack them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

Path = tuple[str, ...]

# The names that the head's layers have in the models of this package.
NAMES = ("head", "cam_head", "parent_head", "from_parent")


def head_of(
    model: nn.Module, variables: Mapping[Path, Any], image_shape: tuple[int, int, int] | None
) -> frozenset[Path]:
    """Returns the paths of the arrays whose shape depends on the number of classes or parents.

    Args:
      model: the module that the variables are of.
      variables: arrays or their shapes, by path.
      image_shape: (H, W, C) of the images that the variables were made for. With it, the head is
        what has another shape in the same model of one class and one parent more; without it, what
        has one of `NAMES`.
    """
    counts = {n: getattr(model, n) + 1 for n in ("num_classes", "num_parents") if hasattr(model, n)}
    if image_shape is None or not counts:
        return frozenset(path for path in variables if path[-2] in NAMES)
    return _changed(model.clone(**counts), variables, image_shape)


def class_layers(
    model: nn.Module, variables: Mapping[Path, Any], image_shape: tuple[int, int, int]
) -> tuple[Path, ...]:
    """Returns the paths of the layers that have an output for each class, sorted.

    A model whose logits are a product has two. A head for parents is none of them.

    Args:
      model: the module that the variables are of.
      variables: arrays or their shapes, by path.
      image_shape: (H, W, C) of the images that the variables were made for.
    """
    if not hasattr(model, "num_classes"):
        return ()
    wider = model.clone(num_classes=model.num_classes + 1)
    changed = _changed(wider, variables, image_shape)
    return tuple(sorted({path[1:-1] for path in changed}))


def _changed(
    model: nn.Module, variables: Mapping[Path, Any], image_shape: tuple[int, int, int]
) -> frozenset[Path]:
    """Returns the paths of the arrays that have another shape in this model."""
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    init = partial(model.init, train=False)
    wider = flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
    return frozenset(
        path
        for path, leaf in variables.items()
        if path in wider and wider[path].shape != tuple(leaf.shape)
    )
