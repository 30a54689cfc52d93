"""Pictures of what a model says: a caption, the box and the heat map beside the image."""

import importlib.util
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flaxcls.analysis.explain import Box, bounding_box, draw_box, overlay

_GAP = 4  # pixels between the image and its heat map
_BACKGROUND = (24, 24, 27)
_INK = (244, 244, 245)


def scaled(width: int, height: int, *, least: int, longest: int) -> tuple[int, int]:
    """Returns the size at which an image is shown: sides within limits where its shape lets it."""
    side = max(width, height)
    factor = min(longest / side, max(1.0, -(-least // side)))
    return max(1, round(width * factor)), max(1, round(height * factor))


def show_at(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns an image uint8 (H, W, C) as RGB of another size; an enlarged one keeps its pixels."""
    rgb = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    if rgb.shape[:2] == (height, width):
        return rgb
    larger = width * height > rgb.shape[0] * rgb.shape[1]
    how = Image.Resampling.NEAREST if larger else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(rgb).resize((width, height), how))


def picture(
    image: np.ndarray, caption: str, heat: np.ndarray | None = None
) -> tuple[np.ndarray, Box | None]:
    """Returns the image under a caption, with its box and beside it the heat map; and the box.

    Args:
      image: uint8 (H, W, 3).
      caption: what the model says.
      heat: float32 (H, W), 0 to 1, of that image; None draws neither box nor map.

    Returns:
      uint8 (H', W', 3), both even, as video formats want them; and the box in the image's pixels,
      None without one.
    """
    box = None
    shown = image
    if heat is not None:
        box = bounding_box(heat)
        framed = image if box is None else draw_box(_outlined(image, box), box)
        gap = np.full((image.shape[0], _GAP, 3), _BACKGROUND, np.uint8)
        shown = np.concatenate([framed, gap, overlay(image, heat)], axis=1)
    bar = _caption(caption, shown.shape[1])
    whole = np.concatenate([bar, shown])
    rows, columns = (side % 2 for side in whole.shape[:2])
    if rows or columns:
        whole = np.pad(whole, ((0, rows), (0, columns), (0, 0)))
    return whole, box


def _outlined(image: np.ndarray, box: Box) -> np.ndarray:
    """Returns the image with a dark frame under the lines of a box, which are seen on white too."""
    height, width, _ = image.shape
    line = max(1, round(min(height, width) / 160))
    inner = (
        slice(box.y0 + 2 * line, box.y1 - 2 * line),
        slice(box.x0 + 2 * line, box.x1 - 2 * line),
    )
    kept = image[inner].copy()
    framed = image.copy()
    framed[max(0, box.y0 - line) : box.y1 + line, max(0, box.x0 - line) : box.x1 + line] = (
        _BACKGROUND
    )
    framed[inner] = kept
    return framed


@lru_cache(maxsize=64)
def _caption(text: str, width: int) -> np.ndarray:
    """Returns a bar of text, uint8 (h, width, 3); what does not fit is cut off, and said so."""
    size = min(28, max(13, width // 32))
    font = _font(size)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if font.getlength(text) > width - size:
        while text and font.getlength(text + "\N{HORIZONTAL ELLIPSIS}") > width - size:
            text = text[:-1]
        text += "\N{HORIZONTAL ELLIPSIS}"
    bar = Image.new("RGB", (width, 2 * size), _BACKGROUND)
    ImageDraw.Draw(bar).text((size // 2, size), text, _INK, font, anchor="lm")
    return np.asarray(bar)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns matplotlib's DejaVu Sans, which has more scripts than Pillow's own font."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        path = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)
