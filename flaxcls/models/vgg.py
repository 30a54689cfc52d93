"""VGG (Simonyan and Zisserman 2015, table 1), with batch normalisation by default.

Its `init` is torchvision's by default: fan-out scaling keeps the size of the signal through 16
convolutions also without batch normalisation, where PyTorch's plain default shrinks it to 0.4 of
itself a layer. The Caltech-101 results were published with that plain default, `init="pytorch"`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten
from flaxcls.models.registry import register

CHANNELS = (64, 128, 256, 512, 512)


class VGGTrunk(nn.Module):
    """Five stages of 3x3 convolutions, each halved by a max pool.

    Attributes:
      convs: convolutions a stage.
      pointwise_last: variant C: the last convolution of stages 3, 4 and 5 is 1x1.
      batch_norm: normalise between convolution and ReLU.
      layers: the layers' initialisation and precision.
    """

    convs: tuple[int, int, int, int, int]
    pointwise_last: bool
    batch_norm: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x (N, H, W, C), H and W >= 32 -> (N, H // 32, W // 32, 512).

        Raises:
          InputError: the images are too small.
        """
        check_images(x, "vgg", smallest=32)
        for stage, (features, convs) in enumerate(zip(CHANNELS, self.convs, strict=True), 1):
            for i in range(1, convs + 1):
                pointwise = self.pointwise_last and stage >= 3 and i == convs
                kernel = 1 if pointwise else 3
                x = self.layers.conv(x, features, kernel, name=f"conv{stage}_{i}")
                pool = i == convs
                if self.batch_norm:
                    norm = f"norm{stage}_{i}"
                    x = self.layers.batch_norm(x, train, name=norm, relu=True, pool=pool)
                else:
                    x = nn.relu(x)
                    x = ops.max_pool(x, (2, 2)) if pool else x
        return x


class VGGClassifier(nn.Module):
    """Two dense layers with ReLU and dropout, and the logits.

    Attributes:
      num_classes: classes.
      head_width: features of the two dense layers.
      dropout: share of their outputs that training drops.
      layers: the layers' initialisation and precision.
    """

    num_classes: int
    head_width: int
    dropout: float
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x (N, F) -> logits (N, num_classes), at least float32."""
        for i in (1, 2):
            x = nn.relu(self.layers.dense(x, self.head_width, name=f"dense{i}"))
            x = self.layers.dropout(x, self.dropout, train)
        return self.layers.logits(x, self.num_classes)


class VGG(nn.Module):
    """VGG for images of at least 32x32 pixels.

    Attributes:
      num_classes: classes.
      convs: convolutions a stage.
      pointwise_last: variant C: the last convolution of stages 3, 4 and 5 is 1x1.
      batch_norm: normalise between convolution and ReLU.
      head_width: features of the two hidden dense layers.
      dropout: share of their outputs that training drops.
      pool_size: the trunk's map is averaged to this height and width, as torchvision's to 7; None
        takes it as it is, so that the parameters depend on the size of the images.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    convs: tuple[int, int, int, int, int]
    pointwise_last: bool = False
    batch_norm: bool = True
    head_width: int = 4096
    dropout: float = 0.0
    pool_size: int | None = None
    initialisation: str = "torchvision"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 32 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = VGGTrunk(self.convs, self.pointwise_last, self.batch_norm, layers, name="trunk")(
            images, train
        )
        if self.pool_size is not None:
            x = ops.adaptive_avg_pool(x, self.pool_size)
        self.sow("intermediates", "features", x)
        classifier = VGGClassifier(
            self.num_classes, self.head_width, self.dropout, layers, name="classifier"
        )
        return classifier(flatten(x), train)


CONVS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16c": (2, 2, 3, 3, 3),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
for _name, _convs in CONVS.items():
    _pointwise = _name == "vgg16c"
    register(
        _name,
        partial(VGG, convs=_convs, pointwise_last=_pointwise),
        partial(VGGTrunk, convs=_convs, pointwise_last=_pointwise),
    )
