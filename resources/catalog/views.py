"""The views of the catalog over the lake's files: pool, rejects, scores, subsets and their steps.

A view sees files that arrive after the catalog was built, and has no rows where there are no files. Its paths are
absolute, so it has a guard: in a catalog that lies elsewhere, because the lake was moved or copied, it is an error.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import sql
from resources.catalog.scores import CatalogColumn, Scores
from resources.pools.groups import FOLDER, TAR_STRIDE

POOL_COLUMNS = {
    "uid": "VARCHAR",
    "f0": "UBIGINT",
    "f1": "UBIGINT",
    "shard": "VARCHAR",
    "key": "VARCHAR",
    "source_row": "BIGINT",
    "caption": "VARCHAR",
    "url": "VARCHAR",
    "width": "INTEGER",
    "height": "INTEGER",
    "original_width": "INTEGER",
    "original_height": "INTEGER",
    "image_format": "VARCHAR",
    "sha256": "VARCHAR",
    "image_offset": "BIGINT",
    "image_size": "BIGINT",
    "caption_repaired": "BOOLEAN",
    "clip_b32_similarity_score": "FLOAT",
    "clip_l14_similarity_score": "FLOAT",
}
"""Columns of `raw_pool` and their DuckDB types."""

_REJECT_COLUMNS = {
    "shard": "VARCHAR",
    "key": "VARCHAR",
    "source_row": "BIGINT",
    "reason": "VARCHAR",
    "detail": "VARCHAR",
}
_ROW = {"shard": "VARCHAR", "f0": "UBIGINT", "f1": "UBIGINT"}
_TARGET_COLUMNS = {
    "asset": "VARCHAR",
    "target_index": "BIGINT",
    "label": "VARCHAR",
    "name": "VARCHAR",
}
EVALUATION_COLUMNS = {
    "arm": "VARCHAR",
    "recipe": "VARCHAR",
    "version": "VARCHAR",
    "tier": "VARCHAR",
    "samples": "BIGINT",
    "samples_seen": "BIGINT",
    "seen": "BIGINT",
    "task": "VARCHAR",
    "measure": "VARCHAR",
    "values": "DOUBLE[]",
    "mean": "DOUBLE",
    "baseline": "VARCHAR",
    "difference": "DOUBLE",
    "low": "DOUBLE",
    "high": "DOUBLE",
    "verdict": "VARCHAR",
}
"""Columns of `evaluation/<name>` and their DuckDB types."""
_NO_RECORD = ": damaged: not a lineage record. Remedy: clip-select verify --repair"
_VERSION = "v[0-9]*"
_VISIBLE = "[!.]*"
"""Pattern of a name: temporary files start with a dot, and DuckDB's `*` would match them."""


@dataclass(frozen=True)
class Place:
    """The path or URL of a lake, and the path of its catalog; None for one that may be read anywhere."""

    root: str
    catalog: Path | None

    @property
    def listed(self) -> str:
        """The catalog's path as DuckDB lists it: without links."""
        return "" if self.catalog is None else os.path.realpath(self.catalog)


def catalog_views(place: Place, scores: Scores, *, grouped: bool = False) -> dict[str, str]:
    """Return the query of each view by its name.

    Args:
        place: folder of the lake, and path of the catalog.
        scores: the score assets.
        grouped: whether the lake records groups of tars, so that there is a view of where samples are in them.
    """
    views = {
        "pool": _files(place, f"raw_pool/{_VISIBLE}.parquet", POOL_COLUMNS),
        "rejects": _files(place, f"rejects/{_VISIBLE}.parquet", _REJECT_COLUMNS),
        "targets": _files(place, "catalog/targets.parquet", _TARGET_COLUMNS),
    }
    for score in scores:
        views[score.asset] = _files(place, f"{score.asset}/{_VISIBLE}.parquet", _ROW | _types(score.columns))
    views["pool_scores"] = _pool_scores(place, scores)
    names = [sql.quoted(column.recipe_name) for score in scores for column in score.columns]
    views["scores"] = f"SELECT {', '.join(['uid, f0, f1, shard, key', *names])} FROM pool_scores"
    views["shards"] = """
        SELECT coalesce(p.shard, r.shard) AS shard, coalesce(p.n, 0) AS rows, coalesce(r.n, 0) AS rejected
        FROM (SELECT shard, count(*) AS n FROM pool GROUP BY shard) AS p
        FULL JOIN (SELECT shard, count(*) AS n FROM rejects GROUP BY shard) AS r USING (shard)
        ORDER BY shard"""
    if grouped:
        views |= _group_views(place)
    return views | _subset_views(place) | _evaluation_views(place)


def _group_views(place: Place) -> dict[str, str]:
    """Return views of the tars of shards that are groups, and of the place of each image in its tar."""
    records = sql.pattern(place.root, f"{FOLDER}/{_VISIBLE}.json")
    stride = f"{TAR_STRIDE}::BIGINT"
    return {
        "shard_tars": f"""
            SELECT member.key AS shard, tar.key::BIGINT AS number, tar.value->>'$' AS tar
            FROM read_text({records}), json_each(content::JSON->'groups') AS member, json_each(member.value) AS tar""",
        "image_places": f"""
            SELECT uid, shard, key, coalesce(tar, shard) AS tar, image_offset % {stride} AS image_offset, image_size
            FROM pool LEFT JOIN shard_tars USING (shard)
            WHERE tar IS NULL OR number = image_offset // {stride}""",
    }


def _types(columns: Sequence[CatalogColumn]) -> dict[str, str]:
    return {column.name: column.type for column in columns}


def _files(place: Place, pattern: str, columns: Mapping[str, str], *, options: str = "", guarded: bool = True) -> str:
    """Write a query over files that may not exist yet: typed columns, no rows without files, and the guard.

    Without the guard DuckDB sees a plain scan, into which it pushes the rows that a join looks for.
    """
    names = ", ".join(sql.quoted(name) for name in columns)
    typed = ", ".join(f"NULL::{kind} AS {sql.quoted(name)}" for name, kind in columns.items())
    return (
        f"SELECT {names} FROM ({no_rows(place, columns) if guarded else f'SELECT {typed} WHERE false'} "
        f"UNION ALL BY NAME SELECT * FROM read_parquet({sql.pattern(place.root, pattern)}, allow_empty=true{options}))"
    )


def no_rows(place: Place, columns: Mapping[str, str]) -> str:
    """Write a query without rows, which is an error in a catalog that lies elsewhere.

    Every column has the guard, too: DuckDB evaluates a predicate on one of them before it looks at the WHERE, and
    would drop a query of plain NULLs together with a scan of no files.
    """
    guarded = ", ".join(f"{_or_error(place, f'NULL::{kind}')} AS {sql.quoted(name)}" for name, kind in columns.items())
    return f"SELECT {guarded} FROM {_here(place)} WHERE {_or_error(place, 'false')}"


def _here(place: Place) -> str:
    if place.catalog is None:
        return "(SELECT true AS here)"
    return f"(SELECT count(*) > 0 AS here FROM duckdb_databases() WHERE path = {sql.text(place.listed)})"


def _or_error(place: Place, value: str) -> str:
    return f"CASE WHEN here THEN {value} ELSE error({sql.text(moved(place.listed))}) END"


def moved(path: str) -> str:
    """Return the message about a catalog that was built at a path and lies elsewhere."""
    return (
        f"this catalog was built as {path}, and its views read the lake there; the lake was moved or copied since. "
        "Remedy: clip-select run builds the catalog again"
    )


def placed_rows(place: Place, scores: Scores, *, guarded: bool) -> tuple[str, list[str]]:
    """Write the queries of the pool and of each score asset with every row's place: filename and file_row_number.

    Joining by place and uid gives each copy of a repeated uid its own score. The pool's query may have the guard.
    """
    rows, options = {"filename": "VARCHAR", "file_row_number": "BIGINT"}, ", filename=true, file_row_number=true"
    pool = _files(place, f"raw_pool/{_VISIBLE}.parquet", POOL_COLUMNS | rows, options=options, guarded=guarded)
    scored = [
        _files(
            place,
            f"{score.asset}/{_VISIBLE}.parquet",
            _ROW | rows | _types(score.columns),
            options=options,
            guarded=False,
        )
        for score in scores
    ]
    return pool, scored


def renamed(alias: str, columns: Sequence[CatalogColumn]) -> list[str]:
    """Write the columns of an asset's query under their recipe names."""
    return [f"{alias}.{sql.quoted(column.name)} AS {sql.quoted(column.recipe_name)}" for column in columns]


def _pool_scores(place: Place, scores: Scores) -> str:
    """Join the scores to the pool."""
    pool, scored = placed_rows(place, scores, guarded=True)
    selected, joins = [f"pool.{sql.quoted(column)}" for column in POOL_COLUMNS], []
    for number, (score, query) in enumerate(zip(scores, scored, strict=True)):
        joins.append(f"LEFT JOIN ({query}) AS s{number} USING (shard, file_row_number, f0, f1)")
        selected += renamed(f"s{number}", score.columns)
    return f"SELECT {', '.join(selected)} FROM ({pool}) AS pool {' '.join(joins)}"


def _evaluation_views(place: Place) -> dict[str, str]:
    """Return the views over evaluations: all points of the learning curves, and the results at the end of a budget."""
    columns = EVALUATION_COLUMNS | {"filename": "VARCHAR"}
    rows = _files(place, f"evaluation/{_VISIBLE}.parquet", columns, options=", filename=true")
    named = "regexp_extract(filename, '([^/]+)[.]parquet$', 1) AS evaluation"
    return {
        "evaluation_curves": f"SELECT {named}, * EXCLUDE (filename) FROM ({rows})",
        "evaluations": """
            SELECT * EXCLUDE (seen) FROM evaluation_curves WHERE seen = samples_seen
            ORDER BY evaluation, samples_seen, task, measure, mean DESC""",
    }


def _subset_views(place: Place) -> dict[str, str]:
    """Return the views over subset versions; a version without a lineage record does not exist."""
    record = sql.pattern(place.root, f"subset/{_VISIBLE}/{_VERSION}/lineage.json")
    parts = "split_part(filename, '/', -3) AS recipe, split_part(filename, '/', -2) AS version"
    steps = json.dumps(
        [
            {
                "step": "INTEGER",
                "kind": "VARCHAR",
                "text": "VARCHAR",
                "score": "VARCHAR",
                "entered": "BIGINT",
                "kept": "BIGINT",
                "joined": "BIGINT",
                "left": "BIGINT",
                "set": "VARCHAR",
                "scores": ["VARCHAR"],
                "value": "VARCHAR",
                "threshold": "DOUBLE",
                "tie_uid": "VARCHAR",
                "by": "VARCHAR",
                "groups": "BIGINT",
                "samples": "BIGINT",
                "note": "VARCHAR",
                "file": "VARCHAR",
            }
        ]
    )
    manifest = f"subset/{_VISIBLE}/{_VERSION}/manifest.parquet"
    row = {"uid": "VARCHAR", "f0": "UBIGINT", "f1": "UBIGINT", "shard": "VARCHAR", "key": "VARCHAR"}
    members = _files(place, manifest, row | {"filename": "VARCHAR"}, options=", filename=true")
    return {
        "lineage_records": f"""
            SELECT {parts}, CASE WHEN (TRY_CAST(content AS JSON)->'steps') IS NOT NULL
                THEN content::JSON ELSE error(concat(filename, {sql.text(_NO_RECORD)})) END AS record FROM (
                {no_rows(place, {"filename": "VARCHAR", "content": "VARCHAR"})} UNION ALL BY NAME
                SELECT * FROM read_text({record}, allow_empty=true))""",
        "subsets": """
            SELECT recipe, version, (record->>'created')::TIMESTAMP AS created,
                (record->>'rows')::BIGINT AS rows,
                coalesce((record->>'samples')::BIGINT, (record->>'rows')::BIGINT) AS samples,
                record->'source'->>'kind' AS source_kind,
                record->'source'->>'name' AS source_name, record->'source'->>'version' AS source_version,
                (record->'source'->>'rows')::BIGINT AS source_rows,
                len(json_keys(record->'shards')) AS shards, len(json_keys(record->'shards_missing')) AS shards_missing,
                record->>'fingerprint' AS fingerprint,
                row_number() OVER (PARTITION BY recipe ORDER BY length(version) DESC, version DESC) = 1 AS current
            FROM lineage_records ORDER BY recipe, length(version), version""",
        "funnel": f"""
            SELECT * FROM (
                SELECT recipe, version, unnest(json_transform(record->'steps', '{steps}'), recursive := true)
                FROM lineage_records)
            ORDER BY recipe, length(version), version, step""",
        "step_reports": """
            SELECT recipe, version, (step.value->>'step')::INTEGER AS step, summary.value->>'name' AS name,
                summary.value->>'what' AS what, (summary.value->>'entered')::DOUBLE AS entered,
                (summary.value->>'kept')::DOUBLE AS kept, (summary.value->>'dropped')::DOUBLE AS dropped
            FROM lineage_records, json_each(record->'steps') AS step, json_each(step.value->'summary') AS summary
            ORDER BY recipe, length(version), version, step, summary.id""",
        "subset_shards": """
            SELECT recipe, version, used.key AS shard, input.key AS input, input.value->>'$' AS fingerprint,
                NULL::VARCHAR AS missing
            FROM lineage_records, json_each(record->'shards') AS used, json_each(used.value) AS input
            UNION ALL BY NAME
            SELECT recipe, version, left_out.key AS shard, left_out.value->>'$' AS missing
            FROM lineage_records, json_each(record->'shards_missing') AS left_out""",
        "subset_members": f"""
            SELECT recipe, version, uid, f0, f1, shard, key FROM (SELECT {parts}, * FROM ({members}))
            SEMI JOIN (SELECT recipe, version FROM lineage_records) USING (recipe, version)""",
    }
