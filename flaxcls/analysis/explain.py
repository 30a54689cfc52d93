"""Which pixels decided: maps of what speaks for a class, for any model of this package."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls import ops
from flaxcls.analysis import feature_maps
from flaxcls.analysis.class_maps import (
    Drawn,
    attention,
    attention_leaves,
    cam,
    gradient_map,
    mean_gradient,
    occlusion,
    second_order_weights,
)
from flaxcls.analysis.feature_maps import Cut, PooledHead, Traced, Variables, pooled_head, trace
from flaxcls.analysis.heat_maps import Box, bounding_box, draw_box, overlay, place_heat
from flaxcls.analysis.map_places import Places, enlargement, even
from flaxcls.batch import Preprocess, preprocess
from flaxcls.errors import InputError, did_you_mean, out_of_memory

__all__ = [
    "METHODS",
    "Box",
    "Explainer",
    "Maps",
    "available",
    "bounding_box",
    "draw_box",
    "overlay",
    "place_heat",
]

METHODS = ("cam", "grad_cam", "grad_cam_pp", "attention", "occlusion")
BATCH_SIZE = 32


class Maps(NamedTuple):
    """Where N images speak for a class.

    Attributes:
      heat: float32 (N, S, S), 0 to 1 by each image's own maximum, at the size that the model sees,
        a map's pixels in the middle of what they see (see `map_places`); 0 throughout where
        nothing speaks for the class.
      raw: float32 (N, h, w), the map itself, before negative values are cut off and it is scaled
        and enlarged.
      logits: float (N, K); those of the classes, not the parents, of a hierarchical model.
      classes: int64 (N,), the class each map is of.
    """

    heat: np.ndarray
    raw: np.ndarray
    logits: np.ndarray
    classes: np.ndarray


def available(
    model: nn.Module, variables: Variables, p: Preprocess, dtype: Any = jnp.float32
) -> tuple[str, ...]:
    """Returns the methods that explain this model, the best first; occlusion, the last, always.

    Args: as `Explainer`.
    """
    traced = trace(model, variables, p, dtype, 1)
    return _methods(traced, pooled_head(traced.cut, variables))


def _methods(traced: Traced, pooled: PooledHead | None) -> tuple[str, ...]:
    possible = {
        "cam": pooled is not None,
        "grad_cam": traced.cut is not None,
        "grad_cam_pp": traced.cut is not None,
        "attention": bool(attention_leaves(traced.sown)),
        "occlusion": True,
    }
    order = METHODS
    if pooled is not None and pooled.is_factor:
        # A map of one factor of two: in generated scenes its maximum lies on the object in 52 % of
        # the images, Grad-CAM's, which sees both, in 98 % (benchmarks/localisation.py).
        order = ("grad_cam", "grad_cam_pp", "cam", "attention", "occlusion")
    return tuple(method for method in order if possible[method])


class Explainer:
    """Draws the map of a class for images; the step is compiled once, for one batch size.

    Methods:
      cam: class activation maps (Zhou et al. 2016, "Learning Deep Features for Discriminative
        Localization", eq. 2), for models whose logits, or a factor of them, are a dense layer of
        the last map's mean: the map weighted by that layer's kernel. Of a factor it is not the
        whole story, so that Grad-CAM is the better choice there.
      grad_cam: Selvaraju et al. 2017, "Grad-CAM", eq. 1 and 2, for models with a feature map: the
        map weighted by the mean gradients of the class's logit.
      grad_cam_pp: Chattopadhay et al. 2018, "Grad-CAM++", eq. 10, 13 and 19, of exp(logit): finds
        several objects of a class better. Its weights are never negative, so that it follows
        what the model sees more, and the class less, than Grad-CAM does.
      attention: the weights that the model itself looks with; they are of no class.
      occlusion: Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks",
        section 4.2, for any model: how much the logarithm of the class's probability falls when a
        patch of the mean colour hides a place.

    Args:
      model: a flax module; `apply(variables, images, train=False)` gives logits.
      variables: {"params", "batch_stats"}.
      p: final size and normalisation of the images.
      method: one of `METHODS`, or `auto`, the first of `available`.
      dtype: of the images that the model sees.
      batch_size: images a call of the compiled step; the last batch is filled up.

    Attributes:
      method: the one that was chosen.

    Raises:
      InputError: the method is unknown, or impossible for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Variables,
        p: Preprocess,
        *,
        method: str = "auto",
        dtype: Any = jnp.float32,
        batch_size: int = BATCH_SIZE,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give at least 1")
        if method not in ("auto", *METHODS):
            remedy = did_you_mean(method, ("auto", *METHODS))
            raise InputError(f"--explain: no method {method!r}; {remedy}")
        self._variables = jax.device_put(variables)
        traced = trace(model, self._variables, p, dtype, batch_size)
        pooled = pooled_head(traced.cut, self._variables)
        methods = _methods(traced, pooled)
        self.method = methods[0] if method == "auto" else method
        if self.method not in methods:
            raise InputError(
                f"--explain: {self.method} cannot explain this model, which {_LACKS[self.method]}; "
                f"choose {' or '.join(methods)}"
            )
        self._batch_size = batch_size
        self._num_classes = traced.num_classes
        places = None
        if traced.cut is not None and self.method in _OF_MAP:
            places = feature_maps.places(model, self._variables, p, traced.cut)
        self._step = jax.jit(
            partial(_step, _drawing(self.method, model, traced.cut, pooled), p, dtype, places),
            compiler_options=ops.compiler_options(),
        )

    def __call__(self, images: np.ndarray, classes: np.ndarray | None = None) -> Maps:
        """Draws one map an image.

        Args:
          images: uint8 (N, H, W, C), of the size that the model sees or another, which is
            stretched; C is 1 or the model's.
          classes: int (N,), the class each map is to be of; None: the predicted ones.

        Raises:
          InputError: images or classes of another dtype or shape, or a class that is none.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise InputError(f"images are {_described(images)}; give uint8 (N, H, W, C)")
        if not len(images):
            raise InputError("there are no images; give at least one")
        wanted = np.full(len(images), -1)
        if classes is not None:
            wanted = _checked(classes, len(images), self._num_classes)
        parts = []
        with out_of_memory("give a smaller batch_size"):
            for start in range(0, len(images), self._batch_size):
                end = start + self._batch_size
                parts.append(self._draw(images[start:end], wanted[start:end]))
        return Maps(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _draw(self, images: np.ndarray, classes: np.ndarray) -> Maps:
        """Runs the compiled step on at most one batch."""
        count = len(images)
        missing = self._batch_size - count
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        padded = np.concatenate([classes, np.zeros(missing, int)]).astype(np.int32)
        maps = jax.device_get(self._step(self._variables, images, padded))
        heat, raw, logits, drawn = (array[:count] for array in maps)
        return Maps(heat, raw, logits, drawn.astype(np.int64))


# Methods that weight the last feature map.
_OF_MAP = ("cam", "grad_cam", "grad_cam_pp")
# Ends the sentence "cannot explain this model, which ...".
_LACKS = {
    "cam": "has no dense layer on the mean over space of its last feature map",
    "grad_cam": "has no feature map of more than one pixel",
    "grad_cam_pp": "has no feature map of more than one pixel",
    "attention": "sows no weights of attention",
}


def _described(images: Any) -> str:
    if not isinstance(images, np.ndarray):
        return f"a {type(images).__name__}"
    return f"{images.dtype} of shape {images.shape}"


def _checked(classes: Any, n: int, num_classes: int) -> np.ndarray:
    classes = np.asarray(classes)
    if classes.shape != (n,) or not np.issubdtype(classes.dtype, np.integer):
        raise InputError(
            f"classes are {_described(classes)}; give a whole number for each of the {n} images"
        )
    for wrong in classes[(classes < 0) | (classes >= num_classes)]:
        raise InputError(
            f"class {wrong} cannot be explained: the model has {num_classes} classes, counted from "
            f"0 to {num_classes - 1}"
        )
    return classes.astype(np.int64)


def _drawing(
    method: str, model: nn.Module, cut: Cut | None, pooled: PooledHead | None
) -> Callable[[Variables, jax.Array, jax.Array], Drawn]:
    """Returns the function that draws by a method that the model has."""
    if method == "attention":
        return partial(attention, model)
    if method == "occlusion" or cut is None:
        return partial(occlusion, model)
    if method == "cam" and pooled is not None:
        return partial(cam, cut, pooled)
    weigh = mean_gradient if method == "grad_cam" else second_order_weights
    return partial(gradient_map, cut, weigh)


def _step(
    draw: Callable[[Variables, jax.Array, jax.Array], Drawn],
    p: Preprocess,
    dtype: Any,
    places: Places | None,
    variables: Variables,
    images: jax.Array,
    classes: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """uint8 images (N, H, W, C), classes (N,) or -1 -> what `Maps` holds."""
    drawn = draw(variables, preprocess(images, p, dtype), classes)
    evidence = drawn.evidence.astype(jnp.float32)
    heat = _heat(evidence, p.size, places or even(p.size, evidence.shape[1:]))
    return heat, drawn.raw.astype(jnp.float32), drawn.logits, drawn.classes


def _heat(evidence: jax.Array, size: int, places: Places) -> jax.Array:
    """(N, h, w) -> (N, size, size), what is positive, by each image's own maximum."""
    positive = jnp.nan_to_num(jnp.maximum(evidence, 0.0), posinf=0.0)
    rows, columns = (
        enlargement(axis, count, size)
        for axis, count in zip(places, evidence.shape[1:], strict=True)
    )
    enlarged = jnp.einsum("yi,nij,xj->nyx", rows, positive, columns, precision="highest")
    largest = enlarged.max((1, 2), keepdims=True)
    return jnp.minimum(enlarged / jnp.where(largest > 0, largest, 1.0), 1.0)
