"""ResNet (He et al. 2016) in torchvision's layout: the stride is in the 3x3 convolution (v1.5)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.layers import Layers, check_images, global_mean
from flaxcls.models.registry import register

WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck.

    Attributes:
      layers: the layers' initialisation and precision.
      width: channels of the 3x3 convolutions.
      stride: of the (first) 3x3 convolution.
      bottleneck: whether it is one, whose output has 4 times the width.
    """

    layers: Layers
    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), C')."""
        features = 4 * self.width if self.bottleneck else self.width
        if self.bottleneck:
            plan = [(self.width, 1, 1), (self.width, 3, self.stride), (features, 1, 1)]
        else:
            plan = [(self.width, 3, self.stride), (self.width, 3, 1)]
        shortcut = x
        if x.shape[-1] != features or self.stride != 1:
            shortcut = self._conv_norm(x, features, 1, self.stride, train, "_shortcut")
        for i, (width, kernel, stride) in enumerate(plan, 1):
            added = shortcut if i == len(plan) else None
            x = self._conv_norm(x, width, kernel, stride, train, str(i), residual=added, relu=True)
        return x

    def _conv_norm(
        self,
        x: jax.Array,
        features: int,
        kernel: int,
        stride: int,
        train: bool,
        suffix: str,
        **then: Any,
    ) -> jax.Array:
        side = kernel // 2
        x = self.layers.conv(
            x,
            features,
            kernel,
            strides=stride,
            padding=((side, side), (side, side)),
            use_bias=False,
            name=f"conv{suffix}",
        )
        return self.layers.batch_norm(x, train, name=f"norm{suffix}", **then)


class ResNetTrunk(nn.Module):
    """A 7x7/2 convolution, a 3x3/2 max pool and four stages of residual blocks.

    Attributes:
      layers: the layers' initialisation and precision.
      blocks: blocks a stage.
      bottleneck: whether blocks are bottlenecks.
    """

    layers: Layers
    blocks: tuple[int, int, int, int]
    bottleneck: bool

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C) -> (N, ceil(H / 32), ceil(W / 32), 512), or 2048 with bottlenecks.

        Raises:
          InputError: the images are no batch.
        """
        check_images(images, "resnet", smallest=1)
        layers = self.layers.of_family("resnet")
        x = layers.conv(
            images, 64, 7, strides=2, padding=((3, 3), (3, 3)), use_bias=False, name="conv1"
        )
        x = layers.batch_norm(x, train, name="norm1", relu=True)
        x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (width, blocks) in enumerate(zip(WIDTHS, self.blocks, strict=True), 1):
            for i in range(1, blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                name = f"stage{stage}_block{i}"
                x = Block(layers, width, stride, self.bottleneck, name=name)(x, train)
        return x


class ResNet(nn.Module):
    """The trunk, the mean over space, the logits.

    Attributes:
      num_classes: classes.
      blocks: blocks a stage.
      bottleneck: whether blocks are bottlenecks.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    blocks: tuple[int, int, int, int]
    bottleneck: bool
    initialisation: str = "torchvision"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C) -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype).of_family("resnet")
        x = ResNetTrunk(layers, self.blocks, self.bottleneck, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        return layers.logits(global_mean(x), self.num_classes)


_STRUCTURES: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
for _name, (_blocks, _bottleneck) in _STRUCTURES.items():
    register(
        _name,
        partial(ResNet, blocks=_blocks, bottleneck=_bottleneck),
        partial(ResNetTrunk, blocks=_blocks, bottleneck=_bottleneck),
    )
