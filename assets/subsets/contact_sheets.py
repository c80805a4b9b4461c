"""Contact sheets: pictures with their metadata, as Markdown for Dagster's UI and as an HTML page.

Here: making small pictures, and laying out what the caller gathered. This module reads and writes no files, and its
pages load nothing from the network.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from assets.base.pages import data_url, render
from core.links import sample_link
from resources.storage.images import picture

_WORD_JOINER = "\u2060"
_QUALITIES = (85, 60, 40, 25)


@dataclass(frozen=True)
class Tile:
    """A sample on a sheet.

    Attributes:
        uid: Its uid.
        caption: Its caption.
        metadata: Its scores and ranks as text, by name.
        image: Its picture as JPEG; None if the pool has none.
        problem: Why a picture that should be there is missing.
    """

    uid: str
    caption: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    image: bytes | None = None
    problem: str = ""

    @property
    def path(self) -> str:
        """The path of the picture, relative to the page."""
        return f"images/{self.uid}.jpg"

    @property
    def link(self) -> str:
        """The address of the sample's page in `clip-select browse`."""
        return sample_link(self.uid)


@dataclass(frozen=True)
class Sheet:
    """A group of samples.

    Attributes:
        title: Heading.
        text: One sentence about how they were chosen.
        tiles: The samples.
    """

    title: str
    text: str
    tiles: Sequence[Tile]

    @property
    def has_pictures(self) -> bool:
        """Whether to lay out tiles; a sheet without any picture is a table of captions."""
        return any(tile.image or tile.problem for tile in self.tiles)

    @property
    def metadata_names(self) -> list[str]:
        """The names of all metadata of the tiles, in order of appearance."""
        return list(dict.fromkeys(name for tile in self.tiles for name in tile.metadata))


def small_jpeg(data: bytes, side: int, *, max_pixels: int | None = None, most_bytes: int | None = None) -> bytes:
    """Return a small JPEG of an encoded image, as the encoders see it (no EXIF rotation, alpha dropped).

    Args:
        data: JPEG, PNG or any other format that `resources.storage.images` opens.
        side: Pixels of the longer side, at most.
        max_pixels: Larger images are refused.
        most_bytes: Quality, then size, is lowered until the result fits; at least 1,000.

    Raises:
        ImageError: The bytes are no picture.
    """
    image = picture(data, max_pixels).convert("RGB")
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality, optimize=True)
            if most_bytes is None or out.tell() <= most_bytes:
                return out.getvalue()
        side //= 2


def html_page(
    title: str,
    about: Mapping[str, str],
    tables: Mapping[str, Sequence[Sequence[str]]],
    chart: str,
    sheets: Sequence[Sheet],
    browse: str = "",
) -> str:
    """Return the sheets as an HTML page that needs only the pictures beside it.

    Args:
        title: Title of the page.
        about: Metadata of the subset, by name.
        tables: Rows of each table by its heading; the first row is the table's head.
        chart: Path of the chart, relative to the page.
        sheets: The sheets; the picture of a tile is at its `path`.
        browse: Address of the subset in `clip-select browse`.
    """
    return render("report.html", title=title, about=about, tables=tables, chart=chart, sheets=sheets, browse=browse)


def markdown(sheet: Sheet, columns: int = 4, caption_characters: int = 100) -> str:
    """Return a sheet as a Markdown table with the pictures in it; without any picture, as a list of captions."""
    heading = f"**{escaped(sheet.title)}** · {escaped(sheet.text)}\n\n"
    if not sheet.has_pictures:
        return heading + _markdown_list(sheet, caption_characters)
    lines = [f"|{' |' * (columns + 1)}", f"|{'---|' * (columns + 1)}"]
    for start in range(0, len(sheet.tiles), columns):
        tiles = sheet.tiles[start : start + columns]
        for label, cells in (
            ("", [_markdown_picture(tile) for tile in tiles]),
            ("", [escaped(_cut(tile.caption, caption_characters)) for tile in tiles]),
            *(
                (escaped(name), [f"**{escaped(tile.metadata.get(name, ''))}**" for tile in tiles])
                for name in sheet.metadata_names
            ),
        ):
            lines.append(f"| {' | '.join([label, *cells, *[''] * (columns - len(cells))])} |")
    return heading + "\n".join(lines)


def _markdown_list(sheet: Sheet, caption_characters: int) -> str:
    names = sheet.metadata_names
    lines = [f"| caption | {' | '.join(map(escaped, names))} |", f"|---|{'---:|' * len(names)}"]
    for tile in sheet.tiles:
        values = " | ".join(escaped(tile.metadata.get(name, "")) for name in names)
        lines.append(f"| {escaped(_cut(tile.caption, caption_characters))} | {values} |")
    return "\n".join(lines)


def _markdown_picture(tile: Tile) -> str:
    if tile.image is None:
        return f"_{escaped(_cut(tile.problem, 200))}_" if tile.problem else ""
    return f"![]({data_url(tile.image, 'jpeg')})"


def escaped(text: str) -> str:
    """Return text on one line, in which Markdown or HTML interprets nothing and links nothing.

    GitHub's Markdown, which Dagster's UI reads, makes links of web and e-mail addresses after it has removed the
    backslashes. A word joiner (U+2060, invisible) within an address prevents that.
    """
    flat = " ".join(text.split())
    unlinked = re.sub(r"(https?:|ftp:|www)(?=[/.])|(?<=@)(?=[\w-])", f"\\g<0>{_WORD_JOINER}", flat, flags=re.IGNORECASE)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:])", r"\\\1", html.escape(unlinked, quote=False))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
