"""The product photos' network with stand-alone local self-attention (Ramachandran et al. 2019)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flaxcls import ops
from flaxcls.errors import InputError
from flaxcls.models.baseline_cnn import conv_relu_norm
from flaxcls.models.layers import Layers, check_images, global_mean
from flaxcls.models.options import COUNT, none_or
from flaxcls.models.registry import register

_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class LocalAttention(nn.Module):
    """Each pixel attends to the 3x3 pixels around it (section 3, eq. 1 and 2).

    Queries, keys and values are 1x1 convolutions without bias. A learnt offset of the row is
    added to the first half of the channels of a key, one of the column to the second half.
    Beyond the border keys are their offset alone and values are 0; both take part in the softmax.

    Attributes:
      features: channels of queries, keys and values, an even number.
      heads: groups of channels that share their weights; None: as many as channels, a product a
        channel, as published.
      layers: the layers' precision; kernels are Kaiming-normal by fan-out, offsets from N(0, 1).
    """

    features: int
    heads: int | None
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (N, H, W, C) -> (N, H, W, features)."""
        heads = self.heads or self.features
        if self.features % heads:
            raise InputError(
                f"model.heads: {self.features} channels do not divide into {heads} heads; "
                f"give a divisor of {self.features}"
            )
        query, key, value = (
            ops.Conv(
                self.features,
                (1, 1),
                use_bias=False,
                dtype=self.layers.dtype,
                param_dtype=self.layers.param_dtype,
                kernel_init=_FAN_OUT,
                name=name,
            )(x)
            for name in ("query", "key", "value")
        )
        normal, half = nn.initializers.normal(1.0), self.features // 2
        rows = self.param("row_offsets", normal, (3, half), self.layers.param_dtype)
        columns = self.param("column_offsets", normal, (3, half), self.layers.param_dtype)
        offsets = [jnp.concatenate([rows[i], columns[j]]) for i in range(3) for j in range(3)]
        offsets = promote_dtype(jnp.stack(offsets), dtype=query.dtype)[0]
        return attend_locally(query, key, value, offsets, heads)


def attend_locally(
    query: jax.Array, key: jax.Array, value: jax.Array, offsets: jax.Array, heads: int
) -> jax.Array:
    """Softmax-weighted sums of the values in the 3x3 pixels around each.

    The nine neighbours are nine shifted views of one padded map, which XLA reads in place; the
    gradient computes them again (`jax.checkpoint`), so that no array of 9 x (N, H, W, C) is kept.

    Args:
      query: (N, H, W, C); `key` and `value` likewise.
      offsets: (9, C), added to the key of each neighbour, row by row.
      heads: groups of channels whose products are summed and which share their weights.

    Returns:
      (N, H, W, C).
    """
    n, h, w, c = query.shape

    def shifted(x: jax.Array) -> list[jax.Array]:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(n, h, w, heads, c // heads)

    @jax.checkpoint
    def attend(query, key, value, offsets):
        wide = jnp.promote_types(query.dtype, jnp.float32)
        scores = [
            by_head((query * (near + offset)).astype(wide)).sum(-1)
            for near, offset in zip(shifted(key), offsets, strict=True)
        ]
        weights = _softmax(scores)
        values = map(by_head, shifted(value))
        total = sum(weight[..., None] * near for weight, near in zip(weights, values, strict=True))
        return jnp.asarray(total).reshape(n, h, w, c).astype(query.dtype)

    return attend(query, key, value, offsets)


def _softmax(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """Softmax over the arrays of a list, pixel by pixel."""
    largest = scores[0]
    for score in scores[1:]:
        largest = jnp.maximum(largest, score)
    exponentials = [jnp.exp(score - jax.lax.stop_gradient(largest)) for score in scores]
    total = sum(exponentials[1:], exponentials[0])
    return [exponential / total for exponential in exponentials]


class LocalAttentionTrunk(nn.Module):
    """The trunk of `baseline_cnn` with local attention between its last two convolutions.

    Attributes:
      layers: the layers' initialisation and precision.
      heads: of the attention; None: as many as channels.
    """

    layers: Layers
    heads: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> (N, H // 16, W // 16, 128).

        Raises:
          InputError: the images are too small.
        """
        check_images(images, "local_attention_cnn", smallest=16)
        x = images
        for i, features in enumerate((16, 16, 32, 32, 64, 64, 128), 1):
            x = conv_relu_norm(self.layers, x, features, train, i)
            if i % 2 == 0:
                x = ops.max_pool(x, (2, 2))
        x = nn.relu(LocalAttention(128, self.heads, self.layers, name="attention")(x))
        x = self.layers.batch_norm(x, train, name="attention_norm")
        return ops.max_pool(conv_relu_norm(self.layers, x, 128, train, 8), (2, 2))


class LocalAttentionCNN(nn.Module):
    """The trunk, the mean over space, the logits.

    Attributes:
      num_classes: classes.
      heads: of the attention; None: as many as channels, as published; 8 is the paper's form.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    heads: int | None = None
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C), H and W >= 16 -> logits (N, num_classes), at least float32."""
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = LocalAttentionTrunk(layers, self.heads, name="trunk")(images, train)
        self.sow("intermediates", "features", x)
        return layers.logits(global_mean(x), self.num_classes)


register(
    "local_attention_cnn", LocalAttentionCNN, LocalAttentionTrunk, rules={"heads": none_or(COUNT)}
)
