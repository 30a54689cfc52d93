"""The product photos' network with stand-alone local self-attention (Ramachandran et al. 2019)."""

from functools import partial, reduce
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
from flaxcls.ops.channels import channel_mean

_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class LocalAttention(nn.Module):
    """Each pixel attends to the 3x3 pixels around it (section 3, eq. 1 and 2).

    Queries, keys and values are 1x1 convolutions without bias. A learnt offset of the row is
    added to the first half of the channels of a key, one of the column to the second half.
    Beyond the border keys are their offset alone and values are 0; both take part in the softmax.
    `intermediates`, where they are asked for, hold the weights as `attention`: (N, H, W, 3, 3,
    heads), at least float32, of each pixel those of the row and the column around it, of sum 1.

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
        """x (N, H, W, C) -> (N, H, W, features).

        Raises:
          InputError: the features do not divide into the heads.
        """
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
        if self.is_mutable_collection("intermediates"):  # nothing else ever makes all of them
            self.sow("intermediates", "attention", attention_weights(query, key, offsets, heads))
        return attend_locally(query, key, value, offsets, heads)


def attention_weights(
    query: jax.Array, key: jax.Array, offsets: jax.Array, heads: int
) -> jax.Array:
    """The weights that `attend_locally` sums the values with, (N, H, W, 3, 3, heads)."""
    weights = nn.softmax(jnp.stack(_scores(query, key, offsets, heads), axis=3), axis=3)
    return weights.reshape(*weights.shape[:3], 3, 3, heads)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_locally(
    query: jax.Array, key: jax.Array, value: jax.Array, offsets: jax.Array, heads: int
) -> jax.Array:
    """Softmax-weighted sums of the values in the 3x3 pixels around each.

    The nine neighbours are nine shifted views of one padded map, which XLA reads in place. The
    gradient is written out: it makes each weight again from the logarithm of the sum that divides
    it, so that nothing of the size 9 x (N, H, W, C) is kept. For 8 x 28 x 28 x 128 with a head a
    channel it takes 39 ms on two cores, and 3,071 ms if left to automatic differentiation
    (`python benchmarks/local_attention.py`).

    Args:
      query: (N, H, W, C); `key` and `value` likewise.
      offsets: (9, C), added to the key of each neighbour, row by row.
      heads: groups of channels whose products are summed and which share their weights.

    Returns:
      (N, H, W, C).
    """
    return _attend(query, key, value, offsets, heads)[0]


def _attend(query, key, value, offsets, heads):
    """Returns the result and the logarithm of the softmax's denominator, (N, H, W, heads)."""
    scores = _scores(query, key, offsets, heads)
    largest = reduce(jnp.maximum, scores)
    weights = [jnp.exp(score - largest) for score in scores]
    total = reduce(jnp.add, weights)
    c = query.shape[-1]
    terms = [_widen(w, c) * near for w, near in zip(weights, _neighbours(value), strict=True)]
    result = reduce(jnp.add, terms) / _widen(total, c)
    return result.astype(query.dtype), largest + jnp.log(total)


def _attend_forward(query, key, value, offsets, heads):
    result, log_total = _attend(query, key, value, offsets, heads)
    return result, (query, key, value, offsets, result, log_total)


def _attend_backward(heads, saved, gradient):
    query, key, value, offsets, result, log_total = saved
    c = query.shape[-1]
    scores = _scores(query, key, offsets, heads)
    weights = [jnp.exp(score - log_total) for score in scores]
    mean = _sum_in_heads(gradient * result, heads)
    # Of the scores, at each channel of the head.
    of_scores = [
        _widen(weight * (_sum_in_heads(gradient * near, heads) - mean), c)
        for weight, near in zip(weights, _neighbours(value), strict=True)
    ]
    shifted_keys = [n + o for n, o in zip(_neighbours(key), offsets, strict=True)]
    of_query = reduce(jnp.add, [s * k for s, k in zip(of_scores, shifted_keys, strict=True)])
    of_keys = [s * query for s in of_scores]
    of_values = [_widen(weight, c) * gradient for weight in weights]
    pixels = query.size // c
    # As a mean, which is a matmul on CPU: a sum over the leading axes takes 20 times as long.
    of_offsets = jnp.stack([channel_mean(x) * pixels for x in of_keys])
    return (
        of_query.astype(query.dtype),
        _gathered(of_keys).astype(key.dtype),
        _gathered(of_values).astype(value.dtype),
        of_offsets.astype(offsets.dtype),
    )


attend_locally.defvjp(_attend_forward, _attend_backward)

_PLACES = [(i, j) for i in range(3) for j in range(3)]


def _neighbours(x: jax.Array) -> list[jax.Array]:
    """x (N, H, W, C) -> what lies at each place of the 3x3 around every pixel, nine times that."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + h, j : j + w] for i, j in _PLACES]


def _gathered(parts: list[jax.Array]) -> jax.Array:
    """The transpose of `_neighbours`: nine (N, H, W, C) -> (N, H, W, C)."""
    padded = [
        jnp.pad(x, ((0, 0), (i, 2 - i), (j, 2 - j), (0, 0)))
        for x, (i, j) in zip(parts, _PLACES, strict=True)
    ]
    return reduce(jnp.add, padded)[:, 1:-1, 1:-1]


def _scores(query: jax.Array, key: jax.Array, offsets: jax.Array, heads: int) -> list[jax.Array]:
    """Products of the queries with each neighbour's key, (N, H, W, heads), at least float32."""
    return [
        _sum_in_heads(query * (near + offset), heads)
        for near, offset in zip(_neighbours(key), offsets, strict=True)
    ]


def _sum_in_heads(x: jax.Array, heads: int) -> jax.Array:
    """x (N, H, W, C) -> its sums over the channels of each head, (N, H, W, heads)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n, h, w, c = x.shape
    return x if heads == c else x.reshape(n, h, w, heads, c // heads).sum(-1)


def _widen(x: jax.Array, c: int) -> jax.Array:
    """x (N, H, W, heads) -> (N, H, W, c), each head's number at all of its channels."""
    return x if x.shape[-1] == c else jnp.repeat(x, c // x.shape[-1], axis=-1)


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
            x = conv_relu_norm(self.layers, x, features, train, i, pool=i % 2 == 0)
        x = nn.relu(LocalAttention(128, self.heads, self.layers, name="attention")(x))
        x = self.layers.batch_norm(x, train, name="attention_norm")
        return conv_relu_norm(self.layers, x, 128, train, 8, pool=True)


class LocalAttentionCNN(nn.Module):
    """The trunk, the mean over space, the logits.

    `intermediates` hold the weights of attention for plotting, `trunk/attention/attention`
    (N, H // 8, W // 8, 3, 3, heads): of each pixel of the map those of the 3x3 around it.

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
