"""Where the pixels of a feature map lie in the image: at the middles of what they see.

That is not where an even enlargement puts them: a strided convolution with as much padding on both
sides, as all of ResNet's, keeps the first pixel in the middle of the image's first pixel, so that
ResNet's last map, of 32 pixels a step, lies 15.5 pixels further up and left. Araujo, Norris and Sim
2019, "Computing Receptive Fields of Convolutional Neural Networks", section 2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.extend.core as jex
import numpy as np


class Axis(NamedTuple):
    """Middles of a map's rows, or columns, in pixels of the image, whose first has its middle at 0.

    Attributes:
      first: of the first.
      step: from one to the next.
    """

    first: float
    step: float


# Of rows and of columns.
Places: TypeAlias = tuple[Axis, Axis]


def even(size: int, shape: Sequence[int]) -> Places:
    """The places of a map (h, w) that covers an image of S x S pixels evenly."""
    rows, columns = (Axis((size / count - 1) / 2, size / count) for count in shape)
    return rows, columns


def enlargement(axis: Axis, count: int, size: int) -> np.ndarray:
    """Returns float32 (S, count), the shares of a map's rows in each row of the image.

    Linear between two middles, constant beyond the first and the last.
    """
    place = np.clip((np.arange(size) - axis.first) / axis.step, 0, count - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(count))).astype(np.float32)


def places(program: Any, images: Any, wanted: Any) -> Places | None:
    """Returns where a map of a traced program lies in its images, both (N, H, W, C).

    Args:
      program: jaxpr.
      images, wanted: variables of it.

    Returns:
      None where something on the way is none of the operators that keep or move places.
    """
    known = {images: (Axis(0.0, 1.0), Axis(0.0, 1.0))}
    _follow(program, known)
    return known.get(wanted)


def _follow(program: Any, known: dict[Any, Places]) -> None:
    """Adds to `known` the places of what the program makes of it."""
    for eqn in program.eqns:
        inner = next(_programs(eqn), None)
        if inner is not None and len(inner.invars) == len(eqn.invars):
            given = zip(inner.invars, eqn.invars, strict=True)
            inside = {here: known[there] for here, there in given if _is_in(there, known)}
            _follow(inner, inside)
            for here, there in zip(inner.outvars, eqn.outvars, strict=True):
                if _is_in(here, inside):
                    known[there] = inside[here]
            continue
        for made in eqn.outvars:
            found = _moved(eqn, made, known)
            if found is not None:
                known[made] = found


def _programs(eqn: Any) -> Iterator[Any]:
    """The program that an equation calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            program = eqn.params[name]
            yield program.jaxpr if isinstance(program, jex.ClosedJaxpr) else program


def _is_in(atom: Any, known: dict[Any, Places]) -> bool:
    return not isinstance(atom, jex.Literal) and atom in known


def _moved(eqn: Any, made: Any, known: dict[Any, Places]) -> Places | None:
    """Returns where the output of one operator lies."""
    sources = [atom for atom in eqn.invars if _is_in(atom, known)]
    if not sources or made.aval.ndim != 4:
        return None
    rows, columns = known[sources[0]]
    kind, params = eqn.primitive.name, eqn.params
    if kind == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        if numbers.lhs_spec[2:] != (1, 2) or numbers.out_spec[2:] != (1, 2):
            return None
        if set(params["lhs_dilation"]) != {1}:
            return None
        kernel = [eqn.invars[1].aval.shape[i] for i in numbers.rhs_spec[2:]]
        windows = zip(
            kernel, params["rhs_dilation"], params["window_strides"], params["padding"], strict=True
        )
    elif kind.startswith("reduce_window"):
        if set(params["base_dilation"]) != {1}:
            return None
        names = ("window_dimensions", "window_dilation", "window_strides", "padding")
        windows = zip(*(params[name][1:3] for name in names), strict=True)
    elif kind == "pad":
        low = [sides[0] for sides in params["padding_config"][1:3]]
        if any(sides[2] for sides in params["padding_config"][1:3]):
            return None
        windows = zip((1, 1), (1, 1), (1, 1), ((n, 0) for n in low), strict=True)
    else:
        # What works on each pixel alone.
        alike = [s for s in sources if s.aval.shape[:3] == made.aval.shape[:3]]
        return known[alike[0]] if alike and kind not in ("transpose", "rev") else None
    first, second = (
        _through(axis, *window) for axis, window in zip((rows, columns), windows, strict=True)
    )
    return first, second


def _through(axis: Axis, size: int, dilation: int, stride: int, padding: tuple[int, int]) -> Axis:
    """The middles of windows of some pixels of an axis."""
    middle = dilation * (size - 1) / 2 - padding[0]
    return Axis(axis.first + axis.step * middle, axis.step * stride)
