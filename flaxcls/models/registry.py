"""Models by name: `create_model` checks every option before a model is made."""

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls.errors import InputError, did_you_mean
from flaxcls.models import fashion_net, lenet, vgg
from flaxcls.models.layers import INITIALISATIONS

registry: dict[str, Callable[..., nn.Module]] = {
    "fashion_net0": fashion_net.FashionNet0,
    "lenet": lenet.LeNet,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16c": vgg.vgg16c,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
}

# What the names above fix and a user does not set.
_STRUCTURE = {"num_classes", "convs", "pointwise_last", "parent", "name"}


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the models that match a shell pattern such as `vgg*`."""
    return sorted(fnmatch.filter(registry, pattern))


def model_options(name: str) -> dict[str, Any]:
    """The options of a model with their defaults.

    Raises:
      InputError: the model is unknown.
    """
    if name not in registry:
        raise InputError(f"model.name: no model {name!r}; {did_you_mean(name, list_models())}")
    signature = inspect.signature(registry[name])
    return {
        "init" if option == "initialisation" else option: parameter.default
        for option, parameter in signature.parameters.items()
        if option not in _STRUCTURE
    }


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Make the model `name`; options left out take the values it was published with.

    Args:
      name: one of `list_models()`.
      num_classes: classes, at least 1.
      **options: those of `model_options(name)`; dtypes may be given by name.

    Returns:
      A module: `model.apply(variables, images, train=bool)` maps float images (N, H, W, C) to
      logits (N, num_classes) of at least float32.

    Raises:
      InputError: the model, an option or its value is unknown or impossible.
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            raise InputError(
                f"model.{option}: {name} has no such option; it takes {', '.join(known)}"
            )
    checked = {option: _checked(option, value) for option, value in options.items()}
    if "init" in checked:
        # A linen module's own method has the name `init`.
        checked["initialisation"] = checked.pop("init")
    return registry[name](num_classes=_checked("num_classes", num_classes), **checked)


def _checked(option: str, value: Any) -> Any:
    """`value` as the models take it, or InputError."""
    if option in ("dtype", "param_dtype"):
        return _float_dtype(option, value)
    holds, wanted = _RULES[option]
    if not holds(value):
        raise InputError(f"model.{option}: {value!r} is not possible; give {wanted}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


# For each option: what its value must satisfy, and how to say so.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_classes": (_is_count, "a whole number of at least 1"),
    "init": (
        lambda value: isinstance(value, str) and value in INITIALISATIONS,
        f"one of {', '.join(INITIALISATIONS)}",
    ),
    "batch_norm": (lambda value: isinstance(value, bool), "True or False"),
    "head_width": (_is_count, "a whole number of at least 1"),
    "pool_size": (
        lambda value: value is None or _is_count(value),
        "None or a whole number of at least 1",
    ),
    "dropout": (_is_share, "a number from 0 to less than 1"),
}


def _float_dtype(option: str, value: Any) -> Any:
    """A dtype or its name -> the dtype; None stays, for `dtype` alone."""
    if value is None and option == "dtype":
        return None
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"model.{option}: {value!r} is no floating dtype; give one such as float32 or bfloat16"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InputError(f"model.{option}: {dtype} needs jax_enable_x64; set it, or take float32")
    return dtype
