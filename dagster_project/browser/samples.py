"""One sample: its image, scores with percentiles, steps, neighbours and lineage; and the rejected samples."""

import threading
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from assets.base.contact_sheets import small_jpeg
from assets.base.context import Context
from assets.subsets.catalog import catalog_scores
from core import sql
from core.uids import format_uid
from dagster_project.browser import search
from dagster_project.browser.queries import BrowseError, Place, Table, find
from resources.catalog.build import read_catalog
from resources.lake.files import LakeError
from resources.pools.base import IMAGE_COLUMNS, PoolError, TarPool

NEGATIVES = 4
_decoding = threading.Semaphore(4)


def jpeg(table: Table, place: Place, side: int) -> bytes:
    """Return a row's image as a JPEG of at most `side` pixels.

    Raises:
        BrowseError: there is no such row.
        PoolError: the pool has no images, or this one cannot be read.
        ImageError: it cannot be decoded.
    """
    pool = table.context.pool
    rows = _image_rows(table, place.shard)
    if place.row >= rows.num_rows:
        raise BrowseError(f"shard {place.shard} has no row {place.row}")
    (data,) = pool.read_images(place.shard, rows.slice(place.row, 1))
    if isinstance(data, PoolError):
        raise data
    with _decoding:
        return small_jpeg(data, side, max_pixels=pool.settings.max_pixels)


def _image_rows(table: Table, shard: str) -> pa.Table:
    stored = table.context.lake.stored("raw_pool", shard) if shard in table.shards(["raw_pool"]) else None
    if stored is None:
        raise BrowseError(f"there is no shard {shard!r}")
    return _cached_rows(table, shard, stored.fingerprint)


@lru_cache(maxsize=32)
def _cached_rows(table: Table, shard: str, fingerprint: str) -> pa.Table:
    del fingerprint  # part of the key only
    return table.context.lake.read("raw_pool", shard, columns=list(IMAGE_COLUMNS))


def target_jpeg(context: Context, encoder: str, target: str, number: int, side: int) -> bytes:
    """Return the image of a target by its index among the target's embeddings.

    Raises:
        BrowseError: there is none.
    """
    if encoder not in context.settings.encoders or target not in context.settings.targets:
        raise BrowseError("there is no such target")
    listed = context.lake.read(f"target_embeddings/{encoder}/{target}", columns=["target_index", "label", "name"])
    wanted = next((row for row in listed.to_pylist() if row["target_index"] == number), None)
    if wanted is None or context.settings.targets[target].path is None:
        raise BrowseError("there is no such image of the target")
    for image in context.target(target).images():
        if (image.label, image.name) == (wanted["label"], wanted["name"]):
            return small_jpeg(image.data, side)
    raise BrowseError("this image of the target is gone")


def describe(table: Table, uid: str) -> dict[str, Any]:
    """Return everything about a sample that its page shows.

    Raises:
        BrowseError: there is no such sample.
    """
    place = find(table, uid)
    scores = list(table.scores.by_name)
    (row,) = table.read([place], [*(n for n in table.columns if "/" not in n and n != "shard"), *scores])
    return {
        "row": row,
        "place": place,
        "scores": [
            {"name": name, "value": row[name], "percentile": _percentile(table, name, row[name])} for name in scores
        ],
        "recipes_of_sample": _explained(table, uid),
        "neighbours": _neighbours(table, row),
        "negatives": _negatives(table, place),
        "encoders": search.encoders(table),
        "tar": table.context.pool.tar_url(place.shard) if isinstance(table.context.pool, TarPool) else None,
        "raw_pool": table.context.lake.path("raw_pool", place.shard),
    }


def _percentile(table: Table, name: str, value: Any) -> float | None:
    """Return the share of rows with a smaller value, in %; half of the equal ones count."""
    column = table.scores.by_name[name].column
    if value is None or isinstance(value, str) or column.direction is None:
        return None
    number = sql.literal(float(value))
    query = (
        f"SELECT 100 * (count(*) FILTER (WHERE v < {number}) + 0.5 * count(*) FILTER (WHERE v = {number})) / count(v) "
        f"AS p FROM (SELECT {sql.quoted(name)}::DOUBLE AS v FROM ({table.scan(frozenset({name}), uids=False)}))"
    )
    return table.run(query)["p"][0].as_py()


def _explained(table: Table, uid: str) -> dict[str, list[dict[str, Any]]]:
    try:
        with read_catalog(table.context.catalog_path()) as con:
            rows = con.sql("FROM explain($uid)", params={"uid": uid}).to_arrow_table().to_pylist()
    except FileNotFoundError:
        return {}
    except duckdb.Error as error:
        raise BrowseError(str(error).split("\n", 1)[0]) from error
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(" ".join(filter(None, [row["recipe"], row["version"]])), []).append(row)
    return found


def _neighbours(table: Table, row: dict[str, Any]) -> list[dict[str, Any]]:
    """List the nearest target images, the better near duplicates and the generated captions of a row."""
    found: list[dict[str, Any]] = []
    for score in catalog_scores(table.scores):
        if score.nearest_target is not None and score.targets is not None and row[score.nearest_target] is not None:
            _, encoder, target = score.targets.split("/")
            address = f"/target/{encoder}/{target}/{row[score.nearest_target]}"
            found.append({"title": f"Nearest image of {target}", "image": address, "text": "", "uid": ""})
        other = row.get(score.in_favour_of or "")
        if other:
            found.append(_tile(table, find(table, other), "Better near duplicate"))
        if score.best_caption is not None and row[score.best_caption]:
            found.append({"title": "Generated caption", "image": "", "text": row[score.best_caption], "uid": ""})
    return found


def _tile(table: Table, place: Place, title: str) -> dict[str, Any]:
    (row,) = table.read([place], ["uid", "caption"])
    image = f"/image/{place.shard}/{place.row}" if table.context.pool.has_images else ""
    return {"title": title, "image": image, "text": row["caption"], "uid": row["uid"]}


def _negatives(table: Table, place: Place) -> list[dict[str, Any]]:
    """List the reference negatives nearest to a row's image and caption, from the first draw of each encoder."""
    found: list[dict[str, Any]] = []
    lake = table.context.lake
    for encoder in search.encoders(table):
        key = f"negatives/{encoder}"
        if lake.stored(key) is None:
            continue
        listed = lake.read(key)
        for side, other, title in (("image", "text", "for the image"), ("text", "image", "for the caption")):
            try:
                (vectors,) = lake.vectors(key, columns=[other])
                own = search.of_row(table, encoder, place, side)
            except LakeError as error:
                raise BrowseError(str(error)) from error
            cosines = np.asarray(vectors[:], np.float32) @ own
            seen: dict[str, float] = {}
            for index in np.argsort(-cosines)[: 8 * NEGATIVES]:
                seen.setdefault(
                    format_uid(listed["f0"][int(index)].as_py(), listed["f1"][int(index)].as_py()), cosines[index]
                )
            for uid in list(seen)[:NEGATIVES]:
                tile = _tile(table, find(table, uid), f"Hard negative {title} ({encoder}), cosine {seen[uid]:.3f}")
                found.append({**tile, "text": tile["text"]})
    return found


def rejects(table: Table, reason: str, limit: int = 200) -> dict[str, Any]:
    """Return the rejected samples: the number for each reason, and some rows of one reason or all."""
    lake = table.context.lake
    shards = lake.shards("rejects")
    columns = frozenset({"shard", "key", "reason", "detail"})
    if not shards:
        return {"counts": [], "rows": []}
    files = ", ".join(table.file("rejects", shard, columns) for shard in shards)
    source = f"read_parquet([{files}])"
    counts = table.run(
        f"SELECT reason, count(*) AS n FROM {source} GROUP BY reason ORDER BY n DESC, reason"
    ).to_pylist()
    where = f" WHERE reason = {sql.text(reason)}" if reason else ""
    rows = table.run(f"SELECT shard, key, reason, detail FROM {source}{where} LIMIT {limit}").to_pylist()
    return {"counts": counts, "rows": rows}
