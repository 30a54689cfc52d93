"""The networks that were published for QuickDraw sketches of 28x28 pixels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, flatten, global_mean
from flaxcls.models.registry import register


class TSTrunk(nn.Module):
    """A 5x5 convolution of 96, a 5x5 and a 3x3 of 192, a 1x1 of 200; 3x3/2 pools after the 5x5s.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 27 -> (N, H', W', 200), 1x1 from 28x28 pixels.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "ts_cnn", smallest=27)
        x = nn.relu(self.layers.conv(images, 96, 5, padding="VALID", name="conv1"))
        x = ops.max_pool(x, (3, 3), (2, 2))
        x = nn.relu(self.layers.conv(x, 192, 5, padding="VALID", name="conv2"))
        x = ops.max_pool(x, (3, 3), (2, 2))
        x = nn.relu(self.layers.conv(x, 192, 3, padding="VALID", name="conv3"))
        return nn.relu(self.layers.conv(x, 200, 1, name="conv4"))


class TSCNN(nn.Module):
    """The trunk and a 1x1 convolution to the classes, fully convolutional.

    The published network flattens its 1x1 map. Here larger maps are averaged, and the last
    convolution is the dense layer that it equals.

    Attributes:
      num_classes: classes.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    initialisation: str = "kaiming_uniform"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 27 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = TSTrunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        return layers.logits(global_mean(x), self.num_classes)


class LikeVGGTrunk(nn.Module):
    """Two 3x3 convolutions of 32 and two of 64 with BatchNorm, a 2x2 max pool after each pair.

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
        check_images(images, "like_vgg", smallest=16)
        x = images
        for i, features in enumerate((32, 32, 64, 64), 1):
            x = self.layers.conv(x, features, 3, padding="VALID", name=f"conv{i}")
            pool = i in (2, 4)
            x = self.layers.batch_norm(x, train, name=f"norm{i}", relu=True, pool=pool)
        return x


class LikeVGG(nn.Module):
    """The trunk, a dense layer of 1024, the logits.

    Attributes:
      num_classes: classes.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    initialisation: str = "kaiming_uniform"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = LikeVGGTrunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = nn.relu(layers.dense(flatten(x), 1024, name="dense1"))
        return layers.logits(x, self.num_classes)


class AiInnoTrunk(nn.Module):
    """3x3 convolutions of 32, 64; 64, 128; 256 with ReLU, BatchNorm after each group.

    A 2x2 max pool follows the first two groups.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 24 -> (N, H', W', 256), 2x2 from 28x28 pixels.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "ai_inno_cnn", smallest=24)
        x = images
        for group, widths in enumerate(((32, 64), (64, 128), (256,)), 1):
            for i, features in enumerate(widths, 1):
                name = f"conv{group}_{i}"
                x = nn.relu(self.layers.conv(x, features, 3, padding="VALID", name=name))
            x = self.layers.batch_norm(x, train, name=f"norm{group}", pool=group < 3)
        return x


class AiInnoCNN(nn.Module):
    """The trunk, the mean over space, a dense layer of 200, the logits.

    Attributes:
      num_classes: classes.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    initialisation: str = "kaiming_uniform"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 24 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = AiInnoTrunk(layers, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = nn.relu(layers.dense(global_mean(x), 200, name="dense1"))
        return layers.logits(x, self.num_classes)


register("ts_cnn", TSCNN, TSTrunk)
register("like_vgg", LikeVGG, LikeVGGTrunk)
register("ai_inno_cnn", AiInnoCNN, AiInnoTrunk)
