"""The demo's domain: scenes of simple shapes, their drawings and their captions.

One picture at a time, from a random generator that the caller seeds; no files, no faults, no
shards. Drawing uses Pillow alone, and the same generator state gives the same pixels.
"""

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SHAPES = {  # singular nouns; the first is the plain name
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "hexagon": ("hexagon",),
    "heart": ("heart",),
}
COLOURS: dict[str, Colour] = {
    "red": (214, 39, 40),
    "orange": (245, 133, 24),
    "yellow": (246, 211, 45),
    "green": (44, 150, 62),
    "blue": (40, 90, 200),
    "purple": (130, 62, 170),
    "pink": (244, 130, 180),
    "brown": (128, 78, 44),
}
TEXTURES = {  # adjectives before the colour, phrases after the noun
    "plain": (("plain", "solid"), ()),
    "striped": (("striped",), ("with stripes",)),
    "dotted": (("dotted", "spotted"), ("with dots",)),
    "checked": (("checked", "chequered"), ("with a check pattern",)),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 248),
    "black": (24, 24, 28),
    "grey": (160, 163, 168),
    "cream": (244, 233, 205),
}
SIZES = {"small": ("small", "little"), "medium": (), "large": ("large", "big")}
SIDES = (64, 96, 128)  # pixels of a stored picture

_PLACES = {  # layout of a single object: (x, y) of its centre, and words
    "middle": ((0.5, 0.5), ("in the middle", "in the centre")),
    "left": ((0.27, 0.5), ("on the left", "at the left side")),
    "right": ((0.73, 0.5), ("on the right", "at the right side")),
    "top": ((0.5, 0.27), ("at the top", "near the upper edge")),
    "bottom": ((0.5, 0.73), ("at the bottom", "near the lower edge")),
}
_ARRANGEMENTS = {  # layout of several objects of a kind
    "row": ("in a row", "side by side"),
    "column": ("in a column", "stacked one above the other"),
    "scattered": ("scattered about", "here and there"),
}
_RELATIONS = {  # layout of two different objects: words for first-second, and for second-first
    "beside": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "over"), ("below", "under")),
}
_COUNTS = {1: ("a", "one"), 2: ("two", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
_FRAMES = (
    "{}", "{}", "{}", "a picture of {}", "a drawing of {}", "an image of {}", "this shows {}",
    "{} can be seen", "illustration with {}",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One to four equal objects."""

    shape: str
    colour: str
    texture: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one group, or two single objects in relation to one another."""

    groups: tuple[Group, ...]
    layout: str
    background: str


def random_scene(rng: Random) -> Scene:
    """Return a random scene: two in five have one object, two several equal ones, one a pair in relation."""
    background = rng.choice(tuple(BACKGROUNDS))
    sort = rng.choice(("one", "one", "several", "several", "pair"))
    if sort == "pair":
        return Scene((_group(rng, 1), _group(rng, 1)), rng.choice(tuple(_RELATIONS)), background)
    if sort == "several":
        group = _group(rng, rng.randint(2, 4))
        return Scene((group,), rng.choice(tuple(_ARRANGEMENTS)), background)
    return Scene((_group(rng, 1),), rng.choice(tuple(_PLACES)), background)


def _group(rng: Random, count: int) -> Group:
    return Group(
        shape=rng.choice(tuple(SHAPES)),
        colour=rng.choice(tuple(COLOURS)),
        texture=rng.choice(tuple(TEXTURES)),
        size=rng.choice(tuple(SIZES)),
        count=count,
    )


def caption(scene: Scene, rng: Random, required: str | None = None) -> str:
    """Return a caption of a scene; the wording and the attributes it omits vary with the generator.

    Args:
        scene: Content of the picture.
        rng: Seeded generator.
        required: An attribute that the caption must contain: `colour`, `texture`, `layout`, or `shape` and `count`,
            which are always there. With `count` the caption omits the layout, so that a changed number contradicts the
            picture by itself.
    """
    terse = required is None and rng.random() < 0.12
    phrases = [_noun_phrase(group, rng, required, terse) for group in scene.groups]
    if len(phrases) == 2:
        forward, backward = _RELATIONS[scene.layout]
        said = (
            f"{phrases[0]} {rng.choice(forward)} {phrases[1]}"
            if rng.random() < 0.5
            else f"{phrases[1]} {rng.choice(backward)} {phrases[0]}"
        )
    else:
        said = phrases[0]
        words = _PLACES[scene.layout][1] if scene.layout in _PLACES else _ARRANGEMENTS[scene.layout]
        if required != "count" and not terse and rng.random() < 0.6:
            said += " " + rng.choice(words)
    if not terse and rng.random() < 0.35:
        kind = rng.choice(("on a {} background", "on {}", "against a {} backdrop"))
        said += " " + kind.format(scene.background)
    text = rng.choice(_FRAMES).format(said)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.3 else text


def _noun_phrase(group: Group, rng: Random, required: str | None, terse: bool) -> str:
    before, after = [], ""
    if SIZES[group.size] and not terse and rng.random() < 0.6:
        before.append(rng.choice(SIZES[group.size]))
    share = 1.0 if required == "texture" else 0.15 if group.texture == "plain" else 0.85
    if not terse and rng.random() < share:
        adjectives, endings = TEXTURES[group.texture]
        if endings and rng.random() < 0.3:
            after = " " + rng.choice(endings)
        else:
            before.append(rng.choice(adjectives))
    if required == "colour" or rng.random() < (0.5 if terse else 0.95):
        before.append(group.colour)
    noun = rng.choice(SHAPES[group.shape])
    if group.count > 1:
        noun += "es" if noun.endswith(("x", "s")) else "s"
    number = rng.choice(_COUNTS[group.count])
    words = [*before, noun]
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *words]) + after


def draw(scene: Scene, rng: Random) -> Image.Image:
    """Return a drawing of a scene: a square RGB picture with sides of 64, 96 or 128 pixels.

    It is drawn at twice the size and reduced, which smooths the edges.
    """
    side = rng.choice(SIDES)
    canvas = _background(scene.background, 2 * side, rng)
    for group, (x, y), radius in _places(scene, rng):
        _draw_object(canvas, group, (x * 2 * side, y * 2 * side), radius * 2 * side, rng)
    return canvas.resize((side, side), Image.Resampling.BOX)


def _background(name: str, side: int, rng: Random) -> Image.Image:
    base = _jitter(BACKGROUNDS[name], rng, 8)
    style = rng.choice(("flat", "flat", "shaded", "grain"))
    canvas = Image.new("RGB", (side, side), base)
    if style == "shaded":
        darker = _mix(base, (0, 0, 0) if sum(base) > 200 else (255, 255, 255), 0.18)
        ramp = Image.linear_gradient("L").resize((side, side))
        canvas.paste(Image.new("RGB", (side, side), darker), mask=ramp)
    elif style == "grain":
        cell = 32
        grain = Image.frombytes("L", (cell, cell), rng.randbytes(cell * cell))
        grain = grain.resize((side, side), Image.Resampling.BILINEAR).point(lambda v: v // 7)
        canvas.paste(Image.new("RGB", (side, side), (128, 128, 128)), mask=grain)
    return canvas


def _places(scene: Scene, rng: Random) -> list[tuple[Group, tuple[float, float], float]]:
    """Return centre and radius of every object, as shares of the picture's side."""

    def near(value: float, by: float = 0.03) -> float:
        return value + rng.uniform(-by, by)

    def radius(group: Group, largest: float) -> float:
        scale = {"small": 0.55, "medium": 0.76, "large": 1.0}[group.size]
        return largest * scale * rng.uniform(0.93, 1.0)

    first = scene.groups[0]
    if scene.layout in _RELATIONS:
        across, along = near(0.5, 0.08), (near(0.27), near(0.73))
        spots = [(along[i], across) for i in (0, 1)]
        if scene.layout == "above":
            spots = [(y, x) for x, y in spots]
        return [(g, s, radius(g, 0.21)) for g, s in zip(scene.groups, spots, strict=True)]
    if scene.layout in _PLACES:
        x, y = _PLACES[scene.layout][0]
        largest = 0.36 if scene.layout == "middle" else 0.23
        return [(first, (near(x), near(y)), radius(first, largest))]
    n = first.count
    if scene.layout == "scattered":
        cells = rng.sample([(x, y) for x in (0.26, 0.74) for y in (0.26, 0.74)], n)
        one = radius(first, 0.19)
        return [(first, (near(x, 0.05), near(y, 0.05)), one) for x, y in cells]
    one = radius(first, min(0.21, 0.46 / n))
    across = near(0.5, 0.1)
    spots = [(near((i + 0.5) / n, 0.01), across) for i in range(n)]
    if scene.layout == "column":
        spots = [(y, x) for x, y in spots]
    return [(first, spot, one) for spot in spots]


def _draw_object(canvas: Image.Image, group: Group, centre: tuple[float, float], radius: float, rng: Random) -> None:
    size = max(4, round(2 * radius))
    mask = Image.new("L", (size, size), 0)
    _fill_shape(ImageDraw.Draw(mask), group.shape, size, math.radians(rng.uniform(-12, 12)))
    surface = _surface(group, size, rng)
    canvas.paste(surface, (round(centre[0] - size / 2), round(centre[1] - size / 2)), mask)


def _surface(group: Group, size: int, rng: Random) -> Image.Image:
    base = _jitter(COLOURS[group.colour], rng, 14)
    surface = Image.new("RGB", (size, size), base)
    if group.texture == "plain":
        return surface
    second = _mix(base, (255, 255, 255) if rng.random() < 0.6 else (0, 0, 0), 0.68)
    pen = ImageDraw.Draw(surface)
    period = max(11.0, size / rng.uniform(3.2, 4.4))
    steps = range(math.ceil(size / period) + 1)
    if group.texture == "striped":
        slope = rng.choice((-1.0, 0.0, 1.0)) * size
        for i in range(-len(steps), 2 * len(steps)):
            x = i * period
            pen.line((x, 0, x + slope, size), fill=second, width=round(period * 0.45))
    elif group.texture == "dotted":
        dot = period * 0.29
        for i in steps:
            for j in steps:
                x, y = (i + 0.5 * (j % 2)) * period, (j + 0.25) * period
                pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=second)
    else:
        half = period * 0.62
        for i in range(math.ceil(size / half)):
            for j in range(math.ceil(size / half)):
                if (i + j) % 2:
                    pen.rectangle((i * half, j * half, (i + 1) * half, (j + 1) * half), fill=second)
    return surface


def _fill_shape(pen: ImageDraw.ImageDraw, shape: str, size: int, turn: float) -> None:
    middle = size / 2

    def polygon(points: list[tuple[float, float]]) -> None:
        cos, sin = math.cos(turn), math.sin(turn)
        pen.polygon(
            [(middle + middle * (x * cos - y * sin), middle + middle * (x * sin + y * cos))
             for x, y in points],
            fill=255,
        )  # fmt: skip

    def spokes(radii: list[float]) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
        return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]

    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, size - 1, size - 1), fill=255)
        if shape == "ring":
            hole = size * 0.27
            pen.ellipse((hole, hole, size - 1 - hole, size - 1 - hole), fill=0)
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        polygon(spokes([1.0] * 3))
    elif shape == "star":
        polygon(spokes([1.0, 0.45] * 5))
    elif shape == "hexagon":
        polygon(spokes([1.0] * 6))
    elif shape == "cross":
        arm = 0.34
        quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
        points = []
        for _ in range(4):
            points += quarter
            quarter = [(-y, x) for x, y in quarter]
        polygon(points)
    else:
        steps = [2 * math.pi * i / 40 for i in range(40)]
        polygon(
            [
                (
                    math.sin(t) ** 3 * 0.95,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17.5,
                )
                for t in steps
            ]
        )


def _jitter(colour: Colour, rng: Random, by: int) -> Colour:
    red, green, blue = (min(255, max(0, c + rng.randint(-by, by))) for c in colour)
    return red, green, blue


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
