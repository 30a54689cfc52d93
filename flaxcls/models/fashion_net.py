"""The Fashion-MNIST networks that were published with class activation maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten


class FashionNet0(nn.Module):
    """A 5x5 convolution of 32, a 3x3 of 64, a dense layer of 4096, the logits.

    Attributes:
      num_classes: classes.
      initialisation: the option `init`: where the weights start, a key of `layers.INITIALISATIONS`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 12 -> logits (N, num_classes), at least float32.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "fashion_net0", smallest=12)
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = layers.conv(images, 32, 5, padding="VALID", name="conv1")
        x = ops.max_pool(nn.relu(x), (2, 2))
        x = layers.conv(x, 64, 3, padding="VALID", name="conv2")
        x = ops.max_pool(nn.relu(x), (2, 2))
        x = nn.relu(layers.dense(flatten(x), 4096, name="dense1"))
        return layers.logits(x, self.num_classes)
