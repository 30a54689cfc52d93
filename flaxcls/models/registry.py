"""Models and trunks by name: `create_model` checks every option before a model is made."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from flaxcls.errors import InputError, did_you_mean
from flaxcls.models.layers import Layers
from flaxcls.models.options import COMMON, TEXT, Rule, check, check_dtype, rule_of


class Entry(NamedTuple):
    """A registered model.

    Attributes:
      factory: makes the module from `num_classes` and the options; a `functools.partial` fixes
        what the name stands for and a user does not set.
      trunk: makes the module that maps images (N, H, W, C) to the final map (N, h, w, c), called
        as `trunk(layers, name=...)(images, train)`; None where the model has no such map.
      rules: what the values of the model's own options must be.
      nested: a model's name -> the options that it adds as this one's `trunk`; None: it has none.
    """

    factory: Callable[..., nn.Module]
    trunk: Callable[..., nn.Module] | None
    rules: dict[str, Rule]
    nested: Callable[[str], Mapping[str, Any]] | None


registry: dict[str, Entry] = {}

# Fields of every module that are no options.
_NO_OPTIONS = {"num_classes", "parent", "name", "trunk_options"}


def register(
    name: str,
    factory: Callable[..., nn.Module],
    trunk: Callable[..., nn.Module] | None = None,
    rules: Mapping[str, Rule] | None = None,
    nested: Callable[[str], Mapping[str, Any]] | None = None,
) -> None:
    """Enters a model under `name`.

    Args:
      name: as `create_model` takes it.
      factory: a module class, or a `functools.partial` of one, whose fields are `num_classes` and
        the options with their defaults; the option `init` is the field `initialisation`.
      trunk: a module class, or a partial of one, with the field `layers`, if there is a final map;
        its fields that have the name of one of the model's options take the value of that option.
      rules: what the values of options may be that neither `options.COMMON` nor their type tells.
      nested: of a model whose field `trunk` names another: which options of that one it takes
        besides its own, `model_options` or `trunk_options`; they are put into the field
        `trunk_options`.
    """
    registry[name] = Entry(factory, trunk, dict(rules or {}), nested)


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


def trunk_options(name: str) -> dict[str, Any]:
    """The options of a model that its final feature map depends on, with their defaults.

    Raises:
      InputError: the model is unknown, or has no final feature map.
    """
    fields = inspect.signature(_trunk(name)).parameters
    return {o: default for o, default in model_options(name).items() if o in fields}


def create_model(
    name: str, num_classes: int, *, module_name: str | None = None, **options: Any
) -> nn.Module:
    """Make the model `name`; options left out take its defaults, see `model_options`.

    Args:
      name: one of `list_models()`.
      num_classes: classes; 0 gives the network without its last layer, whose output are the
        features that this layer sees, (N, F).
      module_name: its name as a part of another module.
      **options: those of `model_options(name)`, and of a model with a `trunk` those of the trunk;
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
    of_trunk: dict[str, Any] = {}
    taken: Mapping[str, Any] = {}
    if entry.nested is not None:
        trunk = check("trunk", options.get("trunk", fields["trunk"].default), TEXT)
        _entry(trunk, "model.trunk")
        taken = entry.nested(trunk)
        of_trunk = {o: v for o, v in options.items() if o in taken and o not in known}
        create_model(trunk, 0, **of_trunk)  # checks them now, not when the model is first called
        options = {o: v for o, v in options.items() if o not in of_trunk}
    for option in options:
        if option not in known:
            raise InputError(
                f"model.{option}: {name} has no such option; it takes "
                + ", ".join(_shown(known | dict(taken)))
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


def create_trunk(
    name: str, init: str | None, dtype: Any, param_dtype: Any, **options: Any
) -> nn.Module:
    """Make the trunk of the model `name`; to be called inside another model's `__call__`.

    Args:
      name: one of `list_models()`.
      init: where its weights start; None: where those of the model start by default.
      dtype, param_dtype: see `layers.Layers`.
      **options: those of `trunk_options(name)`; what is left out takes the model's default.

    Raises:
      InputError: the model is unknown, or has no final feature map.
    """
    layers = Layers(init or model_options(name).get("init", "flax"), dtype, param_dtype)
    return _trunk(name)(layers=layers, name="trunk", **trunk_options(name) | options)


def _trunk(name: str) -> Callable[..., nn.Module]:
    trunk = _entry(name).trunk
    if trunk is None:
        have = [other for other in list_models() if registry[other].trunk is not None]
        raise InputError(
            f"model.trunk: {name} has no final feature map; {did_you_mean(name, have)}"
        )
    return trunk


def _entry(name: str, key: str = "model.name") -> Entry:
    if name not in registry:
        raise InputError(f"{key}: no model {name!r}; {did_you_mean(name, list_models())}")
    return registry[name]
