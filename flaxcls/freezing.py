"""Which parameters a run trains, chosen by patterns over their paths."""

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxcls import ops
from flaxcls.errors import InputError


class Selection(NamedTuple):
    """Shell patterns over parameter paths such as `trunk/conv1/kernel`; `*` matches `/` too.

    Attributes:
      frozen: what stays as it is.
      trainable: what is trained even where `frozen` matches; alone, all else is frozen.
    """

    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()

    def freezes(self, path: str) -> bool:
        """Whether the parameter at `path` stays as it is."""
        if _matches(path, self.trainable):
            return False
        return _matches(path, self.frozen) if self.frozen else bool(self.trainable)


EVERYTHING = Selection()


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check(params: Any, selection: Selection, rates: tuple[tuple[str, float], ...] = ()) -> None:
    """Raises InputError for a pattern that matches nothing, and where nothing is left to train.

    Args:
      params: a tree of parameters, or of their shapes.
      selection: what is frozen.
      rates: see `rate_factors`.
    """
    paths = list(flatten_dict(params, sep="/"))
    named = [("model.frozen", p) for p in selection.frozen]
    named += [("model.trainable", p) for p in selection.trainable]
    named += [("optimizer.rate_factors", p) for p, _ in rates]
    for key, pattern in named:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            tops = sorted({path.partition("/")[0] for path in paths})
            raise InputError(
                f"{key}: no parameter matches {pattern!r}; they begin with {', '.join(tops)}, "
                f"as in '{tops[0]}/*'"
            )
    if all(map(selection.freezes, paths)):
        raise InputError("model.frozen: nothing is left to train; freeze less")


def partition(params: Any, selection: Selection) -> tuple[Any, Any]:
    """Splits a tree of parameters into one that is trained and one that is frozen."""
    if selection == EVERYTHING:
        return params, {}
    flat = flatten_dict(params)
    frozen = {path for path in flat if selection.freezes("/".join(path))}
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in frozen}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in frozen}),
    )


def join(trained: Any, frozen: Any) -> Any:
    """Puts together what `partition` has split."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen)) if frozen else trained


@contextlib.contextmanager
def frozen_statistics(selection: Selection) -> Iterator[None]:
    """While a model is applied, frozen BatchNorms use their running statistics and keep them."""

    def intercept(function, arguments, options, context):
        module = context.module
        norms = (ops.BatchNorm, nn.BatchNorm)
        if not isinstance(module, norms) or context.method_name != "__call__":
            return function(*arguments, **options)
        if not selection.freezes("/".join((*module.path, "scale"))):
            return function(*arguments, **options)
        if getattr(module, "use_running_average", None) is None:
            return function(arguments[0], **options | {"use_running_average": True})
        # flax refuses an argument that was given as a field already.
        given = module.use_running_average
        object.__setattr__(module, "use_running_average", True)
        try:
            return function(*arguments, **options)
        finally:
            object.__setattr__(module, "use_running_average", given)

    if selection == EVERYTHING:
        yield
        return
    with nn.intercept_methods(intercept):
        yield


def rate_factors(params: Any, rates: tuple[tuple[str, float], ...]) -> Any:
    """Returns a tree like `params` of what multiplies each parameter's learning rate.

    `rates` are (pattern, factor); the first that matches counts, and 1 where none does.
    """
    flat = flatten_dict(params, sep="/")
    factors = {
        path: next((f for pattern, f in rates if fnmatch.fnmatchcase(path, pattern)), 1.0)
        for path in flat
    }
    return unflatten_dict(factors, sep="/")
