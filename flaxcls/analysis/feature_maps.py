"""Where a model can be cut: its last feature map, and its logits as a function of that map.

Nothing in a model has to be written for this. A model's program is traced once, as JAX would to
compile it, and taken apart at the map: what comes before makes the map, what comes after makes the
logits of it and can be differentiated by it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxcls import ops
from flaxcls.analysis import map_places
from flaxcls.batch import Preprocess

Variables: TypeAlias = Any
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A model in two parts, for one number of images N.

    Attributes:
      features: shape (N, h, w, c) and dtype of the map.
      alone: whether the logits see the images through the map alone.
      trunk: (variables, images) -> the map (N, h, w, c), and a list of what else the head needs.
      head: (variables, images, map, that list) -> logits (N, K).
    """

    features: jax.ShapeDtypeStruct
    alone: bool
    trunk: Callable[[Variables, jax.Array], tuple[jax.Array, list[jax.Array]]]
    head: Callable[[Variables, jax.Array, jax.Array, list[jax.Array]], jax.Array]


@dataclass(frozen=True)
class Traced:
    """A model's program for N images (N, S, S, C).

    Attributes:
      num_classes: K.
      sown: shapes of what the model sows into `intermediates`, with their paths.
      cut: the program in two parts; None where there is no feature map.
    """

    num_classes: int
    sown: list[tuple[Path, jax.ShapeDtypeStruct]]
    cut: Cut | None


@dataclass(frozen=True)
class PooledHead:
    """The dense layer on the map's mean over space that gives the logits, or a factor of them.

    Attributes:
      path: of the layer in `params`.
      is_factor: whether the logits are its output times something else.
    """

    path: Path
    is_factor: bool


def apply(model: nn.Module, variables: Variables, images: jax.Array) -> tuple[jax.Array, Any]:
    """Returns logits (N, K), a hierarchical model's those of the classes, and what it sowed."""
    output, captured = model.apply(variables, images, train=False, mutable=["intermediates"])
    logits = output[0] if isinstance(output, tuple) else output
    return logits, captured.get("intermediates", {})


def sown(intermediates: Any) -> list[tuple[Path, Any]]:
    """Returns every sown array with its path; the last part of a path is the name it got."""
    leaves = jax.tree_util.tree_leaves_with_path(intermediates)
    return [(tuple(k.key for k in path if hasattr(k, "key")), leaf) for path, leaf in leaves]


def trace(model: nn.Module, variables: Variables, p: Preprocess, dtype: Any, n: int) -> Traced:
    """Traces a model and cuts it at its last feature map.

    That is what it sows into `intermediates` under the name `features`. A model that sows none is
    cut at the last array (N, h, w, c) made with its parameters through which everything passes that
    its logits see of the images. A map of a single pixel is passed over for an earlier one.

    Args:
      variables: {"params", "batch_stats"}, or their shapes.
      p, dtype: size, channels and dtype of the images that the model sees.
      n: images a call.
    """
    traced, num_classes, found = _trace(model, variables, p, dtype, n)
    features = _last_map(traced.jaxpr, found)
    cut = None if features is None else _split(traced, features)
    return Traced(num_classes, found, cut)


def places(model: nn.Module, variables: Variables, p: Preprocess, cut: Cut) -> map_places.Places:
    """Returns where the pixels of the map lie in the image; evenly over it where that is unknown.

    Args: as `trace`, whose cut it was.
    """
    n, h, w, _ = cut.features.shape
    with ops.use_backend("flax"):  # whose operators say where they look
        traced, _, found = _trace(model, variables, p, cut.features.dtype, n)
    features = _last_map(traced.jaxpr, found)
    known = None
    if features is not None and features.aval.shape == cut.features.shape:
        known = map_places.places(traced.jaxpr, traced.jaxpr.invars[-1], features)
    return known or map_places.even(p.size, (h, w))


def _trace(
    model: nn.Module, variables: Variables, p: Preprocess, dtype: Any, n: int
) -> tuple[Any, int, list[tuple[Path, Any]]]:
    """Returns the program (variables, images) -> (logits, what is sown), and shapes of these."""
    images = jax.ShapeDtypeStruct((n, p.size, p.size, p.channels), dtype)
    shapes = jax.eval_shape(lambda tree: tree, variables)
    traced, (logits, intermediates) = jax.make_jaxpr(partial(apply, model), return_shape=True)(
        shapes, images
    )
    return traced, logits.shape[1], sown(intermediates)


def _last_map(program: Any, found: list[tuple[Path, Any]]) -> Any | None:
    """Returns the variable of a program (variables, images) -> (logits, ...) to cut it at."""
    outputs = zip(found, program.outvars[1:], strict=True)
    features = [variable for (path, _), variable in outputs if path[-1] == "features"]
    pixels, logits = program.invars[-1], program.outvars[0]
    made = {variable: i for i, eqn in enumerate(program.eqns) for variable in eqn.outvars}
    of_parameters = _influence(program.eqns, [*program.invars[:-1], *program.constvars])
    of_images = _influence(program.eqns, [pixels])

    def is_map(variable: Any) -> bool:
        if variable not in made or variable not in of_images or variable.aval.ndim != 4:
            return False
        n, h, w, _ = variable.aval.shape
        is_float = jnp.issubdtype(variable.aval.dtype, jnp.floating)
        return n == pixels.aval.shape[0] and h * w > 1 and is_float

    for variable in sorted(filter(is_map, features), key=made.__getitem__, reverse=True):
        if logits in _influence(program.eqns, [variable]):
            return variable
    for eqn in reversed(program.eqns):
        for variable in filter(is_map, eqn.outvars):
            # Of the images' own shape it is most likely them, scaled.
            if variable in of_parameters and variable.aval.shape[1:] != pixels.aval.shape[1:]:
                _, needed = _slice(program.eqns, [logits], {variable})
                if variable in needed and pixels not in needed:
                    return variable
    return None


def pooled_head(cut: Cut | None, variables: Variables) -> PooledHead | None:
    """Finds the dense layer whose weights draw class activation maps, by what it computes.

    With the layer's kernel 0 and bias 1 the logits are whatever its output is multiplied by, and
    times the output for a random map, computed here, they must be the logits of that map.
    """
    if cut is None or not cut.alone:
        return None
    dtype = cut.features.dtype
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.uniform(0.0, 1.0, cut.features.shape) ** 2, dtype)
    images = jnp.zeros(())  # the head does not look at them

    @partial(jax.jit, compiler_options=ops.compiler_options())
    def head(variables: Variables) -> jax.Array:
        return cut.head(variables, images, features, [])

    flat = flatten_dict({**variables["params"]})
    logits = np.asarray(head(variables), np.float64)
    mean = np.asarray(features, np.float64).mean((1, 2))
    # 5e-3: accelerators may round the factors of a matmul to 11 bits.
    tolerance = max(5e-3, 8 * float(jnp.finfo(dtype).eps)) * np.abs(logits).max()
    for path, kernel in flat.items():
        if path[-1] != "kernel" or kernel.shape != (mean.shape[1], logits.shape[1]):
            continue
        layer, biased = path[:-1], (*path[:-1], "bias") in flat
        factor, output = np.ones_like(logits), mean @ np.asarray(kernel, np.float64)
        if biased:
            output += np.asarray(flat[*layer, "bias"], np.float64)
            factor = np.asarray(head(neutral(variables, layer)), np.float64)
        if np.abs(factor * output - logits).max() <= tolerance:
            return PooledHead(layer, bool((factor != 1).any()))
    return None


def neutral(variables: Variables, path: Path) -> Variables:
    """The variables with a dense layer whose output is 1, whatever it sees."""
    flat = dict(flatten_dict({**variables["params"]}))
    flat[*path, "kernel"] = jnp.zeros_like(flat[*path, "kernel"])
    flat[*path, "bias"] = jnp.ones_like(flat[*path, "bias"])
    return {**variables, "params": unflatten_dict(flat)}


def at(variables: Variables, path: Path) -> Any:
    """Returns what stands at `path` in the parameters."""
    tree = variables["params"]
    for name in path:
        tree = tree[name]
    return tree


def _influence(eqns: Sequence[Any], starts: Iterable[Any]) -> set[Any]:
    """Returns the variables that depend on those of `starts`, with them."""
    found = set(starts)
    for eqn in eqns:
        if any(_is_variable(v) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _slice(
    eqns: Sequence[Any], outputs: Iterable[Any], given: set[Any]
) -> tuple[list[Any], set[Any]]:
    """Returns the equations that make `outputs` of what is `given`, and the variables they need."""
    wanted = set(filter(_is_variable, outputs))
    kept = []
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(set(eqn.outvars) - given):
            kept.append(eqn)
            wanted -= set(eqn.outvars) - given
            wanted.update(filter(_is_variable, eqn.invars))
    return kept[::-1], wanted


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _split(traced: Any, features: Any) -> Cut:
    """Splits a program of (variables, images) -> (logits, ...) at the variable `features`."""
    program = traced.jaxpr
    (position,) = (i for i, eqn in enumerate(program.eqns) if features in eqn.outvars)
    logits, pixels = program.outvars[0], program.invars[-1]
    after, starts = _slice(program.eqns, [logits], {features})
    alone = pixels not in starts
    if not alone:
        # What the map's predecessors made for the head too is made once.
        before = {v for eqn in program.eqns[: position + 1] for v in eqn.outvars}
        after, starts = _slice(program.eqns[position + 1 :], [logits], before)
    starts -= {features}
    rest = [v for eqn in program.eqns for v in eqn.outvars if v in starts]
    whole = _part(traced, program.eqns, program.invars, [features, *rest])
    last = _part(traced, after, [*program.invars, features, *rest], [logits])

    def trunk(variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        values = whole(*jax.tree.leaves(variables), images)
        return values[0], values[1:]

    def head(
        variables: Variables, images: jax.Array, features: jax.Array, rest: list[jax.Array]
    ) -> jax.Array:
        return last(*jax.tree.leaves(variables), images, features, *rest)[0]

    shape = jax.ShapeDtypeStruct(features.aval.shape, features.aval.dtype)
    return Cut(shape, alone, trunk, head)


def _part(traced: Any, eqns: Any, inputs: Any, outputs: Any) -> Callable[..., list[jax.Array]]:
    """The function of some of a program's equations."""
    program = traced.jaxpr.replace(eqns=eqns, invars=inputs, outvars=outputs)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, traced.consts))
