"""The Fashion-MNIST networks that were published with class activation maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten, global_mean
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


class FashionNet1Trunk(nn.Module):
    """Two 5x5 convolutions of 32 and 64 with BatchNorm, each followed by a 2x2 max pool.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> (N, H', W', 64), 4x4 from 28x28 pixels.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "fashion_net1", smallest=16)
        x = images
        for i, features in enumerate((32, 64), 1):
            x = self.layers.conv(x, features, 5, padding="VALID", name=f"conv{i}")
            x = self.layers.batch_norm(x, train, name=f"norm{i}", relu=True, pool=True)
        return x


class FashionNet1(nn.Module):
    """The trunk, dense layers of 120 and 84, the logits.

    Attributes:
      num_classes: classes.
      dropout: share of the first dense layer's outputs that training drops; half of it of the
        second's.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    dropout: float = 0.4
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = FashionNet1Trunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = flatten(x)
        for i, (features, rate) in enumerate(((120, self.dropout), (84, self.dropout / 2)), 1):
            x = layers.dropout(layers.dense(x, features, name=f"dense{i}"), rate, train)
            x = nn.relu(x)
        return layers.logits(x, self.num_classes)


class FashionNet2Trunk(nn.Module):
    """A 5x5 convolution of 32, a 2x2 max pool, a 3x3 convolution of 64.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 10 -> (N, H', W', 64), 10x10 from 28x28 pixels.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "fashion_net2", smallest=10)
        x = self.layers.conv(images, 32, 5, padding="VALID", name="conv1")
        x = ops.max_pool(nn.relu(x), (2, 2))
        return nn.relu(self.layers.conv(x, 64, 3, padding="VALID", name="conv2"))


class FashionNet2(nn.Module):
    """The trunk; the logits of its mean times those of a dense layer of 2048.

    The factor of the mean is what class activation maps are drawn from: its dense layer has the
    name `cam_head`.

    Attributes:
      num_classes: classes; with 0 the output is the mean of the trunk's map.
      dropout: share of what the last layers see that training drops.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    dropout: float = 0.3
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 10 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = FashionNet2Trunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        mean = global_mean(x)
        if self.num_classes == 0:
            return mean
        of_mean = layers.dropout(mean, self.dropout, train)
        of_map = layers.dropout(layers.dense(flatten(x), 2048, name="dense1"), self.dropout, train)
        return layers.logits(of_mean, self.num_classes, name="cam_head") * layers.logits(
            of_map, self.num_classes
        )


register("fashion_net0", FashionNet0, FashionNet0Trunk)
register("fashion_net1", FashionNet1, FashionNet1Trunk)
register("fashion_net2", FashionNet2, FashionNet2Trunk)
