"""Modules that the backward pass computes again, chosen by patterns over their paths.

Rematerialisation, or gradient checkpointing (Chen et al. 2016, Training deep nets with sublinear
memory cost), trades a second forward pass for the memory of what lies inside a module: of a module
that is named, only what goes into it is kept.
"""

import contextlib
import fnmatch
import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from flaxcls.errors import InputError


def check(params: Any, patterns: tuple[str, ...]) -> None:
    """Raises InputError for a pattern that matches no module.

    Args:
      params: a tree of parameters, or of their shapes.
      patterns: see `rematerialised`.
    """
    modules = {
        "/".join(parents)
        for path in flatten_dict(params)
        for parents in itertools.accumulate((name,) for name in path[:-1])
    }
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
            example = min(modules, key=lambda module: (module.count("/") != 1, module))
            raise InputError(
                f"train.remat: no module matches {pattern!r}; they have paths such as {example!r}"
            )


@contextlib.contextmanager
def rematerialised(patterns: tuple[str, ...]) -> Iterator[None]:
    """While a model is applied, the modules that match are computed again in its backward pass.

    Results stay as they are, running statistics and dropout included. Of modules inside each other
    the outermost counts.

    Args:
      patterns: shell patterns over module paths such as `trunk/stage1_block2`; `*` matches `/` too.
    """
    inside = False

    def intercept(function, arguments, options, context):
        nonlocal inside
        path = "/".join(context.module.path)
        matches = any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        if inside or not matches or context.method_name != "__call__":
            return function(*arguments, **options)

        def call(module, arrays):
            nonlocal inside
            inside = True
            try:
                return module(
                    *(arrays.get(i, given) for i, given in enumerate(arguments)), **options
                )
            finally:
                inside = False

        # Whether to train, and other such arguments, are no values to trace.
        arrays = {i: given for i, given in enumerate(arguments) if isinstance(given, jax.Array)}
        return nn.remat(call)(context.module, arrays)

    if not patterns:
        yield
        return
    with nn.intercept_methods(intercept):
        yield
