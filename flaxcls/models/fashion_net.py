"""The Fashion-MNIST networks that were published with class activation maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten
from flaxcls.models.registry import register


class FashionNet0Trunk(nn.Module):
    """A 5x5 convolution of 32 and a 3x3 of 64, each followed by a 2x2 max pool.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 12 -> (N, H', W', 64), 5x5 from 28x28 pixels.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "fashion_net0", smallest=12)
        x = self.layers.conv(images, 32, 5, padding="VALID", name="conv1")
        x = ops.max_pool(nn.relu(x), (2, 2))
        x = nn.relu(self.layers.conv(x, 64, 3, padding="VALID", name="conv2"))
        return ops.max_pool(x, (2, 2))


class FashionNet0(nn.Module):
    """The trunk, a dense layer of 4096, the logits.

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
        """images (N, H, W, C), H and W >= 12 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = FashionNet0Trunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = nn.relu(layers.dense(flatten(x), 4096, name="dense1"))
        return layers.logits(x, self.num_classes)


register("fashion_net0", FashionNet0, FashionNet0Trunk)
