"""The product photos' network that reads patches of its feature maps as one sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flaxcls.errors import InputError
from flaxcls.models.baseline_cnn import BaselineTrunk
from flaxcls.models.layers import INITIALISATIONS, Layers, check_images, global_mean
from flaxcls.models.options import one_of
from flaxcls.models.registry import register


class LSTM(nn.Module):
    """Stacked LSTM layers (Hochreiter and Schmidhuber 1997) in PyTorch's form.

    A layer is one scan over the sequence. Its input projection does not depend on the scan, and is
    one matmul for the whole sequence in front of it.

    Attributes:
      layers: the parameters' initialisation and precision; `init` sees a fan-in of `features`.
      features: size of hidden and cell state.
      depth: stacked layers.
      biases: 2 for PyTorch's, one for the input and one for the hidden state, whose sum counts;
        1 for their sum alone.
    """

    layers: Layers
    features: int
    depth: int
    biases: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (N, T, F) -> the last layer's hidden states, (N, T, features)."""
        start = INITIALISATIONS[self.layers.init]
        bias_start, width = start.bias(self.features), 4 * self.features

        def parameter(name: str, init: Any, *shape: int) -> jax.Array:
            return self.param(name, init, shape, self.layers.param_dtype)

        for i in range(1, self.depth + 1):
            # Gates in PyTorch's order: input, forget, cell, output.
            kernel = parameter(f"input{i}_kernel", start.dense, x.shape[-1], width)
            bias = parameter(f"input{i}_bias", bias_start, width)
            if self.biases == 2:
                bias = bias + parameter(f"hidden{i}_bias", bias_start, width)
            recurrent = parameter(f"hidden{i}_kernel", start.dense, self.features, width)
            x, kernel, bias, recurrent = promote_dtype(
                x, kernel, bias, recurrent, dtype=self.layers.dtype
            )
            x = _run(x @ kernel + bias, recurrent)
        return x


def _run(projected: jax.Array, recurrent: jax.Array) -> jax.Array:
    """projected (N, T, 4 F) and recurrent (F, 4 F) -> hidden states (N, T, F)."""

    def step(state: tuple[jax.Array, jax.Array], gates: jax.Array) -> Any:
        hidden, cell = state
        state = _cell(gates + hidden @ recurrent, cell)
        return state, state[0]

    zeros = jnp.zeros((projected.shape[0], recurrent.shape[0]), projected.dtype)
    _, hidden = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(projected, 0, 1))
    return jnp.swapaxes(hidden, 0, 1)


def _cell(gates: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gates (N, 4 F) and cell (N, F) -> the new hidden state and cell, (N, F) each."""
    input_gate, forget_gate, cell_gate, output_gate = jnp.split(gates, 4, axis=-1)
    cell = nn.sigmoid(forget_gate) * cell + nn.sigmoid(input_gate) * jnp.tanh(cell_gate)
    return nn.sigmoid(output_gate) * jnp.tanh(cell), cell


class LSTMCNN(nn.Module):
    """The trunk of `baseline_cnn`, an LSTM over the patches of all its maps, the mean, the logits.

    Each channel's map is cut into patches. All patches of all channels, in the order (channel, row,
    column), are one sequence of vectors; its outputs go back to where the patches were.

    A photo of 224x224 pixels gives 128 maps of 7x7 patches, a sequence of 6,272 steps that cannot
    run side by side. Forward, the scan adds 15 ms to the 207 ms of the trunk (batch 8, two cores);
    its gradient, which keeps the states of all steps (N x 6,272 x 16 numbers a layer), makes that
    of `baseline_cnn` 2.9 times as long: 2.1 s for 0.74 s (`python benchmarks/local_attention.py`).

    Attributes:
      num_classes: classes.
      patch_size: height and width of a patch; the LSTM has as many features as a patch has pixels.
      lstm_layers: stacked layers of the LSTM.
      last_pool: whether the pool after the trunk stays.
      biases: biases a gate: 2, as published, or 1.
      initialisation: the option `init`: where the weights start, one of `layers.INIT_CHOICES`.
      dtype: dtype of the computation; None: what images and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    patch_size: int = 2
    lstm_layers: int = 2
    last_pool: bool = True
    biases: int = 2
    initialisation: str = "pytorch"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images (N, H, W, C) -> logits (N, num_classes), at least float32.

        Raises:
          InputError: the images are too small, or the trunk's map does not divide into patches.
        """
        self._check_size(images)
        layers = Layers(self.initialisation, self.dtype, self.param_dtype)
        x = BaselineTrunk(layers, self.last_pool, name="trunk")(images, train)
        sequence = to_patches(x, self.patch_size)
        lstm = LSTM(layers, self.patch_size**2, self.lstm_layers, self.biases, name="lstm")
        x = from_patches(lstm(sequence), x.shape, self.patch_size)
        self.sow("intermediates", "features", x)
        return layers.logits(global_mean(x), self.num_classes)

    def _check_size(self, images: jax.Array) -> None:
        stride = 16 if self.last_pool else 8
        unit = stride * self.patch_size
        check_images(images, "lstm_cnn", smallest=unit)
        h, w = images.shape[1:3]
        rows, columns = h // stride, w // stride
        if rows % self.patch_size or columns % self.patch_size:
            raise InputError(
                f"model lstm_cnn: images of {h}x{w} pixels give maps of {rows}x{columns}, which do "
                f"not divide into patches of {self.patch_size}; make height and width multiples of "
                f"{unit}, as in {h // unit * unit}x{w // unit * unit}, or at most {stride - 1} more"
            )


def to_patches(x: jax.Array, size: int) -> jax.Array:
    """x (N, H, W, C) -> its patches by channel, row and column, (N, C * H * W / size^2, size^2)."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(n, -1, size * size)


def from_patches(patches: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
    """The inverse of `to_patches` for maps of the shape (N, H, W, C)."""
    n, h, w, c = shape
    x = patches.reshape(n, c, h // size, w // size, size, size)
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(shape)


register("lstm_cnn", LSTMCNN, rules={"biases": one_of(1, 2)})
