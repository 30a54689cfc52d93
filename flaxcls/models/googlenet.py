"""GoogLeNet with BatchNorm (Szegedy et al. 2015, table 1), without auxiliary heads.

`variant="published"` is the network of the Caltech-101 experiments, `variant="torchvision"` the one
whose ImageNet weights torchvision publishes (for inputs of mean 0.5 and standard deviation 0.5).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, global_mean
from flaxcls.models.options import SHARE, none_or, one_of
from flaxcls.models.registry import register


class Widths(NamedTuple):
    """Channels of an inception block."""

    one: int
    three_reduced: int
    three: int
    five_reduced: int
    five: int
    pooled: int


# The blocks between pools.
STAGES = (
    (Widths(64, 96, 128, 16, 32, 32), Widths(128, 128, 192, 32, 96, 64)),
    (
        Widths(192, 96, 208, 16, 48, 64),
        Widths(160, 112, 224, 24, 64, 64),
        Widths(128, 128, 256, 24, 64, 64),
        Widths(112, 144, 288, 32, 64, 64),
        Widths(256, 160, 320, 32, 128, 128),
    ),
    (Widths(256, 160, 320, 32, 128, 128), Widths(384, 192, 384, 48, 128, 128)),
)


class ConvNorm(nn.Module):
    """Convolution padded by half its kernel, BatchNorm, ReLU.

    Attributes:
      layers: the layers' initialisation and precision.
      features: channels of the output.
      kernel: height and width of the kernel.
      stride: step of the window.
      torchvision: no bias, and BatchNorm's epsilon is 1e-3.
    """

    layers: Layers
    features: int
    kernel: int
    stride: int = 1
    torchvision: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features)."""
        side = self.kernel // 2
        x = self.layers.conv(
            x,
            self.features,
            self.kernel,
            strides=self.stride,
            padding=((side, side), (side, side)),
            use_bias=not self.torchvision,
            name="conv",
        )
        epsilon = 1e-3 if self.torchvision else 1e-5
        return self.layers.batch_norm(x, train, name="norm", epsilon=epsilon, relu=True)


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1, 3x3; 1x1, 5x5; 3x3 max pool, 1x1.

    Attributes:
      layers: the layers' initialisation and precision.
      widths: channels of each convolution.
      torchvision: whether it is torchvision's, with 3x3 in place of 5x5.
    """

    layers: Layers
    widths: Widths
    torchvision: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x (N, H, W, C) -> (N, H, W, one + three + five + pooled)."""

        def conv(x: jax.Array, features: int, kernel: int, name: str) -> jax.Array:
            module = ConvNorm(
                self.layers, features, kernel, torchvision=self.torchvision, name=name
            )
            return module(x, train)

        w = self.widths
        pooled = ops.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        branches = [
            conv(x, w.one, 1, "one"),
            conv(conv(x, w.three_reduced, 1, "three_reduced"), w.three, 3, "three"),
            conv(
                conv(x, w.five_reduced, 1, "five_reduced"),
                w.five,
                3 if self.torchvision else 5,
                "five",
            ),
            conv(pooled, w.pooled, 1, "pooled"),
        ]
        return jnp.concatenate(branches, axis=-1)


class GoogLeNetTrunk(nn.Module):
    """The stem and nine inception blocks.

    Attributes:
      layers: the layers' initialisation and precision.
      variant: `published` or `torchvision`.
    """

    layers: Layers
    variant: str = "published"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C) -> (N, H', W', 1024), 7x7 from 224x224 pixels.

        Raises:
          InputError: the images are too small.
        """
        torchvision = self.variant == "torchvision"
        check_images(images, f"googlenet ({self.variant})", smallest=15 if torchvision else 1)

        layers = self.layers.of_family("googlenet")

        def conv(x: jax.Array, features: int, kernel: int, stride: int, name: str) -> jax.Array:
            module = ConvNorm(layers, features, kernel, stride, torchvision, name=name)
            return module(x, train)

        pool = _pool_unpadded if torchvision else _pool_padded
        x = pool(conv(images, 64, 7, 2, "stem1"), 3)
        if torchvision:
            x = conv(x, 64, 1, 1, "stem2")
        x = pool(conv(x, 192, 3, 1, "stem3"), 3)
        for stage, blocks in enumerate(STAGES, 3):
            for letter, widths in zip("abcde", blocks, strict=False):
                block = Inception(layers, widths, torchvision, name=f"inception{stage}{letter}")
                x = block(x, train)
            if stage == 3:
                x = pool(x, 3)
            elif stage == 4:
                x = pool(x, 2 if torchvision else 3)
        return x


def _pool_padded(x: jax.Array, window: int) -> jax.Array:
    return ops.max_pool(x, (window, window), (2, 2), ((1, 1), (1, 1)))


def _pool_unpadded(x: jax.Array, window: int) -> jax.Array:
    """PyTorch's ceil mode: a last window that sticks out counts too."""
    sides = [(0, (window - n) % 2) for n in x.shape[1:3]]
    return ops.max_pool(x, (window, window), (2, 2), sides)


class GoogLeNet(nn.Module):
    """The trunk, the mean over space, dropout, the logits.

    Attributes:
      num_classes: classes.
      variant: `published` or `torchvision`.
      dropout: share of the features that training drops; None: 0.4, or 0.2 in torchvision's.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    variant: str = "published"
    dropout: float | None = None
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C) -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype).of_family("googlenet")
        x = GoogLeNetTrunk(layers, self.variant, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        rate = self.dropout
        if rate is None:
            rate = 0.2 if self.variant == "torchvision" else 0.4
        return layers.logits(layers.dropout(global_mean(x), rate, train), self.num_classes)


register(
    "googlenet",
    GoogLeNet,
    GoogLeNetTrunk,
    rules={"variant": one_of("published", "torchvision"), "dropout": none_or(SHARE)},
)
