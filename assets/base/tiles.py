"""Samples as tiles of a contact sheet: captions from `raw_pool`, and pictures from the pool."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from assets.base.contact_sheets import Tile, small_jpeg
from assets.base.context import Context
from resources.pools.base import IMAGE_COLUMNS, PoolError
from resources.storage.images import ImageError

SIDE = 400  # pixels of a picture


def read_tiles(project: Context, rows: pl.DataFrame) -> dict[tuple[int, int], Tile]:
    """Read captions from `raw_pool` and pictures from the pool, each shard once.

    Args:
        project: The project.
        rows: f0, f1 and shard of the samples, each once.

    Returns:
        A tile without metadata for each sample, by (f0, f1).
    """
    samples = {}
    for (shard,), uids in rows.group_by("shard", maintain_order=True):
        columns = ["uid", "f0", "f1", "caption", "sha256", *IMAGE_COLUMNS]
        pool = pl.DataFrame(project.lake.read("raw_pool", str(shard), columns))
        found = pool.join(uids, on=["f0", "f1"], how="semi").unique(["f0", "f1"], keep="first", maintain_order=True)
        for row, data in zip(found.iter_rows(named=True), _bytes(project, str(shard), found), strict=True):
            samples[row["f0"], row["f1"]] = _sample(project, str(shard), row, data)
    return samples


def _bytes(project: Context, shard: str, found: pl.DataFrame) -> Sequence[bytes | Exception | None]:
    """Return the bytes of each row's picture, the error if it cannot be read, or None if the pool has no pictures."""
    if not project.pool.has_images:
        return [None] * found.height
    return project.pool.read_images(shard, found.to_arrow())


def _sample(project: Context, shard: str, row: Mapping[str, Any], data: bytes | Exception | None) -> Tile:
    tile = Tile(row["uid"], row["caption"])
    if data is None:
        return tile
    try:
        if isinstance(data, Exception):
            raise data
        if row["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
            raise PoolError("the shard has changed since it was read")
        return replace(tile, image=small_jpeg(data, SIDE, max_pixels=project.settings.pool.max_pixels))
    except (OSError, ImageError, PoolError) as error:
        return replace(tile, problem=f"No picture of {row['uid']} in shard {shard}: {error}")
