"""The images and heat maps that a report shows, saved beside the predictions.

They are small: what a run of 10,000 photos saves of them are about 2 MB. With them a report can be
made again where neither the model nor the data are.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flaxcls import runlog
from flaxcls.analysis.explain import Explainer
from flaxcls.analysis.predictions import Predictions, choose, read_arrays
from flaxcls.data.dataset import Split
from flaxcls.data.decode import ImageSpec
from flaxcls.errors import InputError, out_of_memory
from flaxcls.experiment import stored_images
from flaxcls.step import Recipe

IMAGE_SIDE = 160
HEAT_SIDE = 112
BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Images as the model sees them, and where they speak for what it predicted.

    Attributes:
      images: by position in the split, uint8 (h, w, C), at most IMAGE_SIDE pixels wide.
      heat: by position, the map uint8 (s, s), 255 where most speaks for the predicted class.
      method: of the maps, `cam`, `grad_cam`, ...; empty where there are none.
      note: why there are none, else empty.
    """

    images: dict[int, np.ndarray]
    heat: dict[int, np.ndarray]
    method: str = ""
    note: str = ""


def save_pictures(
    folder: Path,
    predictions: Predictions,
    split: Split,
    spec: ImageSpec,
    recipe: Recipe,
    variables: dict[str, Any],
) -> None:
    """Writes `predictions/NAME-images.npz`: what a report of these predictions shows.

    Arrays: image_index int64 (M,), image uint8 (M, h, w, C); heat_index int64 (K,), heat uint8
    (K, s, s), heat_class int64 (K,), the class each map is of; method and note, as in `Pictures`.

    Args:
      folder: of the run.
      predictions: of the split.
      split: where the images are.
      spec: how they come to the model's size.
      recipe: the model and its preprocessing.
      variables: {"params", "batch_stats"} on this process's own devices, or arrays.
    """
    shown = choose(predictions)
    wanted, explained = shown.all(), shown.explained()
    images = stored_images(split.take(wanted), spec)
    heat, method, note = np.zeros((0, 1, 1), np.float32), "", ""
    if len(explained):
        chosen = images[np.searchsorted(wanted, explained)]
        try:
            heat, method = _heat(recipe, variables, chosen, predictions.guesses[explained])
        except InputError as error:
            # The predictions are worth a report without maps too.
            note, explained = str(error), explained[:0]
    arrays = {
        "image_index": wanted,
        "image": np.stack([_smaller(image, IMAGE_SIDE) for image in images]),
        "heat_index": explained,
        "heat": np.stack([_smaller(_bytes(one), HEAT_SIDE)[..., 0] for one in heat])
        if len(explained)
        else np.zeros((0, 1, 1), np.uint8),
        "heat_class": predictions.guesses[explained].astype(np.int64),
        "method": np.array(method),
        "note": np.array(note),
    }
    runlog.write_arrays(_path(folder, predictions.name), arrays)


def read_pictures(folder: Path, predictions: Predictions) -> Pictures:
    """Reads what `save_pictures` wrote; maps of other predictions than these are left out.

    Without the file there is nothing in it, and a note.

    Raises:
      InputError: the file is damaged.
    """
    path = _path(folder, predictions.name)
    if not path.exists():
        return Pictures({}, {}, note="images and heat maps are saved by --mode=evaluate")
    arrays = read_arrays(path)
    try:
        rows = zip(arrays["heat_index"].tolist(), arrays["heat"], arrays["heat_class"], strict=True)
        return Pictures(
            dict(zip(arrays["image_index"].tolist(), arrays["image"], strict=True)),
            {i: heat for i, heat, of in rows if _predicted(predictions, i) == of},
            str(arrays["method"]),
            str(arrays["note"]),
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"'{path}' is not what this version writes; evaluate the run again"
        ) from error


def _predicted(predictions: Predictions, i: int) -> int:
    return int(predictions.guesses[i]) if i < len(predictions) else -1


def _path(folder: Path, name: str) -> Path:
    return folder / "predictions" / f"{name}-images.npz"


def _heat(
    recipe: Recipe, variables: dict[str, Any], images: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, str]:
    """Maps (K, S, S) of images uint8 (K, H, W, C), 0 to 1, and the method."""
    with out_of_memory("there are no heat maps"):
        explainer = Explainer(
            recipe.model,
            variables,
            recipe.preprocess,
            dtype=recipe.dtype,
            batch_size=min(BATCH_SIZE, len(images)),
        )
        return explainer(images, classes.astype(np.int64)).heat, explainer.method


def _bytes(heat: np.ndarray) -> np.ndarray:
    """0..1 (s, s) as uint8 (s, s, 1); what is not finite is 0."""
    return (255 * np.clip(np.nan_to_num(heat, nan=0.0), 0, 1)).round().astype(np.uint8)[..., None]


def _smaller(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (h, w, C) averaged down to at most `side` pixels."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX)
    result = np.asarray(picture)
    return result[..., None] if result.ndim == 2 else result
