"""The contact sheet of docs/demo.md: `python -m examples.demo.sheet docs/images/demo_pool.png`.

Rows of the pool by kind, with their captions.
"""

import io
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.demo.pool import KINDS, picture, plan_shard

PER_KIND = 6
TILE, LINE, MARGIN = 96, 15, 24  # pixels


def contact_sheet(path: Path, shard: int = 0) -> None:
    """Write a PNG of the first rows of each kind in a shard, one line per kind."""
    font, heading = ImageFont.load_default(11), ImageFont.load_default(15)
    step = TILE + MARGIN
    rows = plan_shard(shard)
    sheet = Image.new("RGB", (PER_KIND * step + MARGIN, 8 * TILE * len(KINDS)), "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for kind in KINDS:
        pen.text((MARGIN, top), kind.replace("_", " "), fill="black", font=heading)
        top += LINE + 8
        lines = 0
        for column, row in enumerate([r for r in rows if r.kind == kind][:PER_KIND]):
            jpeg, words, _ = picture(row)
            left = MARGIN + column * step
            sheet.paste(Image.open(io.BytesIO(jpeg)).resize((TILE, TILE)), (left, top))
            wrapped = textwrap.wrap(words, 19)
            lines = max(lines, len(wrapped))
            pen.multiline_text((left, top + TILE + 4), "\n".join(wrapped), "black", font)
        top += TILE + lines * LINE + MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = sheet.crop((0, 0, sheet.width, top))
    # 30 levels a channel keep the file small; a palette would be spent on the noise.
    sheet.point(lambda level: round(level * 29 / 255) * 255 // 29).save(path, optimize=True)


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1]))
