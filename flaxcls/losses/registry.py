"""The losses by name."""

import inspect
from collections.abc import Callable
from typing import Any

from flaxcls.errors import InputError, did_you_mean
from flaxcls.losses.distance import mse, multi_margin
from flaxcls.losses.entropy import cross_entropy, focal, kl_divergence
from flaxcls.losses.hierarchy import HIERARCHICAL_PARTS, hierarchical
from flaxcls.losses.loss import LossFunction

LOSSES: dict[str, Callable[..., LossFunction]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "kl_divergence": kl_divergence,
    "mse": mse,
    "multi_margin": multi_margin,
    "hierarchical": hierarchical,
}


def create_loss(name: str, **options: Any) -> LossFunction:
    """Returns the loss `name` of `LOSSES`, a function of logits and labels.

    Raises:
      InputError: the name or an option is unknown, or an option is out of its range.
    """
    _check_name(name)
    known = list(inspect.signature(LOSSES[name]).parameters)
    for option in options:
        if option not in known:
            raise InputError(f"loss.{option}: not used by {name!r}; {did_you_mean(option, known)}")
    return LOSSES[name](**options)


def parts_of(name: str) -> tuple[str, ...]:
    """Returns the names of the parts of the loss `name`, which `metrics.empty` is to be told.

    Raises:
      InputError: the name is unknown.
    """
    _check_name(name)
    return HIERARCHICAL_PARTS if name == "hierarchical" else ()


def _check_name(name: str) -> None:
    if name not in LOSSES:
        raise InputError(f"loss.name: unknown {name!r}; {did_you_mean(name, LOSSES)}")
