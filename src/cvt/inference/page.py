"""What our HTML pages share: a template with their style, and pictures within the page."""

import base64
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cvt.checkpoints import model_source
from cvt.data.decoding import Source, decode
from cvt.text import printable

SIDE = 128  # of an image on a sheet or a page, in pixels


def render(template: str, **values: Any) -> str:
    """A page, from a template beside this file; names are shown without what a browser obeys."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(values)


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8; what has no place in it, such as half a pair of UTF-16, is escaped."""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def page_name(model: str) -> str:
    """What the page calls a model: the last words of a path, without the folders before them.

    `runs/photos/best` becomes `photos/best`, since every run has a `best`.
    """
    source = model_source(model)
    if source.hub_id or source.kind == "variant":
        return printable(source.name)
    path = source.path.resolve()
    parts = [path.parent.name, path.name] if path.name in ("best", "last") else [path.name]
    return printable("/".join(filter(None, parts)))


def thumbnail(source: Source) -> Image.Image:
    """The middle of an image, a square of `SIDE` pixels; the pixels of a tiny one stay sharp."""
    image = decode(source, max_pixels=sys.maxsize, least_of_large=SIDE)  # it was decoded before
    tiny = min(image.size) < SIDE / 2
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (SIDE, SIDE), method)


def embedded(save: Callable) -> str:
    """A PNG as part of a page, from what writes it to a file."""
    file = io.BytesIO()
    save(file)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def embedded_thumbnail(source: Source) -> str:
    """The thumbnail of an image as part of a page."""
    image = thumbnail(source)
    return embedded(lambda file: image.save(file, "PNG"))
