"""Pages for a browser: one self-contained file each, which asks no other host for anything.

Templates lie in `templates/`; each extends `base.html`, which brings the look (`page.css`) and
forbids every request by a content security policy. What a template is given is escaped, so that a
class may be called `<b>`; SVG that this package wrote itself is marked `| safe` there.
"""

import base64
import io
import math
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from flaxcls import __version__, runlog

# Smaller images are drawings and digits, which lossy compression smears.
_LOSSLESS_SIDE = 40
NOT_MEASURED = "n/a"


def render(template: str, **values: Any) -> str:
    """Returns a page of `templates/` with `values` filled in, every one of them escaped.

    A template may use the filters `count` (12,345), `percent` (91.53 %), `fixed` (0.3141) and
    `thumbnail` (an image as an address), each of which shows what is None or NaN as n/a.
    """
    environment = _environment()
    css = environment.get_template("page.css").render()
    return environment.get_template(template).render(css=css, version=__version__, **values)


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Writes the page that `render` returns, atomically; names that are not UTF-8 are escaped."""
    runlog.write_bytes(path, runlog.encode(render(template, **values)))


def thumbnail(image: np.ndarray, largest: int = 160) -> str:
    """Returns an image as an address that holds it (data:), to be shown by <img>.

    PNG, or of what is larger than 40 px WebP where that is smaller.

    Args:
      image: uint8 (H, W, C), C = 1 or 3.
      largest: pixels of the longer side; a larger image is averaged down to it.
    """
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.BOX)
    encoded = {"png": _encoded(picture, "PNG", optimize=True)}
    if max(picture.size) > _LOSSLESS_SIDE:
        encoded["webp"] = _encoded(picture, "WEBP", quality=80)
    kind, content = min(encoded.items(), key=lambda item: len(item[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(value: float | None, digits: int = 2) -> str:
    """Returns a share 0..1 as 91.53 %; 100.00 % only where nothing is missing."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    most = 1 - 10 ** -(digits + 2)
    return f"{100 * (value if value >= 1 else min(value, most)):.{digits}f} %"


def fixed(value: float | None, digits: int = 4) -> str:
    """Returns a number with that many decimals."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """Returns a whole number as 12,345."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flaxcls.analysis", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": count,
        "fixed": fixed,
        "percent": percent,
        "thumbnail": thumbnail,
    }
    return environment
