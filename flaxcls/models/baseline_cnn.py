"""The plain network of the product photos, and the layers that its relatives share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls.models.layers import Layers, check_images, global_mean
from flaxcls.models.registry import register

# Channels of the convolutions between pools.
GROUPS = ((16, 16), (32, 32), (64, 64), (128, 128))


def conv_relu_norm(
    layers: Layers, x: jax.Array, features: int, train: bool, number: int, *, pool: bool = False
) -> jax.Array:
    """3x3 convolution, ReLU, BatchNorm and, if `pool`, a 2x2 max pool, in this order.

    x (N, H, W, C) -> (N, H, W, features), or half as high and wide.
    """
    x = nn.relu(layers.conv(x, features, 3, name=f"conv{number}"))
    return layers.batch_norm(x, train, name=f"norm{number}", pool=pool)


class BaselineTrunk(nn.Module):
    """Eight 3x3 convolutions of 16 to 128 channels, a 2x2 max pool after every second.

    Attributes:
      layers: the layers' initialisation and precision.
      last_pool: whether the pool after the last is there.
    """

    layers: Layers
    last_pool: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> (N, H // 16, W // 16, 128).

        Without the last pool, H and W >= 8 -> (N, H // 8, W // 8, 128).

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "baseline_cnn", smallest=16 if self.last_pool else 8)
        x, number = images, 0
        for group in GROUPS:
            for features in group:
                number += 1
                pool = number % 2 == 0 and (self.last_pool or number < 8)
                x = conv_relu_norm(self.layers, x, features, train, number, pool=pool)
        return x


class BaselineCNN(nn.Module):
    """The trunk, the mean over space, the logits.

    Attributes:
      num_classes: classes.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = BaselineTrunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        return layers.logits(global_mean(x), self.num_classes)


register("baseline_cnn", BaselineCNN, BaselineTrunk)
