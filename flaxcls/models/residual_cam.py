"""A classifier whose logits are multiplied by those of a global average pool, for CAMs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from flaxcls import ops
from flaxcls.models.layers import Layers, flatten, global_mean
from flaxcls.models.registry import create_trunk, register, trunk_options
from flaxcls.models.vgg import VGGClassifier


class ResidualCAM(nn.Module):
    """Any trunk with a final feature map f; VGG's classifier on it times the logits of its mean.

    logits = classifier(Flatten f) * Dense(dropout(GAP(f))), elementwise, as published for apparel.
    The second factor's dense layer has the name `cam_head`: class activation maps (Zhou et al.
    2016) are drawn with its weights.

    Attributes:
      num_classes: classes; with 0 the output is the mean of f.
      trunk: the name of a model that has a final feature map.
      pool_size: f is averaged to this height and width; None takes it as it is.
      head_width: features of the classifier's hidden dense layers.
      dropout: share of their outputs that training drops.
      cam_dropout: share of the mean that training drops.
      trunk_options: the trunk's own options, which `create_model` takes as if they were this one's.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`;
        None: the trunk as by its default, the heads as `torchvision`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    trunk: str = "vgg16"
    pool_size: int | None = 7
    head_width: int = 4096
    dropout: float = 0.5
    cam_dropout: float = 0.3
    trunk_options: Mapping[str, Any] = FrozenDict()
    initialisation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C) -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation or "torchvision", self.dtype, self.param_dtype)
        trunk = create_trunk(
            self.trunk, self.initialisation, self.dtype, self.param_dtype, **self.trunk_options
        )
        x = trunk(images, train)
        if self.pool_size is not None:
            x = ops.adaptive_avg_pool(x, self.pool_size)
        self.sow("intermediates", "features", x)
        mean = global_mean(x)
        if self.num_classes == 0:
            return mean
        mean = layers.dropout(mean, self.cam_dropout, train)
        factor = layers.logits(mean, self.num_classes, name="cam_head")
        classifier = VGGClassifier(
            self.num_classes, self.head_width, self.dropout, layers, name="classifier"
        )
        return classifier(flatten(x), train) * factor


register("residual_cam", ResidualCAM, nested=trunk_options)
register("vgg16_residual_cam", partial(ResidualCAM, trunk="vgg16"), nested=trunk_options)
