"""The product photos' network with attention to earlier maps (Yan et al. 2019, fig. 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.models.baseline_cnn import conv_relu_norm
from flaxcls.models.layers import Layers, check_images, global_mean
from flaxcls.models.registry import register


class Attention(nn.Module):
    """Where the last map says that an earlier one matters.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, local: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """local (N, H, W, C) and last (N, h, w, C') -> means of local and the map of weights.

        Returns:
          (N, C), weighted over space, and the weights (N, H, W), at least float32, of sum 1.
        """
        c = local.shape[-1]
        own = self.layers.conv(local, c, 1, use_bias=False, name="local")
        other = self.layers.conv(last, c, 1, use_bias=False, name="last")
        other = jax.image.resize(other, own.shape, "bilinear")
        scores = self.layers.conv(nn.relu(own + other), 1, 1, name="score")
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = nn.softmax(scores[..., 0], axis=(1, 2))
        return jnp.einsum("nhw,nhwc->nc", weights.astype(local.dtype), local), weights


class AttentionTrunk(nn.Module):
    """The trunk of `baseline_cnn`, which keeps two earlier maps.

    Attributes:
      layers: the layers' initialisation and precision.
    """

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """images (N, H, W, C) -> maps of 32, 64 and 128 channels, H / 2, H / 4 and H / 8 high.

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "attention_cnn", smallest=16)
        x, maps = images, []
        for i, features in enumerate((16, 16, 32, 32, 64, 64, 128, 128), 1):
            x = conv_relu_norm(self.layers, x, features, train, i, pool=i == 2)
            if i in (4, 6, 8):
                maps.append(x)
            if i in (4, 6):
                x = ops.max_pool(x, (2, 2))
        return maps[0], maps[1], maps[2]


class AttentionCNN(nn.Module):
    """The trunk; the logits of its last map's mean and of two earlier maps' attended means.

    `intermediates` hold the weights of attention, `attention1` (N, H // 2, W // 2) and `attention2`
    (N, H // 4, W // 4), for plotting.

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
        early, middle, last = AttentionTrunk(layers, name="trunk")(images, train)
        attended1, weights1 = Attention(layers, name="attend1")(early, last)
        attended2, weights2 = Attention(layers, name="attend2")(middle, last)
        self.sow("intermediates", "attention1", weights1)
        self.sow("intermediates", "attention2", weights2)
        last = ops.max_pool(last, (2, 2))
        self.sow("intermediates", "features", last)
        x = jnp.concatenate([global_mean(last), attended1, attended2], axis=-1)
        return layers.logits(x, self.num_classes)


register("attention_cnn", AttentionCNN)
