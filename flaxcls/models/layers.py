"""What the models share: layers with a model's initialisation and precision, and input checks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops
from flaxcls.errors import InputError

Initializer = nn.initializers.Initializer


def _uniform_bias(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's bias, which flax's initialisers cannot express."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _zeros(fan_in: int) -> Initializer:
    return nn.initializers.zeros


@dataclass(frozen=True)
class Initialisation:
    """Where the layers of a model start.

    Attributes:
      conv: initialiser of convolution kernels.
      dense: initialiser of dense kernels.
      bias: fan-in of the layer -> initialiser of its bias.
    """

    conv: Initializer
    dense: Initializer
    bias: Callable[[int], Initializer]


_scaling = nn.initializers.variance_scaling

# flax's own default; PyTorch's default, which is kaiming_uniform with a = sqrt(5), weights and
# biases in +-1/sqrt(fan_in); weights in +-sqrt(6/fan_in); and torchvision's VGG, which is also
# what `torchvision` means for networks that torchvision does not have. Its ResNet and GoogLeNet
# start in ways of their own.
INITIALISATIONS = {
    "flax": Initialisation(
        conv=nn.initializers.lecun_normal(), dense=nn.initializers.lecun_normal(), bias=_zeros
    ),
    "pytorch": Initialisation(
        conv=_scaling(1 / 3, "fan_in", "uniform"),
        dense=_scaling(1 / 3, "fan_in", "uniform"),
        bias=_uniform_bias,
    ),
    "kaiming_uniform": Initialisation(
        conv=_scaling(2.0, "fan_in", "uniform"),
        dense=_scaling(2.0, "fan_in", "uniform"),
        bias=_uniform_bias,
    ),
    "torchvision": Initialisation(
        conv=_scaling(2.0, "fan_out", "normal"), dense=nn.initializers.normal(0.01), bias=_zeros
    ),
    "torchvision_resnet": Initialisation(
        conv=_scaling(2.0, "fan_out", "normal"),
        dense=_scaling(1 / 3, "fan_in", "uniform"),
        bias=_uniform_bias,
    ),
    # Truncated at 200 standard deviations there, that is not at all.
    "torchvision_googlenet": Initialisation(
        conv=nn.initializers.normal(0.01), dense=nn.initializers.normal(0.01), bias=_uniform_bias
    ),
}


# What `init` of a model may be.
INIT_CHOICES = ("flax", "pytorch", "kaiming_uniform", "torchvision")


@dataclass(frozen=True)
class Layers:
    """The layers of one model, with its initialisation and precision filled in.

    Called inside a model's `__call__`, each method adds one layer under `name` and applies it.

    Attributes:
      init: a key of `INITIALISATIONS`: one of `INIT_CHOICES`, or what a family makes of it.
      dtype: dtype of the computation; None: what input and parameters promote to.
      param_dtype: dtype of the parameters.
    """

    init: str
    dtype: Any
    param_dtype: Any

    def of_family(self, family: str) -> "Layers":
        """These layers; where `init` is torchvision, with what torchvision's `family` starts from.

        `family` is resnet or googlenet.
        """
        own = f"{self.init}_{family}"
        return replace(self, init=own) if own in INITIALISATIONS else self

    def conv(
        self,
        x: jax.Array,
        features: int,
        kernel: int,
        *,
        name: str,
        strides: int = 1,
        padding: ops.Padding = "SAME",
        use_bias: bool = True,
    ) -> jax.Array:
        """Square convolution: x (N, H, W, C) -> (N, H', W', features)."""
        start = INITIALISATIONS[self.init]
        return ops.Conv(
            features,
            (kernel, kernel),
            (strides, strides),
            padding,
            use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=start.conv,
            bias_init=start.bias(kernel * kernel * x.shape[-1]),
            name=name,
        )(x)

    def dense(self, x: jax.Array, features: int, *, name: str) -> jax.Array:
        """x (N, F) -> (N, features)."""
        return self._dense(x, features, name, self.dtype)

    def logits(self, x: jax.Array, num_classes: int, *, name: str = "head") -> jax.Array:
        """The last dense layer, computed in at least float32: x (N, F) -> (N, num_classes).

        With 0 classes there is no such layer and x comes back, so that a model without its head
        is the trunk of another.
        """
        if num_classes == 0:
            return x
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self._dense(x, num_classes, name, None)

    def _dense(self, x: jax.Array, features: int, name: str, dtype: Any) -> jax.Array:
        start = INITIALISATIONS[self.init]
        return ops.Dense(
            features,
            dtype=dtype,
            param_dtype=self.param_dtype,
            kernel_init=start.dense,
            bias_init=start.bias(x.shape[-1]),
            name=name,
        )(x)

    def batch_norm(
        self,
        x: jax.Array,
        train: bool,
        *,
        name: str,
        epsilon: float = 1e-5,
        residual: jax.Array | None = None,
        relu: bool = False,
        pool: bool = False,
    ) -> jax.Array:
        """BatchNorm of x (N, H, W, C), by the batch's statistics if `train`, and what follows it.

        In this order: `residual`, of the same shape, is added; ReLU; a 2x2 max pool. Asked for
        here they cost almost nothing in training on CPU (see `ops.BatchNorm`).
        """
        norm = ops.BatchNorm(
            epsilon=epsilon, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )
        return norm(x, use_running_average=not train, residual=residual, relu=relu, pool=pool)

    def dropout(self, x: jax.Array, rate: float, train: bool) -> jax.Array:
        """x of any shape -> the same, a share `rate` of it zero and the rest scaled if `train`."""
        return nn.Dropout(rate, deterministic=not train)(x)


def flatten(x: jax.Array) -> jax.Array:
    """x (N, H, W, C) -> (N, H * W * C), rows first and channels last."""
    return x.reshape(x.shape[0], -1)


def global_mean(x: jax.Array) -> jax.Array:
    """x (N, H, W, C) -> its mean over space, (N, C), summed in at least float32."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def check_images(images: jax.Array, model: str, smallest: int) -> None:
    """Raise InputError unless `images` is (N, H, W, C) with H and W at least `smallest` pixels."""
    if images.ndim != 4:
        raise InputError(
            f"model {model}: images have shape {images.shape}; give them as (N, H, W, C)"
        )
    h, w = images.shape[1:3]
    if min(h, w) < smallest:
        raise InputError(
            f"model {model}: images of {h}x{w} pixels are too small; "
            f"the smallest it takes is {smallest}x{smallest}"
        )
