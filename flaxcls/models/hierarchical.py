"""Two heads on one trunk: the class of an image, and the parent of its class."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from flaxcls.errors import InputError
from flaxcls.models.layers import Layers
from flaxcls.models.registry import create_model, model_options, register


class HierarchicalLogits(NamedTuple):
    """What a hierarchical model returns.

    Attributes:
      child: logits of the classes, (N, K), at least float32.
      parent: logits of their parents, (N, P), likewise.
    """

    child: jax.Array
    parent: jax.Array


class Hierarchical(nn.Module):
    """Any model without its last layer; parents from its features, classes from both.

    parent = Dense(P)(f); child = Dense(K)([Dense(512)(f), Dense(128)(parent)]), as published for
    pet breeds under cat and dog. Which parent a class has is the data's to say, and the loss's.

    Attributes:
      num_classes: K; with 0 the output are the trunk's features.
      trunk: a model's name.
      num_parents: P.
      trunk_options: the trunk's own options, which `create_model` takes as if they were this one's.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`;
        None: the trunk as by its default, the heads as `pytorch`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    trunk: str = "resnet18"
    num_parents: int = 2
    trunk_options: Mapping[str, Any] = FrozenDict()
    initialisation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> HierarchicalLogits | jax.Array:
        """images (N, H, W, C) -> `HierarchicalLogits`."""
        init = {} if self.initialisation is None else {"init": self.initialisation}
        wanted = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        precision = {k: v for k, v in wanted.items() if k in model_options(self.trunk)}
        trunk = create_model(
            self.trunk, 0, module_name="trunk", **init, **precision, **self.trunk_options
        )
        features = trunk(images, train)
        if features.shape[-1] == 0:
            raise InputError(
                f"model.trunk: {self.trunk} gives no features without its last layer; leave that "
                "layer out where num_classes is 0, as layers.Layers.logits does"
            )
        if self.num_classes == 0:
            return features
        layers = Layers(self.initialisation or "pytorch", self.dtype, self.param_dtype)
        parent = layers.logits(features, self.num_parents, name="parent_head")
        own = layers.dense(features, 512, name="own")
        from_parent = layers.dense(parent, 128, name="from_parent")
        joined = jnp.concatenate([own, from_parent], axis=-1)
        return HierarchicalLogits(layers.logits(joined, self.num_classes), parent)


register("hierarchical", Hierarchical, nested=model_options)
register("hierarchical_resnet18", partial(Hierarchical, trunk="resnet18"), nested=model_options)
