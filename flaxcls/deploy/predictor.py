"""Class probabilities of images, by a trained run: `Predictor.from_run("runs/a")(images)`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from flaxcls import ops
from flaxcls.batch import Preprocess, preprocess
from flaxcls.data.decode import decode, fit
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError, out_of_memory
from flaxcls.evaluate import softmax

BATCH_SIZE = 32
INVERT = ("yes", "no", "auto")


class Prediction(NamedTuple):
    """What a model says of N images.

    Attributes:
      logits: float (N, K).
      probabilities: float32 (N, K), which add up to 1.
      parent_logits: float (N, P) of a hierarchical model, else None.
      parent_probabilities: float32 (N, P), or None.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    parent_logits: np.ndarray | None
    parent_probabilities: np.ndarray | None

    @classmethod
    def of(cls, logits: Any) -> "Prediction":
        """Returns the prediction of logits (N, K), or of those of classes and parents."""
        logits, parent_logits = logits if isinstance(logits, tuple) else (logits, None)
        return cls(
            logits,
            softmax(logits).astype(np.float32),
            parent_logits,
            None if parent_logits is None else softmax(parent_logits).astype(np.float32),
        )

    def top_k(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns classes int64 (N, k), the likeliest first, and their probabilities (N, k)."""
        order = np.argsort(-self.logits, axis=1, kind="stable")[:, :k]
        return order, np.take_along_axis(self.probabilities, order, axis=1)


class Predictor:
    """Predicts with a trained model; the step is compiled once, for one batch size.

    Args:
      trained: what a run folder holds.
      batch_size: images a call of the compiled step; the last batch is filled up with zeros.

    Attributes:
      trained: as given.
      batch_size: as given.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int = BATCH_SIZE):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give at least 1")
        variables = jax.device_put(trained.variables)
        # The host's copy, half a gigabyte of a VGG, is let go where the caller does not hold it.
        self.trained = dataclasses.replace(trained, variables=variables)
        self.batch_size = batch_size
        self._step = jax.jit(
            partial(logits_of_pixels, trained.model, trained.preprocess, trained.dtype),
            compiler_options=ops.compiler_options(),
        )

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        *,
        config: ConfigDict | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> "Predictor":
        """Reads the best model of a run; see `trained.load_run` for `config` and errors."""
        return cls(load_run(folder, config), batch_size=batch_size)

    def decode(self, source: str | Path | bytes, *, invert: str = "no") -> np.ndarray:
        """Returns an image file, or its bytes, as the model sees it: uint8 (S, S, C).

        Args:
          source: path or content of the file.
          invert: whether light and dark are swapped; see `inverts`.

        Raises:
          UnreadableImage: it is none.
        """
        return self.decode_noting(source, invert=invert)[0]

    def decode_noting(
        self, source: str | Path | bytes, *, invert: str = "auto"
    ) -> tuple[np.ndarray, bool]:
        """Returns what `decode` does, and whether light and dark were swapped."""
        swap = _Swap(self, invert)
        return decode(source, self.trained.spec, change=swap), swap.done

    def fit(self, image: np.ndarray, *, invert: str = "no") -> np.ndarray:
        """Returns an image uint8 (H, W, C), C = 1 or 3, as `decode` does a file that holds it."""
        return fit(image, self.trained.spec, _Swap(self, invert))

    def inverts(self, image: np.ndarray, invert: str) -> bool:
        """Whether light and dark of an image are to be swapped for this model.

        Args:
          image: uint8 (H, W, C).
          invert: "yes", "no", or "auto": where the run's training images are light on dark, by the
            intensity statistics in its folder, and this one is dark on light.

        Raises:
          InputError: another `invert`.
        """
        if invert not in INVERT:
            raise InputError(f"--invert: {invert!r} is none of {', '.join(INVERT)}")
        if invert != "auto":
            return invert == "yes"
        return sees_light_on_dark(self.trained) and is_dark_on_light(image)

    def __call__(self, images: np.ndarray | Sequence[str | Path | bytes]) -> Prediction:
        """Predicts the classes of images.

        Args:
          images: uint8 (N, H, W, C), all that `decode` returned or of another size, which is
            stretched; C is 1 or the model's. Or N paths or files' bytes, which are decoded.

        Raises:
          InputError: an array of another dtype or shape, or a file that is no image.
        """
        if isinstance(images, str | Path | bytes):
            raise InputError("images is one path or one file; give a list of them")
        if not isinstance(images, np.ndarray):
            if not len(images):
                raise InputError("there are no images; give at least one")
            images = np.stack([self.decode(source) for source in images])
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise InputError(
                f"images are {images.dtype} of shape {images.shape}; give uint8 (N, H, W, C)"
            )
        parts = []
        with out_of_memory("give a smaller batch_size"):
            for start in range(0, len(images), self.batch_size):
                parts.append(self._logits(images[start : start + self.batch_size]))
        return Prediction.of(jax.tree.map(lambda *logits: np.concatenate(logits), *parts))

    def _logits(self, images: np.ndarray) -> Any:
        """Runs the compiled step on at most one batch."""
        count = len(images)
        if count < self.batch_size:
            padding = np.zeros((self.batch_size - count, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, padding])
        logits = self._step(self.trained.variables, images)
        return jax.tree.map(lambda array: np.asarray(array)[:count], logits)


class _Swap:
    """Swaps light and dark of an image where a model asks for it, and says whether it did."""

    def __init__(self, predictor: Predictor, invert: str):
        self._predictor = predictor
        self._invert = invert
        self.done = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.done = self._predictor.inverts(image, self._invert)
        return 255 - image if self.done else image


def sees_light_on_dark(trained: TrainedModel) -> bool:
    """Whether most values of the run's training images lie at the dark end, as of white strokes.

    See `runlog.pixel_statistics`.
    """
    pixels = trained.description.get("pixels")
    return isinstance(pixels, dict) and pixels.get("light_on_dark") is True


def is_dark_on_light(image: np.ndarray) -> bool:
    """Whether the ground of an image is its light end.

    The ground is the median of the outermost pixels, a 28th of the image wide. It must lie in the
    lightest third between the darkest and the lightest value, so that paper in the shade counts as
    light, and a photo whose border is of all kinds stays as it is. Of the 70,000 images of
    Fashion-MNIST this takes none for dark on light, and inverted 4 of them for light on dark;
    the median of all pixels errs for a fifth.

    Args:
      image: uint8 (H, W, C).
    """
    grey = image.mean(axis=2)
    wide = max(1, round(min(grey.shape) / 28))
    rows, columns = grey.shape
    sides = (grey[:wide], grey[rows - wide :], grey[:, :wide], grey[:, columns - wide :])
    ground = np.median(np.concatenate([side.ravel() for side in sides]))
    dark, light = grey.min(), grey.max()
    return bool(3 * (ground - dark) > 2 * (light - dark))


def logits_of_pixels(
    model: nn.Module, p: Preprocess, dtype: Any, variables: Any, images: jax.Array
) -> Any:
    """uint8 images (N, H, W, C) -> the model's logits, with the run's own preprocessing."""
    return model.apply(variables, preprocess(images, p, dtype), train=False)
