"""The macro explain(uid): what each step of each recipe's newest version did with a sample, and why.

The macro judges the sample's scores of today by the steps as the version records them. Where a step's verdict depends
on other rows, it reads what the version stored about them.
"""

import glob
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb

from core import sql
from resources.catalog.explained_concepts import Features, features_of, judge_concepts
from resources.catalog.scores import CatalogScore, Scores, by_recipe_name
from resources.catalog.views import POOL_COLUMNS, Place, no_rows, placed_rows, renamed

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
    "concepts": "VARCHAR",
}

_SAMPLE = "f0 = uid_word(sample, 1) AND f1 = uid_word(sample, 17)"

Record = Mapping[str, Any]
Step = Mapping[str, Any]


def explain_macro(con: duckdb.DuckDBPyConnection, place: Place, records: Sequence[Record], scores: Scores) -> str:
    """Write explain(uid): a row for each step of each recipe's newest version at build time.

    Verdicts: kept; dropped; not reached (an earlier step dropped it); brought in (by a union); unknown (a score that
    the step needs is missing now, or the step ranks by ranks, which a single row does not have, and is not the last);
    changed (today's scores would keep it, yet it is not in the subset). Step 0 is the recipe's source. A uid that is
    not in the pool gets one row that says so, or the reasons where a rejected sample has that key.

    Args:
        con: a connection with the views.
        place: folder of the lake, and path of the catalog.
        records: lineage records of the versions.
        scores: the score assets.
    """
    by_name = by_recipe_name(scores)
    ctes = _sample_ctes(place, scores)
    steps = []
    for number, record in enumerate(records):
        ctes.append(f"judged{number} AS ({_judged(con, place.root, record)})")
        steps += _explained_steps(record, f"judged{number}", by_name)
    ctes.append(
        "found AS MATERIALIZED ("
        + " UNION ALL BY NAME ".join([no_rows(place, _EXPLAINED), *steps])
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


# The sample


def _sample_ctes(place: Place, scores: Scores) -> list[str]:
    """Write the sample's rows of `pool_scores` as CTEs.

    Only f0 is looked up in all files of the pool, and only where their Bloom filters allow it. The places found come
    first and by themselves, so that DuckDB opens one file of every asset and reads one row group.
    """
    pool, scored = placed_rows(place, scores, guarded=False)
    ctes = [
        f"places AS MATERIALIZED (SELECT filename, file_row_number, f0 FROM ({pool}) WHERE f0 = uid_word(sample, 1))",
        f"pool_rows AS MATERIALIZED (SELECT pool.* FROM ({pool}) AS pool JOIN places "
        "USING (filename, file_row_number, f0) WHERE pool.f1 = uid_word(sample, 17))",
    ]
    selected, joins = [f"pool_rows.{sql.quoted(column)}" for column in POOL_COLUMNS], []
    for number, (score, query) in enumerate(zip(scores, scored, strict=True)):
        # Taken from the pool's file, because DuckDB may spell the root in another way.
        file = f"regexp_replace(filename, 'raw_pool(/[^/]*)$', {sql.text(score.asset)} || '\\1')"
        ctes.append(
            f"score_rows{number} AS MATERIALIZED (SELECT s.* FROM ({query}) AS s "
            f"JOIN (SELECT * REPLACE ({file} AS filename) FROM pool_rows) "
            "USING (filename, shard, file_row_number, f0, f1))"
        )
        joins.append(f"LEFT JOIN score_rows{number} USING (shard, file_row_number)")
        selected += renamed(f"score_rows{number}", score.columns)
    return [*ctes, f"sample_rows AS MATERIALIZED (SELECT {', '.join(selected)} FROM pool_rows {' '.join(joins)})"]


# What each step decides


def _judged(con: duckdb.DuckDBPyConnection, root: str, record: Record) -> str:
    """Write the query of one row: the sample, its place in the version, and what each step decides.

    "pass n" is what step n decides by itself, "in n" whether the row is in after the step; NULL is unknown.
    """
    recipe, version, steps = record["recipe"], record["version"], record["steps"]
    ranked = [step["step"] for step in steps if step["score"] is not None]
    stored = "".join(f', step{n}_value AS "value {n}", step{n}_rank AS "rank {n}"' for n in ranked)
    if steps and steps[-1]["kind"] == "soft_cap_sample":
        stored += ", copies"
    folder = f"subset/{glob.escape(recipe)}/{version}"
    member = (
        f'SELECT true AS "member"{stored} FROM read_parquet({sql.pattern(root, f"{folder}/manifest.parquet")}) '
        f"WHERE {_SAMPLE}"
    )
    set_files = {read["name"]: read.get("file", "source_uids.parquet") for read in _sets(record)}  # as of format 2

    def in_set(name: str) -> str:
        file = sql.pattern(root, f"{folder}/{set_files[name]}")
        return f"EXISTS (SELECT 1 FROM read_parquet({file}) WHERE {_SAMPLE})"

    source = record["source"]
    passes = [f'f0 IS NOT NULL AND {"true" if source["kind"] == "pool" else in_set(source["name"])} AS "pass 0"']
    states, state = ['"pass 0" AS "in 0"'], '"pass 0"'
    for step in steps:
        number, value = step["step"], _value(step)
        binds = value is not None and _binds(con, value)
        if step.get("set") is not None:
            decides = f"f0 IS NOT NULL AND {'NOT ' if step['kind'] == 'except' else ''}{in_set(step['set'])}"
        elif step.get("concepts") is not None:
            table, concepts = (
                f"read_parquet({sql.pattern(root, f'{folder}/{step[name]}')})" for name in ("file", "concepts")
            )
            judged = judge_concepts(step, table, concepts, _SAMPLE, _bound(con, record, step))
            decides, value, binds = f"f0 IS NOT NULL AND {judged.decides}", judged.value, True
            passes += [f'({judged.kept}) AS "if kept {number}"', f'({judged.dropped}) AS "if dropped {number}"']
        elif step.get("file") is not None:
            table = f"read_parquet({sql.pattern(root, '/'.join([folder, step['file']]))})"
            if step["kind"] == "deduplicate":
                decides = f"f0 IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {table} WHERE {_SAMPLE})"
                instead = f"SELECT format('{{:016x}}{{:016x}}', kept_f0, kept_f1) FROM {table} WHERE {_SAMPLE}"
                passes.append(f'({instead}) AS "instead {number}"')
            else:
                binds = binds and _binds(con, sql.quoted(step["by"]))
                decides, threshold = _in_stratum(step, table) if binds else ("NULL::BOOLEAN", "NULL::DOUBLE")
                passes.append(f'{threshold} AS "threshold {number}"')
        else:
            known = _binds(con, step["predicate"])
            decides = f"coalesce(({step['predicate']}\n), false)" if known else "NULL::BOOLEAN"
        passes.append(f'{decides} AS "pass {number}"')
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
                    FROM read_text({sql.pattern(root, f"{folder}/lineage.json")}))
                ORDER BY shard, source_row LIMIT 1
            ) ON true LEFT JOIN ({member}) ON true
            WHERE "member" OR EXISTS (FROM sample_rows))"""


def _value(step: Step) -> str | None:
    """Write the number that a step compares, if it compares one."""
    if step["score"] is not None:
        return str(step.get("value") or sql.quoted(step["score"]))
    return sql.quoted(step["by"]) if step["kind"] == "deduplicate" and step["threshold"] is not None else None


def _in_stratum(step: Step, table: str) -> tuple[str, str]:
    """Write whether a row is in the top of its stratum, and the stratum's threshold, from the stored strata."""
    value, of_row = step["value"], f"FROM {table} AS s WHERE s.stratum IS NOT DISTINCT FROM {sql.quoted(step['by'])}"
    stays = f"{value} > threshold OR ({value} = threshold AND (f0 < tie_f0 OR (f0 = tie_f0 AND f1 <= tie_f1)))"
    return f"coalesce((SELECT {stays} {of_row}), false)", f"(SELECT threshold {of_row})"


def _sets(record: Record) -> list[Mapping[str, Any]]:
    """Return a record's entries about the recipes and uid lists that its recipe reads."""
    return [read for read in (record["source"], *record.get("sets", {}).values()) if read["kind"] != "pool"]


def _bound(con: duckdb.DuckDBPyConnection, record: Record, step: Step) -> list[Features]:
    """Return the features that a step reads and that still exist."""
    return [read for read in features_of(record, step) if all(_binds(con, sql.quoted(name)) for name in read[1:])]


def _binds(con: duckdb.DuckDBPyConnection, predicate: str) -> bool:
    """Return whether the scores and columns that an old version used still exist."""
    try:
        con.execute(f"SELECT ({predicate}\n) FROM pool_scores LIMIT 0").fetchall()
    except duckdb.BinderException:
        return False
    return True


# The rows that explain shows


def _explained_steps(record: Record, judged: str, by_name: Mapping[str, CatalogScore]) -> list[str]:
    """Write a query for the source and one for each step."""
    source, steps = record["source"], record["steps"]
    named = {
        "pool": "from the pool",
        "recipe": f"from recipe {source['name']} {source.get('version')}",
        "uids": f"from the uid list {source['name']}",
    }
    begin = {"step": 0, "kind": "from", "text": named[source["kind"]], "score": None, "threshold": None}
    last_union = max((step["step"] for step in steps if step["kind"] == "union"), default=0)
    queries = []
    for step in [begin, *steps]:
        columns = {
            "recipe": sql.text(record["recipe"]),
            "version": sql.text(record["version"]),
            **_step_columns(step, by_name),
            "verdict": _verdict(step, last=len(steps), last_union=last_union),
        }
        if "in_favour_of" in columns:
            shown = f"CASE WHEN ({columns['verdict']}) = 'dropped' THEN {columns['in_favour_of']} END"
            columns["in_favour_of"] = shown
        if step.get("concepts") is not None:
            number = step["step"]
            reasons = f"WHEN 'kept' THEN \"if kept {number}\" WHEN 'dropped' THEN \"if dropped {number}\""
            columns["concepts"] = f"CASE ({columns['verdict']}) {reasons} END"
        selected = ", ".join(f"{value} AS {name}" for name, value in columns.items())
        queries.append(f"SELECT {selected} FROM {judged}")
    return queries


def _step_columns(step: Step, by_name: Mapping[str, CatalogScore]) -> dict[str, str]:
    """Write the columns of a step's row, except the verdict."""
    number = step["step"]
    columns = {"step": str(number), "text": sql.text(step["text"])}
    if step["threshold"] is not None:
        columns["threshold"] = f"{sql.text(repr(float(step['threshold'])))}::DOUBLE"
    if step["score"] is not None:
        columns |= {
            "score": sql.text(step["score"]),
            "value": f'coalesce("value {number}", "score {number}")',
            "rank": f'"rank {number}"',
        }
    if step["kind"] == "stratify":
        columns["threshold"] = f'"threshold {number}"'
    if step["kind"] == "soft_cap_sample":
        columns["copies"] = "copies"
    if step["kind"] == "deduplicate" and step.get("file") is not None:
        columns["in_favour_of"] = f'"instead {number}"'
    elif step["kind"] == "deduplicate" and step["threshold"] is not None:
        columns |= {"score": sql.text(step["by"]), "value": f'"score {number}"'}
        better = by_name[step["by"]].in_favour_of if step["by"] in by_name else None
        if better is not None:
            columns["in_favour_of"] = sql.quoted(better)
    for name in sorted({step["score"], *(step.get("scores") or ())} - {None}):
        if name in by_name and (caption := by_name[name].best_caption) is not None:
            columns["best_caption"] = sql.quoted(caption)
    nearest = by_name.get(step["score"])
    if nearest is not None and nearest.nearest_target is not None:
        columns |= _nearest_target(nearest.nearest_target, nearest.targets)
    return columns


def _nearest_target(column: str, targets: str | None) -> dict[str, str]:
    """Write the nearest target's index, label and name."""
    index = sql.quoted(column)
    of_target = f"FROM targets WHERE asset = {sql.text(targets)} AND target_index = {index}"
    return {
        "nearest_target": index,
        "nearest_label": f"(SELECT label {of_target})",
        "nearest_name": f"(SELECT name {of_target})",
    }


def _verdict(step: Step, *, last: int, last_union: int) -> str:
    """Write a step's verdict.

    Args:
        step: the step.
        last: number of the version's last step.
        last_union: number of its last union, 0 if it has none.
    """
    number = step["step"]
    unknown = f'"pass {number}" IS NULL'
    near = step["kind"] == "deduplicate" and step.get("file") is None and step["threshold"] is not None
    if (step["score"] is not None and step.get("concepts") is None) or near:
        unknown += f' OR "score {number}" IS NULL'
    reached = f'coalesce("in {number - 1}", false)' if number else "true"
    if step["kind"] == "union":
        verdict = f"WHEN {reached} THEN 'kept' WHEN \"pass {number}\" THEN 'brought in' ELSE 'not reached'"
    else:
        # Where other rows decide, no row can be judged alone; at the last step, membership gives the answer.
        dropped = number == last and f'"step{number}_' in step.get("predicate", "")
        verdict = (
            f"WHEN NOT {reached} THEN 'not reached' WHEN {unknown} THEN '{'dropped' if dropped else 'unknown'}' "
            f"WHEN \"pass {number}\" THEN '{'changed' if number == last else 'kept'}' ELSE 'dropped'"
        )
    # A member has passed all steps after the last union, whatever its scores are today.
    kept = "WHEN \"member\" THEN 'kept' " if number > last_union or not last_union else ""
    return f"CASE {kept}{verdict} END"
