"""HTML pages from templates in `assets/templates`.

Here: the Jinja environment, which escapes every value, and pictures as URLs. Not here: the content of any page.
"""

import base64
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

_TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def render(template: str, **values: object) -> str:
    """Return a page.

    Args:
        template: Name of a file in `assets/templates`.
        values: Variables of the template. Text is escaped; one that the template uses and the caller omits is an error.
    """
    return _environment().get_template(template).render(**values)


def data_url(image: bytes, kind: str) -> str:
    """Return an encoded image as a `data:` URL, so that a page needs no file beside it.

    Args:
        image: Bytes of the image.
        kind: Its media subtype: `png` or `jpeg`.
    """
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str, after: str) -> Markup:
    """Return escaped text in which a line may break after each of the characters `after`."""
    escaped = str(escape(text))
    for character in after:
        escaped = escaped.replace(character, f"{character}<wbr>")
    return Markup(escaped)
