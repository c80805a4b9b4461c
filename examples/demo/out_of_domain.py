"""Pictures from outside the demo's domain, with captions of their own.

Noise, colour ramps, line and bar charts, Julia sets, pages of writing. `pool` decides which captions they get.
"""

import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from examples.demo.pictures import SIDES, Colour


def draw_out_of_domain(rng: Random) -> tuple[Image.Image, str]:
    """Draw an off-domain picture and return it (square RGB, 64, 96 or 128 pixels) with its own caption."""
    painter, captions = rng.choice(_PAINTERS)
    return painter(rng.choice(SIDES), rng), rng.choice(captions)


def _colour(rng: Random, low: int = 0, high: int = 255) -> Colour:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _noise(side: int, rng: Random) -> Image.Image:
    cells = rng.choice((8, 16, side))
    noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
    return noise.resize((side, side), Image.Resampling.BICUBIC)


def _ramp(side: int, rng: Random) -> Image.Image:
    ramp = Image.linear_gradient("L") if rng.random() < 0.6 else Image.radial_gradient("L")
    mask = ramp.rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
    one, other = Image.new("RGB", (side, side), _colour(rng)), _colour(rng)
    one.paste(Image.new("RGB", (side, side), other), mask=mask)
    return one


def _axes(side: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(page)
    edge = side // 10
    pen.line((edge, edge, edge, side - edge, side - edge, side - edge), fill=(60, 60, 60))
    return page, pen


def _line_chart(side: int, rng: Random) -> Image.Image:
    page, pen = _axes(side)
    for _ in range(rng.randint(1, 3)):
        height, points = rng.uniform(0.3, 0.7), []
        for i in range(12):
            height = min(0.88, max(0.14, height + rng.uniform(-0.12, 0.12)))
            points.append((side * (0.12 + i * 0.068), side * height))
        pen.line(points, fill=_colour(rng, 0, 200), width=max(1, side // 48))
    return page


def _bar_chart(side: int, rng: Random) -> Image.Image:
    page, pen = _axes(side)
    bars, colour = rng.randint(4, 8), _colour(rng, 30, 200)
    step = 0.76 * side / bars
    for i in range(bars):
        left, top = side * 0.13 + i * step, side * rng.uniform(0.15, 0.8)
        pen.rectangle((left, top, left + 0.7 * step, side * 0.88), fill=colour)
    return page


def _fractal(side: int, rng: Random) -> Image.Image:
    angle = rng.uniform(0, 2 * math.pi)
    constant = 0.7885 * complex(math.cos(angle), math.sin(angle))
    axis = np.linspace(-1.5, 1.5, side)
    z = axis[None, :] + 1j * axis[:, None]
    steps = np.zeros((side, side), dtype=np.int64)
    for _ in range(24):
        inside = (z.real**2 + z.imag**2) < 4.0
        steps += inside
        z = np.where(inside, z * z + constant, z)
    palette = np.linspace(_colour(rng), _colour(rng), 25).astype(np.uint8)
    return Image.fromarray(palette[steps])


def _page(side: int, rng: Random) -> Image.Image:
    page = Image.new("RGB", (side, side), _colour(rng, 225, 255))
    pen = ImageDraw.Draw(page)
    ink, step = _colour(rng, 0, 80), side // 14
    for line in range(2, 13):
        x = side * 0.1
        while x < side * rng.uniform(0.7, 0.9):
            word = side * rng.uniform(0.03, 0.13)
            pen.line((x, line * step, x + word, line * step), fill=ink, width=max(1, step // 3))
            x += word + side * 0.03
    return page


_PAINTERS: tuple[tuple[Callable[[int, Random], Image.Image], tuple[str, ...]], ...] = (
    (_noise, ("random noise", "coloured static from an old television", "blurry camera noise")),
    (_ramp, ("a smooth colour gradient", "soft wallpaper for your phone", "sunset sky gradient")),
    (_line_chart, ("line chart of monthly sales", "a graph of temperature by year")),
    (_bar_chart, ("bar chart of survey answers", "quarterly results in a bar graph")),
    (_fractal, ("a Julia set fractal", "psychedelic computer art", "mathematics wallpaper")),
    (_page, ("scanned page of a letter", "a page from an old newspaper", "terms and conditions")),
)
