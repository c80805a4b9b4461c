"""The catalog: one DuckDB file of views and macros over the lake's files.

Here belongs what can be asked in SQL. Nothing is stored in the catalog itself: the files stay the
truth, and views see files that arrive later. `explain` alone follows the versions that were there
when the catalog was built, because a step's predicate has to be part of a macro's text.

The file is built under a temporary name and swapped in, and it is only ever opened read-only: DuckDB
lets one process write and then no other read.

Views: pool, rejects, shards, scores, pool_scores, targets, one for each score asset under its key, subsets,
subset_members, subset_shards, lineage_records, funnel, step_reports. Macros: explain(uid), overlap(a, b), and those
of `resources.catalog.history`.
"""

import glob
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from core import sql
from resources.catalog.history import version_macros
from resources.lake.files import Lake
from resources.lake.versions import Versions

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
_VERSION = "v[0-9]*"
_VISIBLE = "[!.]*"
"""Pattern of a name: temporary files begin with a dot, and DuckDB's `*` would match them."""


def build_catalog(
    lake_root: Path,
    path: Path,
    *,
    scores: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    recipes: Sequence[str],
) -> None:
    """Build the catalog beside the old one and swap it in; processes that read the old one go on.

    Besides, `<lake>/catalog/` gets what DuckDB can't read from the lake: the targets' labels.

    Args:
        lake_root: Folder of the lake; files may be missing, and may come later.
        path: Where the catalog shall be, ending in .duckdb.
        scores: Keys of the score assets with the columns that hold values, such as
            `{"norm_sim/b32/imagenet": ["norm_sim_2", "norm_sim_inf", "nearest_target"]}`.
        targets: Keys of the target embeddings, such as `target_embeddings/b32/imagenet`.
        recipes: Recipes that `explain` tells about, as far as they have a version.
    """
    root = lake_root.absolute()
    lake = Lake(str(root))
    _write_targets(lake, root, targets)
    newest = [Versions(lake, recipe).current() for recipe in recipes]
    records = [version.lineage for version in newest if version is not None]
    with lake.replacing(str(path.absolute())) as temporary, duckdb.connect(str(temporary)) as con:
        for name, query in _views(root, scores).items():
            con.execute(f"CREATE VIEW {sql.quoted(name)} AS {query}").fetchall()
        for macro in (
            _UID_WORDS,
            _OVERLAP,
            *version_macros(_pattern(root, "subset/")),
            _explain_macro(con, root, records, scores),
        ):
            con.execute(macro).fetchall()


def read_catalog(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a catalog read-only, as any number of processes may at once.

    A process that still has the catalog open gets the one it has, even after a newer one was swapped in:
    close the old connection first.

    Raises:
        FileNotFoundError: There is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no catalog. Remedy: materialize the asset catalog.")
    return duckdb.connect(str(path), read_only=True)


# Views


def _views(root: Path, scores: Mapping[str, Sequence[str]]) -> dict[str, str]:
    views = {
        "pool": _files(root, f"raw_pool/{_VISIBLE}.parquet", POOL_COLUMNS),
        "rejects": _files(root, f"rejects/{_VISIBLE}.parquet", _REJECT_COLUMNS),
        "targets": _files(root, "catalog/targets.parquet", _TARGET_COLUMNS),
    }
    for asset, columns in scores.items():
        values = {column: score_type(column) for column in columns}
        views[asset] = _files(root, f"{asset}/{_VISIBLE}.parquet", _ROW | values)
    views["pool_scores"] = _pool_scores(root, scores)
    names = [sql.quoted(name) for names in score_names(scores).values() for name in names]
    views["scores"] = f"SELECT {', '.join(['uid, f0, f1, shard, key', *names])} FROM pool_scores"
    views["shards"] = """
        SELECT coalesce(p.shard, r.shard) AS shard, coalesce(p.n, 0) AS rows, coalesce(r.n, 0) AS rejected
        FROM (SELECT shard, count(*) AS n FROM pool GROUP BY shard) AS p
        FULL JOIN (SELECT shard, count(*) AS n FROM rejects GROUP BY shard) AS r USING (shard)
        ORDER BY shard"""
    return views | _subset_views(root)


def _files(root: Path, pattern: str, columns: Mapping[str, str], *, options: str = "") -> str:
    """Write a query over files that may not be there yet: typed columns, and no rows without files."""
    typed = ", ".join(f"NULL::{kind} AS {sql.quoted(name)}" for name, kind in columns.items())
    names = ", ".join(sql.quoted(name) for name in columns)
    return (
        f"SELECT {names} FROM (SELECT {typed} WHERE false UNION ALL BY NAME "
        f"SELECT * FROM read_parquet({_pattern(root, pattern)}, allow_empty=true{options}))"
    )


def _numbered(root: Path, scores: Mapping[str, Sequence[str]]) -> tuple[str, list[tuple[str, list[tuple[str, str]]]]]:
    """Write the queries of the pool and of each score asset with the place of every row, the latter with its columns.

    By place and uid a repeated uid meets its own score.
    """
    place, options = {"filename": "VARCHAR", "file_row_number": "BIGINT"}, ", filename=true, file_row_number=true"
    pool = _files(root, f"raw_pool/{_VISIBLE}.parquet", POOL_COLUMNS | place, options=options)
    scored = []
    for asset, names in score_names(scores).items():
        typed = _ROW | place | {column: score_type(column) for column in scores[asset]}
        query = _files(root, f"{asset}/{_VISIBLE}.parquet", typed, options=options)
        scored.append((query, list(zip(scores[asset], names, strict=True))))
    return pool, scored


def _pool_scores(root: Path, scores: Mapping[str, Sequence[str]]) -> str:
    """Join the scores to the pool."""
    pool, scored = _numbered(root, scores)
    selected, joins = [f"pool.{sql.quoted(column)}" for column in POOL_COLUMNS], []
    for number, (query, named) in enumerate(scored):
        joins.append(f"LEFT JOIN ({query}) AS s{number} USING (shard, file_row_number, f0, f1)")
        selected += [f"s{number}.{sql.quoted(column)} AS {sql.quoted(name)}" for column, name in named]
    return f"SELECT {', '.join(selected)} FROM ({pool}) AS pool {' '.join(joins)}"


def _subset_views(root: Path) -> dict[str, str]:
    """Write the views over subset versions; a version without a lineage record does not exist."""
    record = _pattern(root, f"subset/{_VISIBLE}/{_VERSION}/lineage.json")
    place = "split_part(filename, '/', -3) AS recipe, split_part(filename, '/', -2) AS version"
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
    members = _files(root, manifest, row | {"filename": "VARCHAR"}, options=", filename=true")
    return {
        "lineage_records": f"""
            SELECT {place}, content::JSON AS record FROM (
                SELECT NULL::VARCHAR AS filename, NULL::VARCHAR AS content WHERE false UNION ALL BY NAME
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
            SELECT recipe, version, (step.value->>'step')::INTEGER AS step, told.value->>'name' AS name,
                told.value->>'what' AS what, (told.value->>'entered')::DOUBLE AS entered,
                (told.value->>'kept')::DOUBLE AS kept, (told.value->>'dropped')::DOUBLE AS dropped
            FROM lineage_records, json_each(record->'steps') AS step, json_each(step.value->'summary') AS told
            ORDER BY recipe, length(version), version, step, told.id""",
        "subset_shards": """
            SELECT recipe, version, used.key AS shard, input.key AS input, input.value->>'$' AS fingerprint,
                NULL::VARCHAR AS missing
            FROM lineage_records, json_each(record->'shards') AS used, json_each(used.value) AS input
            UNION ALL BY NAME
            SELECT recipe, version, left_out.key AS shard, left_out.value->>'$' AS missing
            FROM lineage_records, json_each(record->'shards_missing') AS left_out""",
        "subset_members": f"""
            SELECT recipe, version, uid, f0, f1, shard, key FROM (SELECT {place}, * FROM ({members}))
            SEMI JOIN (SELECT recipe, version FROM lineage_records) USING (recipe, version)""",
    }


# Macros

_UID_WORDS = """
CREATE MACRO uid_word(sample, place) AS
    CASE WHEN regexp_full_match(sample, '[0-9a-fA-F]{32}')
    THEN ('0x' || substr(sample, place, 16))::UBIGINT END
"""

_OVERLAP = """
CREATE MACRO overlap(a, b) AS TABLE
WITH members AS (
    SELECT recipe, f0, f1 FROM subset_members
    SEMI JOIN (FROM subsets WHERE current) AS newest USING (recipe, version)
),
counted AS (
    SELECT (SELECT count(*) FROM members WHERE recipe = a) AS rows_a,
        (SELECT count(*) FROM members WHERE recipe = b) AS rows_b,
        (SELECT count(*) FROM (SELECT f0, f1 FROM members WHERE recipe = a)
            SEMI JOIN (SELECT f0, f1 FROM members WHERE recipe = b) AS other USING (f0, f1)) AS rows_both
)
SELECT *, rows_both / nullif(rows_a + rows_b - rows_both, 0) AS jaccard FROM counted
"""

_EXPLAINED = {
    "recipe": "VARCHAR",
    "version": "VARCHAR",
    "step": "INTEGER",
    "text": "VARCHAR",
    "score": "VARCHAR",
    "value": "DOUBLE",
    "threshold": "DOUBLE",
    "rank": "BIGINT",
    "verdict": "VARCHAR",
    "nearest_target": "BIGINT",
    "nearest_label": "VARCHAR",
    "nearest_name": "VARCHAR",
    "best_caption": "VARCHAR",
    "in_favour_of": "VARCHAR",
    "copies": "BIGINT",
}


def _explain_macro(
    con: duckdb.DuckDBPyConnection,
    root: Path,
    records: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Sequence[str]],
) -> str:
    """Write explain(uid): a row for each step of each recipe's newest version at build time.

    Verdicts: kept; dropped; not reached (an earlier step dropped it); brought in (by a union); unknown (a score
    that the step needs is not there now, or the step ranks by ranks, which a row alone has not, and is not the
    last); changed (today's scores would keep it, yet it is not in the subset). Step 0
    is what the recipe began with. A uid that is not in the pool gets one row that says so, or the reasons
    where a rejected sample has that key.
    """
    nearest = {
        f"{column}/{asset.split('/', 1)[1]}": asset.split("/", 1)[1]
        for asset, columns in scores.items()
        if "nearest_target" in columns
        for column in columns
    }
    said = [asset for asset in scores if asset.startswith("sieve/")]
    likest = {
        name: name.replace("near_duplicate/", "near_duplicate_of/", 1)
        for names in score_names(scores).values()
        for name in names
        if name.startswith("near_duplicate/")
    }
    ctes = _sample_ctes(root, scores)
    steps = []
    for number, record in enumerate(records):
        ctes.append(f"judged{number} AS ({_judged(con, root, record)})")
        steps += _explained_steps(record, f"judged{number}", nearest, said, likest)
    typed = ", ".join(f"NULL::{kind} AS {name}" for name, kind in _EXPLAINED.items())
    ctes.append(
        "found AS MATERIALIZED ("
        + " UNION ALL BY NAME ".join([f"SELECT {typed} WHERE false", *steps])
        + " UNION ALL BY NAME SELECT 'rejected: ' || reason AS verdict, detail AS text FROM rejects "
        "WHERE key = (SELECT sample WHERE NOT EXISTS (FROM sample_rows)))"  # in the pool: DuckDB opens few files
    )
    return (
        f"CREATE MACRO explain(sample) AS TABLE WITH {', '.join(ctes)} SELECT * FROM found "
        "UNION ALL BY NAME SELECT 'unknown uid' AS verdict, "
        "'no sample of this uid is in the pool, and no rejected sample has it as its key' AS text "
        "WHERE NOT EXISTS (FROM found) AND NOT EXISTS (FROM sample_rows) "
        "UNION ALL BY NAME SELECT 'no subset' AS verdict, 'it is in the pool; no recipe has a version' AS text "
        "WHERE NOT EXISTS (FROM found) AND EXISTS (FROM sample_rows) ORDER BY recipe, step"
    )


def _sample_ctes(root: Path, scores: Mapping[str, Sequence[str]]) -> list[str]:
    """Write the sample's rows of `pool_scores` as CTEs.

    All files of the pool are looked into for f0 alone, and only where their Bloom filters let it be. What is found
    comes first and by itself, so that of every asset DuckDB opens that shard's file and reads one row group.
    """
    pool, scored = _numbered(root, scores)
    ctes = [
        f"places AS MATERIALIZED (SELECT filename, file_row_number, f0 FROM ({pool}) WHERE f0 = uid_word(sample, 1))",
        f"pool_rows AS MATERIALIZED (SELECT pool.* FROM ({pool}) AS pool JOIN places "
        "USING (filename, file_row_number, f0) WHERE pool.f1 = uid_word(sample, 17))",
    ]
    selected, joins = [f"pool_rows.{sql.quoted(column)}" for column in POOL_COLUMNS], []
    for number, (asset, (query, named)) in enumerate(zip(scores, scored, strict=True)):
        # From the pool's file, since DuckDB may spell the root in another way than we do.
        file = f"regexp_replace(filename, 'raw_pool(/[^/]*)$', {sql.text(asset)} || '\\1')"
        ctes.append(
            f"score_rows{number} AS MATERIALIZED (SELECT s.* FROM ({query}) AS s "
            f"JOIN (SELECT * REPLACE ({file} AS filename) FROM pool_rows) "
            "USING (filename, shard, file_row_number, f0, f1))"
        )
        joins.append(f"LEFT JOIN score_rows{number} USING (shard, file_row_number)")
        selected += [f"score_rows{number}.{sql.quoted(column)} AS {sql.quoted(name)}" for column, name in named]
    return [*ctes, f"sample_rows AS MATERIALIZED (SELECT {', '.join(selected)} FROM pool_rows {' '.join(joins)})"]


def _judged(con: duckdb.DuckDBPyConnection, root: Path, record: Mapping[str, Any]) -> str:
    """Write the query of one row: the sample, its place in the version, and what each step says of it.

    "pass n" is what step n says of the row by itself, "in n" whether it is in after the step; NULL is unknown.
    """
    recipe, version, steps = record["recipe"], record["version"], record["steps"]
    ranked = [step["step"] for step in steps if step["score"] is not None]
    figures = "".join(f', step{n}_value AS "value {n}", step{n}_rank AS "rank {n}"' for n in ranked)
    if steps and steps[-1]["kind"] == "soft_cap_sample":
        figures += ", copies"
    folder = f"subset/{glob.escape(recipe)}/{version}"
    member = (
        f'SELECT true AS "member"{figures} FROM read_parquet({_pattern(root, f"{folder}/manifest.parquet")}) '
        f"WHERE {_SAMPLE}"
    )
    listed = {read["name"]: read.get("file", "source_uids.parquet") for read in _sets(record)}  # as of format 2

    def in_set(name: str) -> str:
        return f"EXISTS (SELECT 1 FROM read_parquet({_pattern(root, f'{folder}/{listed[name]}')}) WHERE {_SAMPLE})"

    source = record["source"]
    passes = [f'f0 IS NOT NULL AND {"true" if source["kind"] == "pool" else in_set(source["name"])} AS "pass 0"']
    states, state = ['"pass 0" AS "in 0"'], '"pass 0"'
    for step in steps:
        number, value = step["step"], _value(step)
        binds = value is not None and _binds(con, value)
        if step.get("set") is not None:
            said = f"f0 IS NOT NULL AND {'NOT ' if step['kind'] == 'except' else ''}{in_set(step['set'])}"
        elif step.get("file") is not None:
            table = f"read_parquet({_pattern(root, '/'.join([folder, step['file']]))})"
            if step["kind"] == "deduplicate":
                said = f"f0 IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {table} WHERE {_SAMPLE})"
                instead = f"SELECT format('{{:016x}}{{:016x}}', kept_f0, kept_f1) FROM {table} WHERE {_SAMPLE}"
                passes.append(f'({instead}) AS "instead {number}"')
            else:
                binds = binds and _binds(con, sql.quoted(step["by"]))
                said, threshold = _in_stratum(step, table) if binds else ("NULL::BOOLEAN", "NULL::DOUBLE")
                passes.append(f'{threshold} AS "threshold {number}"')
        else:
            known = _binds(con, step["predicate"])
            said = f"coalesce(({step['predicate']}\n), false)" if known else "NULL::BOOLEAN"
        passes.append(f'{said} AS "pass {number}"')
        state = f'({state} {"OR" if step["kind"] == "union" else "AND"} "pass {number}")'
        states.append(f'{state} AS "in {number}"')
        if value is not None:
            passes.append(f'{value if binds else "NULL"}::DOUBLE AS "score {number}"')
    return f"""
        SELECT *, {", ".join(states)} FROM (
            SELECT *, {", ".join(passes)}
            FROM (SELECT 1) LEFT JOIN (
                SELECT * FROM sample_rows WHERE shard IN (
                    SELECT unnest(json_keys(content::JSON->'shards'))
                    FROM read_text({_pattern(root, f"{folder}/lineage.json")}))
                ORDER BY shard, source_row LIMIT 1
            ) ON true LEFT JOIN ({member}) ON true
            WHERE "member" OR EXISTS (FROM sample_rows))"""


def _value(step: Mapping[str, Any]) -> str | None:
    """Give what a step compares of a row, as SQL, if it compares a number."""
    if step["score"] is not None:
        return str(step.get("value") or sql.quoted(step["score"]))
    return sql.quoted(step["by"]) if step["kind"] == "deduplicate" and step["threshold"] is not None else None


def _in_stratum(step: Mapping[str, Any], table: str) -> tuple[str, str]:
    """Write whether a row is in the top of its stratum, and the stratum's threshold, from the strata as they were."""
    value, of_row = step["value"], f"FROM {table} AS s WHERE s.stratum IS NOT DISTINCT FROM {sql.quoted(step['by'])}"
    stays = f"{value} > threshold OR ({value} = threshold AND (f0 < tie_f0 OR (f0 = tie_f0 AND f1 <= tie_f1)))"
    return f"coalesce((SELECT {stays} {of_row}), false)", f"(SELECT threshold {of_row})"


_SAMPLE = "f0 = uid_word(sample, 1) AND f1 = uid_word(sample, 17)"


def _sets(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give what a record says of each recipe and uid list that its recipe reads."""
    return [read for read in (record["source"], *record.get("sets", {}).values()) if read["kind"] != "pool"]


def _explained_steps(
    record: Mapping[str, Any], judged: str, nearest: Mapping[str, str], said: Collection[str], likest: Mapping[str, str]
) -> list[str]:
    source, last = record["source"], len(record["steps"])
    named = {
        "pool": "from the pool",
        "recipe": f"from recipe {source['name']} {source.get('version')}",
        "uids": f"from the uid list {source['name']}",
    }
    begin = {"step": 0, "kind": "from", "text": named[source["kind"]], "score": None, "threshold": None}
    last_union = max((step["step"] for step in record["steps"] if step["kind"] == "union"), default=0)
    queries = []
    for step in [begin, *record["steps"]]:
        number = step["step"]
        unknown = f'"pass {number}" IS NULL'
        columns = {
            "recipe": sql.text(record["recipe"]),
            "version": sql.text(record["version"]),
            "step": str(number),
            "text": sql.text(step["text"]),
        }
        if step["threshold"] is not None:
            columns["threshold"] = f"{sql.text(repr(float(step['threshold'])))}::DOUBLE"
        if step["score"] is not None:
            unknown += f' OR "score {number}" IS NULL'
            columns |= {
                "score": sql.text(step["score"]),
                "value": f'coalesce("value {number}", "score {number}")',
                "rank": f'"rank {number}"',
            }
        if step["kind"] == "stratify":
            columns["threshold"] = f'"threshold {number}"'
        if step["kind"] == "soft_cap_sample":
            columns["copies"] = "copies"
        instead = None
        if step["kind"] == "deduplicate" and step.get("file") is not None:
            instead = f'"instead {number}"'
        elif step["kind"] == "deduplicate" and step["threshold"] is not None:
            unknown += f' OR "score {number}" IS NULL'
            columns |= {"score": sql.text(step["by"]), "value": f'"score {number}"'}
            instead = sql.quoted(likest[step["by"]]) if step["by"] in likest else None
        for score in {step["score"], *(step.get("scores") or ())}.intersection(said):
            columns["best_caption"] = sql.quoted("sieve_caption" + score.removeprefix("sieve"))
        if step["score"] in nearest:
            suffix = nearest[step["score"]]
            index = sql.quoted(f"nearest_target/{suffix}")
            of_target = (
                f"FROM targets WHERE asset = {sql.text(f'target_embeddings/{suffix}')} AND target_index = {index}"
            )
            columns |= {
                "nearest_target": index,
                "nearest_label": f"(SELECT label {of_target})",
                "nearest_name": f"(SELECT name {of_target})",
            }
        reached = f'coalesce("in {number - 1}", false)' if number else "true"
        if step["kind"] == "union":
            verdict = f"WHEN {reached} THEN 'kept' WHEN \"pass {number}\" THEN 'brought in' ELSE 'not reached'"
        else:
            # Where other rows decide, no row can be judged alone; at the last step, not to be a member says it.
            dropped = number == last and f'"step{number}_' in step.get("predicate", "")
            verdict = (
                f"WHEN NOT {reached} THEN 'not reached' WHEN {unknown} THEN '{'dropped' if dropped else 'unknown'}' "
                f"WHEN \"pass {number}\" THEN '{'changed' if number == last else 'kept'}' ELSE 'dropped'"
            )
        # A member has passed all steps after the last that could bring it in, whatever the scores of now would say.
        kept = "WHEN \"member\" THEN 'kept' " if number > last_union or not last_union else ""
        columns["verdict"] = f"CASE {kept}{verdict} END"
        if instead is not None:
            columns["in_favour_of"] = f"CASE WHEN ({columns['verdict']}) = 'dropped' THEN {instead} END"
        selected = ", ".join(f"{value} AS {name}" for name, value in columns.items())
        queries.append(f"SELECT {selected} FROM {judged}")
    return queries


def _binds(con: duckdb.DuckDBPyConnection, predicate: str) -> bool:
    """Tell whether the scores and columns that an old version used are still there."""
    try:
        con.execute(f"SELECT ({predicate}\n) FROM pool_scores LIMIT 0").fetchall()
    except duckdb.BinderException:
        return False
    return True


# What DuckDB can't read from the lake, written again as Parquet


def _write_targets(lake: Lake, root: Path, targets: Sequence[str]) -> None:
    tables = []
    for asset in targets:
        if Path(lake.path(asset)).exists():
            labels = lake.read(asset, columns=["target_index", "label", "name"])
            tables.append(labels.append_column("asset", pa.array([asset] * len(labels), pa.string())))
    schema = pa.schema(
        [
            ("target_index", pa.int64()),
            ("label", pa.string()),
            ("name", pa.string()),
            ("asset", pa.string()),
        ]
    )
    table = pa.concat_tables([schema.empty_table(), *(t.cast(schema) for t in tables)])
    with lake.replacing(str(root / "catalog" / "targets.parquet")) as temporary:
        pq.write_table(table, temporary)


# Names


def score_names(scores: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Give the names by which recipes call the columns of each score asset.

    The column stands in the place of the asset's kind, `norm_sim_2/b32/pets`; columns from elsewhere have names that
    somebody else chose, so they stand behind, `external_scores/flyt/dfn`, or are left out where there is but one.
    """
    names = {}
    for asset, columns in scores.items():
        kind, _, rest = asset.partition("/")
        if kind != EXTERNAL:
            names[asset] = [f"{column}/{rest}" for column in columns]
        else:
            names[asset] = [asset] if len(columns) == 1 else [f"{asset}/{column}" for column in columns]
    return names


EXTERNAL = "external_scores"
"""Kind of the assets whose columns are named by the user."""


_SCORE_TYPES = {
    "nearest_target": "BIGINT",
    "cluster": "BIGINT",
    "in_target_cluster": "BOOLEAN",
    "language": "VARCHAR",
    "sieve_caption": "VARCHAR",
    "near_duplicate_of": "VARCHAR",
    "names_synset": "BOOLEAN",
    "words": "BIGINT",
    "characters": "BIGINT",
}


def score_type(column: str) -> str:
    """Give the DuckDB type by which the catalog tells a score's column."""
    return _SCORE_TYPES.get(column, "FLOAT")


def _pattern(root: Path, pattern: str) -> str:
    return sql.text(f"{glob.escape(str(root))}/{pattern}")
