"""The Caltech-101 networks whose channels grow by a rule, one to four convolutions deep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls.models.layers import Layers, check_images, flatten
from flaxcls.models.options import one_of
from flaxcls.models.registry import register

# Channels of one convolution -> of the next; the image counts as 3.
EXPANSIONS: dict[str, Callable[[int], int]] = {
    "add13": lambda channels: channels + 13,
    "double": lambda channels: 2 * channels if channels < 20 else channels + channels // 2,
    "triple": lambda channels: 3 * channels if channels < 50 else channels + channels // 6,
}


class ExpandingTrunk(nn.Module):
    """5x5 convolutions, each followed by ReLU, BatchNorm and a 2x2 max pool.

    Attributes:
      layers: the layers' initialisation and precision.
      depth: convolutions, 1 to 4.
      expansion: a key of `EXPANSIONS`.
    """

    layers: Layers
    depth: int = 4
    expansion: str = "triple"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 2^depth -> (N, H // 2^depth, W // 2^depth, C').

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "expanding_cnn", smallest=2**self.depth)
        x, channels = images, 3
        for i in range(1, self.depth + 1):
            channels = EXPANSIONS[self.expansion](channels)
            x = nn.relu(self.layers.conv(x, channels, 5, name=f"conv{i}"))
            x = self.layers.batch_norm(x, train, name=f"norm{i}", pool=True)
        return x


class ExpandingCNN(nn.Module):
    """The trunk, a dense layer of 256, the logits.

    Attributes:
      num_classes: classes.
      depth: convolutions, 1 to 4.
      expansion: how channels grow: `add13` by 13; `double` to 2x below 20, else by half; `triple`
        to 3x below 50, else by a sixth.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    depth: int = 4
    expansion: str = "triple"
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 2^depth -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = ExpandingTrunk(layers, self.depth, self.expansion, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        x = nn.relu(layers.dense(flatten(x), 256, name="dense1"))
        return layers.logits(x, self.num_classes)


register(
    "expanding_cnn",
    ExpandingCNN,
    ExpandingTrunk,
    rules={"depth": one_of(1, 2, 3, 4), "expansion": one_of(*EXPANSIONS)},
)
