"""Heat maps on images: colours, boxes, and back from the model's square to the photo."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flaxcls.data.decode import ImageSpec, placement

# Blue, cyan, green, yellow, red at equal distances: cold to hot.
_COLOURS = np.array([(0, 0, 160), (0, 160, 255), (80, 255, 120), (255, 220, 0), (230, 0, 0)])
_LEVELS = np.linspace(0, 1, 256)
_TABLE = np.stack(
    [np.interp(_LEVELS, np.linspace(0, 1, len(_COLOURS)), channel) for channel in _COLOURS.T],
    axis=-1,
).astype(np.uint8)
_BOX_COLOUR = (255, 255, 255)


class Box(NamedTuple):
    """A part of an image in pixels, from x0 and y0 up to, without them, x1 and y1."""

    x0: int
    y0: int
    x1: int
    y1: int


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Lays a heat map over an image: cold places stay nearly as they are, hot ones turn red.

    Args:
      image: uint8 (H, W, C), C 1 or 3.
      heat: float (h, w), 0 to 1, enlarged to the image.
      strength: share of colour where heat is 1; a cold place gets a third of it.

    Returns:
      uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    photo = _rgb(image)
    levels = np.round(np.nan_to_num(np.clip(heat, 0.0, 1.0)) * 255).astype(np.uint8)
    small = Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR)
    colours = small.copy()
    colours.putpalette(_TABLE.tobytes())
    shares = np.round(255 * strength * (1 + 2 * _LEVELS) / 3).astype(int).tolist()
    return np.asarray(Image.composite(colours.convert("RGB"), photo, small.point(shares)))


def bounding_box(heat: np.ndarray, threshold: float = 0.5) -> Box | None:
    """Returns the box of the largest connected part of a map where it exceeds a share of its top.

    Zhou et al. 2016, section 3.2. Pixels that touch at a side or a corner are connected.

    Args:
      heat: float (H, W).
      threshold: share of the maximum, 0 to 1.

    Returns:
      The box, or None where the map is nowhere positive.
    """
    largest = heat.max(initial=0.0)
    if not (largest > 0 and np.isfinite(largest)):
        return None
    parts, count = ndimage.label(heat >= threshold * largest, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    rows, columns = ndimage.find_objects(parts)[int(sizes.argmax())]
    return Box(columns.start, rows.start, columns.stop, rows.stop)


def draw_box(image: np.ndarray, box: Box, label: str = "") -> np.ndarray:
    """Returns an image uint8 (H, W, C) as (H, W, 3) with a box, and a label in its corner."""
    photo = _rgb(image)
    draw = ImageDraw.Draw(photo)
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 160))
    corners = (box.x0, box.y0, box.x1 - 1, box.y1 - 1)
    draw.rectangle(corners, outline=_BOX_COLOUR, width=line)
    if label:
        font = ImageFont.load_default(max(9, round(min(height, width) / 24)))
        text = label.encode("utf-8", "replace").decode()
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = max(0, min(box.x0, width - (right - left) - 4))
        y = max(0, box.y0 - (bottom - top) - 4)
        draw.rectangle((x, y, x + right - left + 3, y + bottom - top + 3), fill=_BOX_COLOUR)
        draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)
    return np.asarray(photo)


def place_heat(heat: np.ndarray, spec: ImageSpec, width: int, height: int) -> np.ndarray:
    """Brings a map of the square that the model saw back to the photo that the square is of.

    Args:
      heat: float (S, S).
      spec: how the photo became the square.
      width, height: of the photo, upright.

    Returns:
      float32 (height, width), 0 where the model saw nothing of the photo.
    """
    part, cell = placement(width, height, spec)
    x0, y0, x1, y1 = (edge * len(heat) / spec.size for edge in cell)
    result = np.zeros((height, width), np.float32)
    left, top, right, bottom = (round(edge) for edge in part)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    source = Image.fromarray(np.asarray(heat, np.float32))
    shown = source.resize(
        (right - left, bottom - top),
        Image.Resampling.BILINEAR,
        box=(x0, y0, x1, y1),
    )
    result[top:bottom, left:right] = np.asarray(shown)[: height - top, : width - left]
    return result


def _rgb(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, C), C 1 or 3, as a Pillow image of its own."""
    grey = image.shape[2] == 1
    return Image.fromarray(image[:, :, 0] if grey else image).convert("RGB").copy()
