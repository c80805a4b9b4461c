"""Contact sheets: pictures with what is known of them, as Markdown for a small window and as an HTML page.

Here: making small pictures, and laying out what the caller has gathered. Nothing is fetched and nothing is written
here, and no page asks anybody else for anything.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from resources.storage.images import picture

_QUALITIES = (85, 60, 40, 25)


@dataclass(frozen=True)
class Tile:
    """A sample on a sheet.

    Attributes:
        uid: its uid.
        caption: its caption.
        facts: what else is known of it, by name.
        image: its picture as JPEG, if it has one.
        problem: why it has none, although it should.
    """

    uid: str
    caption: str
    facts: Mapping[str, str] = field(default_factory=dict)
    image: bytes | None = None
    problem: str = ""


@dataclass(frozen=True)
class Sheet:
    """Samples that belong together.

    Attributes:
        title: what they are.
        text: one sentence about how they were chosen.
        tiles: the samples.
    """

    title: str
    text: str
    tiles: Sequence[Tile]


def small_jpeg(data: bytes, side: int, *, max_pixels: int | None = None, most_bytes: int | None = None) -> bytes:
    """Make a small JPEG of an encoded image, as the encoders see it (no EXIF rotation, alpha dropped).

    Args:
        data: JPEG, PNG or whatever `resources.storage.images` opens.
        side: pixels of the longer side, at most.
        max_pixels: larger images are refused.
        most_bytes: quality, then size are lowered until the result is not larger; at least 1,000.

    Raises:
        ImageError: the bytes are no picture.
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


def markdown(sheet: Sheet, columns: int = 4, caption_characters: int = 100) -> str:
    """Lay a sheet out as a Markdown table, pictures inside it; without any picture as a list of captions."""
    lines = [f"**{escaped(sheet.title)}** · {escaped(sheet.text)}", ""]
    if not any(tile.image or tile.problem for tile in sheet.tiles):
        names = list(dict.fromkeys(name for tile in sheet.tiles for name in tile.facts))
        lines += [f"| caption | {' | '.join(map(escaped, names))} |", f"|---|{'---:|' * len(names)}"]
        for tile in sheet.tiles:
            facts = " | ".join(escaped(tile.facts.get(name, "")) for name in names)
            lines.append(f"| {escaped(_cut(tile.caption, caption_characters))} | {facts} |")
        return "\n".join(lines)
    names = list(dict.fromkeys(name for tile in sheet.tiles for name in tile.facts))
    lines += [f"|{' |' * (columns + 1)}", f"|{'---|' * (columns + 1)}"]
    for start in range(0, len(sheet.tiles), columns):
        row = sheet.tiles[start : start + columns]
        for label, cells in (
            ("", [_md_image(tile) for tile in row]),
            ("", [escaped(_cut(tile.caption, caption_characters)) for tile in row]),
            *((escaped(name), [f"**{escaped(tile.facts.get(name, ''))}**" for tile in row]) for name in names),
        ):
            lines.append(f"| {' | '.join([label, *cells, *[''] * (columns - len(cells))])} |")
    return "\n".join(lines)


def html_page(
    title: str,
    facts: Mapping[str, str],
    tables: Mapping[str, Sequence[Sequence[str]]],
    chart: str,
    sheets: Sequence[Sheet],
) -> str:
    """Lay sheets out as an HTML page that needs nothing but the pictures beside it.

    Args:
        title: of the page.
        facts: about the subset, by name.
        tables: rows of each table, the first of them its head, by its title.
        chart: path of a picture, relative to the page.
        sheets: their pictures are at `images/<uid>.jpg`, relative to the page.
    """
    escape = html.escape
    about = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts.items())
    shown = "".join(f"<h2>{escape(name)}</h2>{_html_table(rows)}" for name, rows in tables.items())
    contents = "".join(f'<a href="#sheet{i}">{escape(sheet.title)}</a>' for i, sheet in enumerate(sheets))
    sections = "".join(
        f'<section id="sheet{i}"><h2>{escape(sheet.title)}</h2><p>{escape(sheet.text)}</p>'
        f"{_html_tiles(sheet)}</section>"
        for i, sheet in enumerate(sheets)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><dl>{about}</dl>"
        f"{shown}"
        f'<h2>Scores before and after</h2><img class="chart" src="{escape(chart)}" alt="Histograms of the scores">'
        f"<nav>{contents}</nav>{sections}</body></html>\n"
    )


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def image_path(tile: Tile) -> str:
    """Give the path of a tile's picture, relative to the page."""
    return f"images/{tile.uid}.jpg"


def _html_tiles(sheet: Sheet) -> str:
    if not any(tile.image or tile.problem for tile in sheet.tiles):
        rows = "".join(
            f'<tr><td class="caption">{html.escape(tile.caption)}</td><td>{_html_facts(tile)}</td></tr>'
            for tile in sheet.tiles
        )
        return f"<table>{rows}</table>" if rows else "<p>None.</p>"
    figures = []
    for tile in sheet.tiles:
        what = f'<div class="none">{html.escape(tile.problem or "no picture")}</div>'
        if tile.image is not None:
            what = f'<img loading="lazy" src="{image_path(tile)}" alt="">'
        caption = f"<p>{html.escape(tile.caption)}</p>{_html_facts(tile)}<small>{html.escape(tile.uid)}</small>"
        figures.append(f'<figure><div class="picture">{what}</div><figcaption>{caption}</figcaption></figure>')
    return f'<div class="tiles">{"".join(figures)}</div>'


def _html_facts(tile: Tile) -> str:
    return "".join(
        f"<div><span>{html.escape(name).replace('/', '/<wbr>')}</span> <b>{html.escape(value)}</b></div>"
        for name, value in tile.facts.items()
    )


def _md_image(tile: Tile) -> str:
    if tile.image is None:
        return f"_{escaped(_cut(tile.problem, 200))}_" if tile.problem else ""
    return f"![]({data_url(tile.image, 'jpeg')})"


def data_url(image: bytes, kind: str) -> str:
    """Give a picture as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def escaped(text: str) -> str:
    """Escape what Markdown or HTML would read as something else."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:])", r"\\\1", html.escape(flat, quote=False))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


_STYLE = """
body{font:15px/1.45 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;color:#1c2128;background:#fff;
margin:2rem auto;max-width:1180px;padding:0 1.5rem}
h1{font-size:1.6rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
section p{margin:.1rem 0 .8rem;color:#57606a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:0}dt{color:#57606a}dd{margin:0}
table{border-collapse:collapse}th,td{border-bottom:1px solid #d8dee4;padding:.35rem .9rem .35rem 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere}th{color:#57606a;font-weight:600}
td:not(:first-child),th:not(:first-child){text-align:right;white-space:nowrap}
.chart{max-width:100%;display:block}
nav{display:flex;flex-wrap:wrap;gap:.5rem;margin-top:1.6rem}
nav a{border:1px solid #d8dee4;border-radius:1rem;padding:.15rem .8rem;text-decoration:none;color:#0550ae}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(175px,1fr));gap:1rem}
figure{margin:0;border:1px solid #d8dee4;border-radius:8px;overflow:hidden}
.picture{height:180px;background:#f3f4f6;display:flex;align-items:center;justify-content:center}
.picture img{width:100%;height:100%;object-fit:contain}
.none{color:#9a3412;font-size:.85rem;padding:1rem;overflow-wrap:anywhere}
figcaption{padding:.6rem .8rem .7rem;overflow-wrap:anywhere}figcaption p{margin:0 0 .4rem;color:#1c2128;
display:-webkit-box;-webkit-line-clamp:5;-webkit-box-orient:vertical;overflow:hidden}
figcaption div,td div{font-size:.8rem;display:flex;justify-content:space-between;align-items:end;gap:.6rem}
span{color:#57606a}b{font-variant-numeric:tabular-nums;white-space:nowrap}small{display:block;margin-top:.35rem;color:#8c959f;font-size:.62rem;font-family:monospace}
""".replace("\n", "")
