"""A model's layers as a table: output shapes, parameters, work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcls import ops


@dataclass(frozen=True)
class Layer:
    """One row: a module that has parameters or does arithmetic itself.

    Attributes:
      path: where the module stands in the model, also the path of its parameters.
      kind: its class.
      output: its result for one example: (H, W, C), or (F,).
      params: number of trainable parameters.
      flops: floating-point operations of the forward pass for one example.
    """

    path: str
    kind: str
    output: tuple[int, ...]
    params: int
    flops: int


def model_summary(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """A table of the model's layers, at most 100 columns wide for the models of this package.

    Nothing is computed. FLOPs are XLA's count for the plain operators (the forms that `ops` gives
    them on CPU reach the same results by other operations), and for convolutions the usual one,
    in which taps on padding count.

    Args:
      model: called as `model.apply(variables, images, train=False)`.
      input_shape: (H, W, C) of one image; a batch axis before it is ignored.
    """
    image = jax.ShapeDtypeStruct((1, *input_shape[-3:]), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with ops.use_backend("flax"):
        variables = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, image)
        layers = _layers(model, variables, image)
        flops = _flops(model, variables, (image,), {"train": False})
    params, stats = (_size(variables.get(name, {})) for name in ("params", "batch_stats"))
    megabytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables)) / 1e6

    rows = [("layer", "kind", "output", "parameters", "MFLOPs")]
    for layer in layers:
        shape = _times(layer.output)
        rows.append((layer.path, layer.kind, shape, f"{layer.params:,}", _mega(layer.flops)))
    rows.append(("total", "", "", f"{params:,}", _mega(flops)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body, total = (_line(row, widths) for row in rows)
    rule = "-" * len(header)
    return "\n".join(
        [
            f"{type(model).__name__}, input {_times(image.shape[1:])}: {params:,} parameters and "
            f"{stats:,} running statistics, {megabytes:,.1f} MB",
            "",
            header,
            rule,
            *body,
            rule,
            total,
            "",
            "MFLOPs: million floating-point operations of the forward pass for one image,",
            "a multiply and an add as two. The total includes activations and pooling.",
        ]
    )


def _layers(model: nn.Module, variables: Any, image: jax.ShapeDtypeStruct) -> list[Layer]:
    """The innermost modules that have parameters or do arithmetic, in the order of execution."""
    calls: list[tuple[nn.Module, Any, Any, Any]] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append((context.module, _shapes(args), _shapes(kwargs), _shapes(output)))
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)

    inner = {module.path[:i] for module, *_ in calls for i in range(len(module.path))}
    layers: list[Layer] = []
    seen: set[tuple[str, ...]] = set()
    for module, args, kwargs, output in calls:
        if module.path in inner:
            continue
        own = {name: _at(tree, module.path) for name, tree in variables.items()}
        # Parameters of a module that is called again count once.
        params = 0 if module.path in seen else _size(own.get("params", {}))
        seen.add(module.path)
        flops = _flops(module.clone(parent=None, name=None), own, args, kwargs)
        if params or flops:
            shape = jax.tree.leaves(output)[0].shape[1:]
            path = "/".join(module.path)
            layers.append(Layer(path, type(module).__name__, shape, params, flops))
    return layers


def _shapes(tree: Any) -> Any:
    """Arrays become their shapes and dtypes; anything else stays."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
        ),
        tree,
    )


def _flops(module: nn.Module, variables: Any, args: Any, kwargs: Any) -> int:
    """FLOPs of `module.apply(variables, *args, **kwargs)`, given shapes for the arrays."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

    def apply(variables: Any, *arrays: jax.Array) -> Any:
        given = iter(arrays)
        filled = [next(given) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return module.apply(variables, *args, **kwargs)

    arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]
    traced = jax.jit(apply).trace(variables, *arrays)
    return _xla_flops(traced) + sum(map(_padding_flops, _convolutions(traced.jaxpr.jaxpr)))


def _xla_flops(traced: Any) -> int:
    return int((traced.lower().cost_analysis() or {}).get("flops", 0))


def _convolutions(jaxpr: Any) -> Iterator[Any]:
    """The convolutions of a program and of all that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.conv_general_dilated_p:
            yield equation
        for called in jax.tree.leaves(equation.params):
            inner = getattr(called, "jaxpr", called)  # a closed one holds it
            if hasattr(inner, "eqns"):
                yield from _convolutions(inner)


def _padding_flops(convolution: Any) -> int:
    """What XLA leaves out of a convolution: 55 % of a 3x3 one on a map of 2x2."""
    images, kernel = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in convolution.invars)
    (output,) = convolution.outvars
    # (out, in / groups, h, w), whatever the order of the kernel's axes is.
    width = kernel.shape[convolution.params["dimension_numbers"].rhs_spec[0]]
    usual = 2 * output.aval.size * kernel.size // width
    alone = jax.jit(lambda x, k: convolution.primitive.bind(x, k, **convolution.params))
    return usual - _xla_flops(alone.trace(images, kernel))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The part of a variable tree that belongs to the module at `path`."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    names = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
    return "  ".join(names + numbers)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _mega(flops: int) -> str:
    return f"{flops / 1e6:,.3f}"
