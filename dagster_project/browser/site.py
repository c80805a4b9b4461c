"""What the pages share: the project's rows, its recipes, templates, and tiles.

Here: everything that more than one page needs. Not here: the pages (`grid_pages`, `subset_pages`), and who may ask for
them (`guard`).
"""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from assets.base.context import Context
from dagster_project.browser.parts import JUDGED, Part
from dagster_project.browser.queries import BrowseError, Place, Table
from dagster_project.browser.trials import Trials

FOLDER = Path(__file__).parent
LONGEST_CAPTION = 500  # characters on a tile


class Site:
    """The pages of one project.

    Args:
        context: the opened project.
        judged: rows on which recipes are judged at most.
    """

    def __init__(self, context: Context, judged: int = JUDGED) -> None:
        self.context = context
        self.table = Table(context)
        self.trials = Trials(self.table, judged)
        self.templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page from a template, which escapes every value."""
        common = {
            "project": self.context.settings.name,
            "has_images": self.context.pool.has_images,
            "recipes": self.recipes(),
            "numbers": self.table.numbers,
        }
        return HTMLResponse(self.templates.get_template(template).render(**common, **values), status)

    def recipes(self) -> list[dict[str, Any]]:
        """Return the name and the steps of each recipe."""
        return [
            {"name": name, "steps": [step.text for step in node.model.steps]}
            for name, node in self.trials.subsets.items()
        ]

    def tiles(self, places: list[Place], shown: list[str]) -> list[dict[str, Any]]:
        """Return rows as the grid shows them, with some scores."""
        rows = self.table.read(places, ["uid", "key", "caption", "url", *dict.fromkeys(shown)])
        identity = ("uid", "key", "caption", "url", "shard", "row")
        for row in rows:
            row["caption"] = shortened(row["caption"] or "", LONGEST_CAPTION)
        return [
            {**{name: row[name] for name in identity}, "scores": {name: _finite(row[name]) for name in shown}}
            for row in rows
        ]

    def some(self, part: Part, uids: pa.Table, count: int) -> list[dict[str, Any]]:
        """Return tiles of some rows of a part that have one of these uids, in random order, the same in every call."""
        return self.tiles(self.trials.places(part, uids, count), [])


def _finite(value: Any) -> Any:
    """Return a number that JSON has: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def whole(text: str) -> int:
    """Return a whole number of at most 12 digits.

    Raises:
        BrowseError: it is none.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise BrowseError(f"{text[:40]!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    """Return a number.

    Raises:
        BrowseError: it is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise BrowseError(f"{text[:40]!r} is not a number") from error
