"""The demo's pool: the planted faults, and files as img2dataset would write them.

A shard depends only on the seed and its number, so shards can be written in any order by any number of processes, and
have the same bytes each time (with the same Pillow, pyarrow and numpy). The planted faults are recorded beside the
pool, never in it.
"""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.demo.out_of_domain import draw_out_of_domain
from examples.demo.pictures import COLOURS, SHAPES, TEXTURES, Scene, caption, draw, random_scene

SEED = 7
SHARDS = 8
SHARD_ROWS = 1000
FAILED_ROWS = 6  # further rows a shard whose download failed: in the parquet, not in the tar
KINDS = {  # rows of a shard
    "clean": 520,
    "shuffled": 160,
    "empty_talk": 120,
    "wrong_attribute": 100,
    "off_domain": 100,
}
TARGET_SHAPES = ("star", "heart")
TARGET_TEXTURES = ("striped", "dotted")
JPEG_QUALITY = 90

_STOCK = (
    "stock photo", "image", "untitled", "click to enlarge", "best price free shipping",
    "download now", "IMG_{n:04d}", "DSC{n:05d}.JPG", "photo {n} of 9999", "new arrivals 2021",
)  # fmt: skip
_VAGUE = (
    "a picture", "a drawing of something", "an image of shapes", "some shapes on a background",
    "this shows an illustration", "colourful shapes", "nice drawing", "a simple illustration",
)  # fmt: skip
_BARE = ("{noun}", "{noun} drawing", "{noun} picture", "illustration of a {noun}", "the {noun}")

_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("uid", pa.string()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One row of a shard before it is drawn.

    `scene` is None for an off-domain picture; `caption` is None if that picture has its own caption. `variant` is a
    subkind, such as the attribute that is wrong.
    """

    source: str
    kind: str
    variant: str
    scene: Scene | None
    caption: str | None

    @property
    def uid(self) -> str:
        """md5 of the row's source id, 32 hexadecimal digits."""
        return hashlib.md5(self.source.encode()).hexdigest()

    @property
    def target_like(self) -> bool:
        """Whether the picture, apart from its caption, shows the targets' sub-domain."""
        return self.scene is not None and shows_target(self.scene)


def shows_target(scene: Scene) -> bool:
    """Return whether all objects of a scene are striped or dotted stars or hearts."""
    return all(g.shape in TARGET_SHAPES and g.texture in TARGET_TEXTURES for g in scene.groups)


def plan_shard(shard: int, seed: int = SEED) -> list[Row]:
    """Return every row of a shard, in the shard's order: scene, caption and fault."""
    rng = Random(f"plan/{seed}/{shard}")
    rows = []
    for kind in (kind for kind, n in KINDS.items() for _ in range(n)):
        source = f"{seed}/{shard:05d}/{rng.getrandbits(64):016x}"
        scene = random_scene(rng)
        words = caption(scene, rng)
        rows.append(_plant(Row(source, kind, "", scene, words), rng))
    shuffle_captions(rows)
    rng.shuffle(rows)
    return rows


def shuffle_captions(rows: list[Row]) -> None:
    """Move each shuffled row's caption to the shuffled row before it, so that none keeps its own."""
    places = [i for i, row in enumerate(rows) if row.kind == "shuffled"]
    captions = [rows[i].caption for i in places]
    for i, borrowed in zip(places, captions[1:] + captions[:1], strict=True):
        rows[i] = replace(rows[i], caption=borrowed)


def _plant(row: Row, rng: Random) -> Row:
    if row.kind == "empty_talk":
        variant, phrases = rng.choice((("stock", _STOCK), ("vague", _VAGUE), ("bare", _BARE)))
        assert row.scene is not None
        noun = rng.choice(row.scene.groups).shape
        words = rng.choice(phrases).format(n=rng.randrange(10_000), noun=noun)
        return replace(row, variant=variant, caption=words)
    if row.kind == "wrong_attribute":
        assert row.scene is not None
        scene, attribute = change_attribute(row.scene, rng)
        return replace(row, variant=attribute, caption=caption(scene, rng, required=attribute))
    if row.kind == "off_domain":  # two thirds in words of their own, the rest in the domain's
        if rng.random() < 2 / 3:
            return replace(row, variant="own_words", scene=None, caption=None)
        return replace(row, variant="domain_words", scene=None)
    return row


def change_attribute(scene: Scene, rng: Random) -> tuple[Scene, str]:
    """Return the scene with one attribute of one group changed, and the attribute's name."""
    choices = ["colour", "shape", "texture", "layout" if len(scene.groups) == 2 else "count"]
    attribute = rng.choice(choices)
    if attribute == "layout":  # what was left is right, what was above is below
        return replace(scene, groups=scene.groups[::-1]), attribute
    which = rng.randrange(len(scene.groups))
    group = scene.groups[which]
    old = getattr(group, attribute)
    values: Sequence[Any] = {
        "colour": tuple(COLOURS),
        "shape": tuple(SHAPES),
        "texture": tuple(TEXTURES),
        "count": (1, 2, 3, 4),
    }[attribute]
    new = rng.choice([value for value in values if value != old])
    groups = list(scene.groups)
    groups[which] = replace(group, **{attribute: new})
    return replace(scene, groups=tuple(groups)), attribute


def make_pool(
    folder: Path,
    shards: Iterable[int] = range(SHARDS),
    *,
    seed: int = SEED,
    workers: int | None = None,
) -> None:
    """Write shards of the pool, each as `00000.tar`, `00000.parquet` and `00000_stats.json`.

    An existing shard is written again, with the same bytes.

    Args:
        folder: the pool's folder; made if it is not there.
        shards: numbers of the shards to write.
        seed: of the whole pool; another seed makes another pool with other uids.
        workers: processes; by default one a core.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(shards)
    # Spawned, not forked: the caller may hold threads of torch, DuckDB or Dagster.
    context = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, max(1, len(numbers)))
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        for done in [executor.submit(_write_shard, folder, n, seed) for n in numbers]:
            done.result()


def make_truth(path: Path, shards: Iterable[int] = range(SHARDS), *, seed: int = SEED) -> None:
    """Write the truth, one row per sample: uid, shard, kind, variant, target_like.

    This draws nothing, so it is fast. Keep the file outside the pool's folder: it is for judging a selection, never an
    input of one.
    """
    rows = [
        {
            "uid": row.uid,
            "shard": f"{shard:05d}",
            "kind": row.kind,
            "variant": row.variant,
            "target_like": row.target_like,
        }
        for shard in shards
        for row in plan_shard(shard, seed)
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(path)


def make_targets(folder: Path, *, each: int = 75, seed: int = SEED) -> None:
    """Write the target set: folders `striped_star`, `dotted_heart`, …, of `each` JPEGs.

    The pictures have the pool's domain, but none is in the pool.
    """
    for shape in TARGET_SHAPES:
        for texture in TARGET_TEXTURES:
            place = Path(folder) / f"{texture}_{shape}"
            place.mkdir(parents=True, exist_ok=True)
            rng = Random(f"target/{seed}/{place.name}")
            for i in range(each):
                scene = random_scene(rng)
                groups = tuple(replace(g, shape=shape, texture=texture) for g in scene.groups)
                image = draw(replace(scene, groups=groups), rng)
                (place / f"{i:03d}.jpg").write_bytes(jpeg_bytes(image))


def jpeg_bytes(image: Image.Image) -> bytes:
    """Encode a picture as the pool stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def picture(row: Row) -> tuple[bytes, str, int]:
    """Draw a row and return the JPEG's bytes, the row's caption and the picture's side in pixels."""
    rng = Random(f"draw/{row.source}")
    if row.scene is None:
        image, own_words = draw_out_of_domain(rng)
    else:
        image, own_words = draw(row.scene, rng), ""
    return jpeg_bytes(image), row.caption if row.caption is not None else own_words, image.width


def _write_shard(folder: Path, shard: int, seed: int) -> None:
    rows = plan_shard(shard, seed)
    rng = Random(f"failed/{seed}/{shard}")
    failed = set(rng.sample(range(SHARD_ROWS + FAILED_ROWS), FAILED_ROWS))
    records, archive, drawn = [], io.BytesIO(), iter(rows)
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(SHARD_ROWS + FAILED_ROWS):
            record = dict.fromkeys(_SCHEMA.names) | {"key": f"{shard:05d}{index:04d}"}
            if index in failed:
                source = f"{seed}/{shard:05d}/{rng.getrandbits(64):016x}"
                record |= {
                    "url": f"demo://{source}.jpg",
                    "caption": caption(random_scene(rng), rng),
                    "status": "failed_to_download",
                    "error_message": "HTTP Error 404: Not Found",
                    "uid": hashlib.md5(source.encode()).hexdigest(),
                }
            else:
                row = next(drawn)
                jpeg, words, side = picture(row)
                record |= {
                    "url": f"demo://{row.source}.jpg",
                    "caption": words,
                    "status": "success",
                    "width": side,
                    "height": side,
                    "original_width": 2 * side,  # the canvas it was drawn on
                    "original_height": 2 * side,
                    "exif": "{}",
                    "sha256": hashlib.sha256(jpeg).hexdigest(),
                    "uid": row.uid,
                }
                _add(tar, f"{record['key']}.jpg", jpeg)
                _add(tar, f"{record['key']}.json", json.dumps(record, indent=4).encode())
                _add(tar, f"{record['key']}.txt", words.encode())
            records.append(record)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=_SCHEMA), table)
    stats = {
        "count": SHARD_ROWS + FAILED_ROWS,
        "successes": SHARD_ROWS,
        "failed_to_download": FAILED_ROWS,
        "failed_to_resize": 0,
        "duration": 0.0,  # a clock would make the bytes differ from run to run
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": SHARD_ROWS, "HTTP Error 404: Not Found": FAILED_ROWS},
    }
    # In this order: who finds the tar finds its sidecar, and the stats say that all is there.
    _replace(folder / f"{shard:05d}.parquet", table.getvalue())
    _replace(folder / f"{shard:05d}.tar", archive.getvalue())
    _replace(folder / f"{shard:05d}_stats.json", json.dumps(stats, indent=4).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)
