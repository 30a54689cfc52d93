"""LeNet (LeCun et al. 1998) with ReLU and max pooling, as published for QuickDraw."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten
from flaxcls.models.registry import register


class LeNetTrunk(nn.Module):
    """Two 5x5 convolutions of 6 and 16 channels, each followed by a 2x2 max pool.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> (N, H', W', 16), H' = ((H - 4) // 2 - 4) // 2.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "lenet", smallest=16)
        x = self.layers.conv(images, 6, 5, padding="VALID", name="conv1")
        x = ops.max_pool(nn.relu(x), (2, 2))
        x = self.layers.conv(x, 16, 5, padding="VALID", name="conv2")
        return ops.max_pool(nn.relu(x), (2, 2))


class LeNet(nn.Module):
    """The trunk, a dense layer of 256, the logits.

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
        x = LeNetTrunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = nn.relu(layers.dense(flatten(x), 256, name="dense1"))
        return layers.logits(x, self.num_classes)


register("lenet", LeNet, LeNetTrunk)
