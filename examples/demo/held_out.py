"""Clean held-out pictures for the demo's evaluation: in the pool's domain, and in no pool.

Three sets of class folders (shapes, colours, textures), whose pictures have one kind of object, and pairs with matching
captions.
"""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from examples.demo.pictures import COLOURS, SHAPES, TEXTURES, Scene, caption, draw, random_scene
from examples.demo.pool import jpeg_bytes

SEED = 2002  # neither the pool's nor that of the encoder's training pictures
PICTURES = 400  # of each set of class folders
PAIRS = 500
CLASSES: Mapping[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "texture": tuple(TEXTURES),
}


def make_held_out(folder: Path, *, pictures: int = PICTURES, pairs: int = PAIRS, seed: int = SEED) -> None:
    """Write the class folders `shapes`, `colours` and `textures`, and last `pairs.tar`.

    Args:
        folder: where to write.
        pictures: number of each set of class folders, shared equally by the classes.
        pairs: number of pairs.
        seed: another one gives other pictures.
    """
    for attribute, values in CLASSES.items():
        for value in values:
            place = folder / f"{attribute}s" / value
            place.mkdir(parents=True, exist_ok=True)
            for i in range(pictures // len(values)):
                rng = Random(f"held-out/{seed}/{attribute}/{value}/{i}")
                scene = _one_kind(rng)
                scene = replace(scene, groups=(replace(scene.groups[0], **{attribute: value}),))
                (place / f"{i:03d}.jpg").write_bytes(jpeg_bytes(draw(scene, rng)))
    part = folder / ".pairs.tar.part"
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(pairs):
            rng = Random(f"held-out/{seed}/pair/{i}")
            scene = random_scene(rng)
            _add(tar, f"{i:05d}.jpg", jpeg_bytes(draw(scene, rng)))
            _add(tar, f"{i:05d}.txt", caption(scene, rng).encode())
    part.rename(folder / "pairs.tar")


def _one_kind(rng: Random) -> Scene:
    """Return a random scene with one kind of object."""
    while len((scene := random_scene(rng)).groups) > 1:
        pass
    return scene


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
