"""Models and trunks by name: `create_model` checks every option before a model is made."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from flaxcls.errors import InputError, did_you_mean
from flaxcls.models.layers import Layers
from flaxcls.models.options import COMMON, Rule, check, check_dtype, rule_of


class Entry(NamedTuple):
    """A registered model.

    Attributes:
      factory: makes the module from `num_classes` and the options; a `functools.partial` fixes
        what the name stands for and a user does not set.
      trunk: makes the module that maps images (N, H, W, C) to the final map (N, h, w, c), called
        as `trunk(layers, name=...)(images, train)`; None where the model has no such map.
      rules: what the values of the model's own options must be.
    """

    factory: Callable[..., nn.Module]
    trunk: Callable[..., nn.Module] | None
    rules: dict[str, Rule]


registry: dict[str, Entry] = {}

# Fields of every module that are no options.
_NO_OPTIONS = {"num_classes", "parent", "name", "trunk_options"}


def register(
    name: str,
    factory: Callable[..., nn.Module],
    trunk: Callable[..., nn.Module] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> None:
    """Enters a model under `name`.

    Args:
      name: as `create_model` takes it.
      factory: a module class, or a `functools.partial` of one, whose fields are `num_classes` and
        the options with their defaults; the option `init` is the field `initialisation`. One with
        the field `trunk_options` takes the options of the model that `trunk` names, too.
      trunk: a module class, or a partial of one, with the field `layers`, if there is a final map.
      rules: what the values of options may be that neither `options.COMMON` nor their type tells.
    """
    registry[name] = Entry(factory, trunk, dict(rules or {}))


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the models that match a shell pattern such as `vgg*`."""
    return sorted(fnmatch.filter(registry, pattern))


def model_options(name: str) -> dict[str, Any]:
    """The options of a model with their defaults.

    Raises:
      InputError: the model is unknown.
    """
    factory = _entry(name).factory
    fixed = getattr(factory, "keywords", {})
    return {
        "init" if option == "initialisation" else option: parameter.default
        for option, parameter in inspect.signature(factory).parameters.items()
        if option not in _NO_OPTIONS and option not in fixed
    }


def create_model(
    name: str, num_classes: int, *, module_name: str | None = None, **options: Any
) -> nn.Module:
    """Make the model `name`; options left out take the values it was published with.

    Args:
      name: one of `list_models()`.
      num_classes: classes; 0 gives the network without its last layer, whose output are the
        features that this layer sees, (N, F).
      module_name: its name as a part of another module.
      **options: those of `model_options(name)`, and of a hierarchical model those of its trunk;
        dtypes may be given by name.

    Returns:
      A module: `model.apply(variables, images, train=bool)` maps float images (N, H, W, C) to
      logits (N, num_classes) of at least float32.

    Raises:
      InputError: the model, an option or its value is unknown or impossible.
    """
    known = model_options(name)
    entry = registry[name]
    fields = inspect.signature(entry.factory).parameters
    of_trunk = {}
    if "trunk_options" in fields:
        trunk = options.get("trunk", fields["trunk"].default)
        taken = model_options(trunk)
        of_trunk = {o: v for o, v in options.items() if o in taken and o not in known}
        create_model(trunk, 0, **of_trunk)  # checks them now, not when the model is first called
        options = {o: v for o, v in options.items() if o not in of_trunk}
    for option in options:
        if option not in known:
            raise InputError(
                f"model.{option}: {name} has no such option; it takes {', '.join(_shown(known))}"
            )
    checked = {
        option: check_dtype(option, value)
        if option in ("dtype", "param_dtype")
        else check(option, value, rule_of(option, known[option], entry.rules))
        for option, value in options.items()
    }
    if "init" in checked:
        # A linen module's own method has the name `init`.
        checked["initialisation"] = checked.pop("init")
    if num_classes != 0 or isinstance(num_classes, bool):
        check("num_classes", num_classes, COMMON["num_classes"])
    if of_trunk:
        checked["trunk_options"] = of_trunk
    return entry.factory(num_classes=num_classes, name=module_name, **checked)


def _shown(options: dict[str, Any]) -> list[str]:
    """Names of options that a config sets: precision decides on the dtypes."""
    return [option for option in options if option not in ("dtype", "param_dtype")]


def create_trunk(name: str, layers: Layers, *, module_name: str = "trunk") -> nn.Module:
    """Make the trunk of the model `name`; to be called inside another model's `__call__`.

    Raises:
      InputError: the model is unknown, or has no final feature map.
    """
    trunk = _entry(name).trunk
    if trunk is None:
        have = [other for other in list_models() if registry[other].trunk is not None]
        raise InputError(
            f"model.trunk: {name} has no final feature map; {did_you_mean(name, have)}"
        )
    return trunk(layers=layers, name=module_name)


def _entry(name: str) -> Entry:
    if name not in registry:
        raise InputError(f"model.name: no model {name!r}; {did_you_mean(name, list_models())}")
    return registry[name]
