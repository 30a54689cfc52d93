"""What the value of a model's option must be, and how to say so."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcls.errors import InputError
from flaxcls.models.layers import INIT_CHOICES


class Rule(NamedTuple):
    """A condition on a value.

    Attributes:
      holds: whether a value satisfies it.
      wanted: what to give, in words.
    """

    holds: Callable[[Any], bool]
    wanted: str


def _is_count(value: Any) -> bool:
    # Sizes of more than 31 bits are none that XLA takes.
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*choices: Any) -> Rule:
    """The rule that a value is one of these, and of the same type."""

    def holds(value: Any) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return Rule(holds, f"one of {', '.join(map(str, choices))}")


def none_or(rule: Rule) -> Rule:
    """The rule that a value is None or satisfies another rule."""
    return Rule(lambda value: value is None or rule.holds(value), f"None or {rule.wanted}")


COUNT = Rule(_is_count, "a whole number of at least 1")
SHARE = Rule(_is_share, "a number from 0 to less than 1")
NUMBER = Rule(_is_number, "a finite number")
FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
TEXT = Rule(lambda value: isinstance(value, str), "text")
TUPLE = Rule(lambda value: isinstance(value, tuple), "a tuple, such as (1, 2)")
ANYTHING = Rule(lambda value: True, "anything")

# Options that several families have.
COMMON = {
    "num_classes": COUNT,
    "init": one_of(*INIT_CHOICES),
    "batch_norm": FLAG,
    "head_width": COUNT,
    "pool_size": none_or(COUNT),
    "dropout": SHARE,
    "cam_dropout": SHARE,
}
_BY_TYPE = {bool: FLAG, int: COUNT, float: NUMBER, str: TEXT, tuple: TUPLE}


def rule_of(option: str, default: Any, own: Mapping[str, Rule]) -> Rule:
    """The rule of an option: the model's own, the common one, or what its default's type says.

    A default of None, or none at all, says nothing.
    """
    if option in own:
        return own[option]
    if option in COMMON:
        return COMMON[option]
    return _BY_TYPE.get(type(default), ANYTHING)


def check(option: str, value: Any, rule: Rule) -> Any:
    """Returns the value, or raises InputError where it breaks the rule."""
    if not rule.holds(value):
        raise InputError(f"model.{option}: {value!r} is not possible; give {rule.wanted}")
    return value


def check_dtype(option: str, value: Any) -> Any:
    """A floating dtype or its name -> the dtype; None stays, for `dtype` alone."""
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
