"""One sample: its image, scores with percentiles, steps, neighbours and lineage; and the rejected samples."""

import math
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
from core.errors import UserError
from core.names import suggestion
from core.uids import format_uid
from dagster_project.browser import search
from dagster_project.browser.parts import SEARCHED, first_part
from dagster_project.browser.queries import BrowseError, Place, Table, find
from resources.catalog.build import read_catalog
from resources.pools.base import IMAGE_COLUMNS, PoolError, TarPool, place_in_tar

NEGATIVES = 4
ANY_REASON = "any"
"""In the place of a reason: every rejected sample."""
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
    percentiles, note = _percentiles(table, place)
    explained, problem = _explained(table, uid)
    (row,) = table.read([place], [*(n for n in table.columns if "/" not in n and n != "shard"), *scores])
    return {
        "row": row,
        "place": place,
        "scores": [{"name": name, "value": row[name], "percentile": percentiles.get(name)} for name in scores],
        "percentile_note": note,
        "recipes_of_sample": explained,
        "problem": problem,
        "neighbours": _neighbours(table, row),
        "negatives": _negatives(table, place),
        "encoders": search.encoders(table),
        "tar": _tar(table, place, row["image_offset"]),
        "raw_pool": table.context.lake.path("raw_pool", place.shard),
    }


def _tar(table: Table, place: Place, image_offset: int | None) -> tuple[str, int] | None:
    """Return the tar that a sample is in, and the byte where its image begins; None for pools of other files."""
    pool = table.context.pool
    if image_offset is None or not isinstance(pool, TarPool):
        return None
    number, byte = place_in_tar(image_offset)
    return pool.tars(place.shard)[number], byte


def _percentiles(table: Table, place: Place) -> tuple[dict[str, float], str]:
    """Return the share of rows with a smaller value of each score, in %, half of the equal ones counted; and a note.

    Reads whole shards, the row's own first and the others in the order of a keyed hash, up to SEARCHED rows.
    """
    lake = table.context.lake
    by_asset: dict[str, list[str]] = {}
    for name in table.numbers:
        if table.scores.by_name[name].column.direction is not None:  # an index, such as of the nearest target, has none
            by_asset.setdefault(table.place(name)[0], []).append(name)
    found: dict[str, float] = {}
    note = ""
    for asset, names in by_asset.items():
        if lake.stored(asset, place.shard) is None:
            continue
        part = first_part(table.sizes([asset]), SEARCHED, first=place.shard)
        (row,) = table.read([place], names)
        known = {n: v for n in names if (v := row[n]) is not None and not (isinstance(v, float) and math.isnan(v))}
        if not known:
            continue
        note = "" if part.is_whole else part.note("Percentiles are among")
        columns = ", ".join(
            f"100 * (count(*) FILTER (WHERE {sql.quoted(name)} < {sql.literal(float(value))}) + 0.5 * "
            f"count(*) FILTER (WHERE {sql.quoted(name)} = {sql.literal(float(value))})) / count({sql.quoted(name)}) "
            f"AS {sql.quoted(name)}"
            for name, value in known.items()
        )
        query = f"SELECT {columns} FROM ({table.scan(frozenset(known), uids=False, only=part.shards)})"
        found |= table.run(query).to_pylist()[0]
    return found, note


def _explained(table: Table, uid: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Return the rows of `explain` by recipe and version; and why there are none, if the catalog can't be asked."""
    try:
        with read_catalog(table.context.catalog_path()) as con:
            rows = con.sql("FROM explain($uid)", params={"uid": uid}).to_arrow_table().to_pylist()
    except FileNotFoundError:
        return {}, "There is no catalog yet; clip-select run builds it."
    except UserError as error:
        return {}, str(error)
    except duckdb.Error as error:
        return {}, f"The catalog can't be asked: {str(error).split(chr(10), 1)[0]}. Remedy: clip-select run builds it"
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(" ".join(filter(None, [row["recipe"], row["version"]])), []).append(row)
    return found, ""


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
    return {"title": title, "image": image, "text": row["caption"][:500], "uid": row["uid"]}


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
            (vectors,) = lake.vectors(key, columns=[other])
            own = search.of_row(table, encoder, place, side)
            cosines = np.asarray(vectors[:], np.float32) @ own
            seen: dict[str, float] = {}
            for index in np.argsort(-cosines)[: 8 * NEGATIVES]:
                seen.setdefault(
                    format_uid(listed["f0"][int(index)].as_py(), listed["f1"][int(index)].as_py()), cosines[index]
                )
            for uid in list(seen)[:NEGATIVES]:
                tile = _tile(table, find(table, uid), f"Hard negative {title} ({encoder}), cosine {seen[uid]:.3f}")
                found.append(tile)
    return found


def reject_counts(table: Table, shard: str = "") -> list[dict[str, Any]]:
    """Return each reason with its number of rejected samples, the most frequent first."""
    source = _reject_source(table, shard)
    if source is None:
        return []
    return table.run(f"SELECT reason, count(*) AS n FROM {source} GROUP BY reason ORDER BY n DESC, reason").to_pylist()


def rejects(table: Table, reason: str = "", shard: str = "", *, limit: int = 200, offset: int = 0) -> dict[str, Any]:
    """Return rejected samples of a reason and a shard, or of all: `rows` from `offset`, and the number of all, `total`.

    Raises:
        BrowseError: there is no such shard.
    """
    source = _reject_source(table, shard)
    if source is None:
        return {"total": 0, "rows": []}
    where = f" WHERE reason = {sql.text(reason)}" if reason else ""
    total = table.run(f"SELECT count(*) AS n FROM {source}{where}")["n"][0].as_py()
    rows = table.run(
        f"SELECT shard, key, reason, detail FROM {source}{where} ORDER BY shard, source_row "
        f"LIMIT {limit:d} OFFSET {offset:d}"
    ).to_pylist()
    return {"total": total, "rows": rows}


def _reject_source(table: Table, shard: str) -> str | None:
    shards = table.shards(["rejects"])
    if shard and shard not in shards:
        raise BrowseError(f"shard {shard!r} was not read yet; {suggestion(shard, shards)}. Remedy: clip-select run")
    columns = frozenset({"shard", "key", "source_row", "reason", "detail"})
    files = ", ".join(table.file("rejects", name, columns) for name in ([shard] if shard else shards))
    return f"read_parquet([{files}])" if files else None
