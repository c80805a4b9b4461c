"""Execute `balance`: the concepts of the rows that entered, their counts, and which rows stay.

Here: from a relation to the rows that stay. Not here: the rules (`selection.recipes.balance`).
"""

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.sql import one, quoted, text
from selection.recipes.balance import RowConcepts, chances, keep_by_chance, keep_greedily
from selection.recipes.ranking import StepError, with_column_at
from selection.recipes.set_steps import CAPTION, FEATURES, NEAREST, Balance, SelectedSet, feature_columns

_SHOWN = 3  # concepts of a row, the rarest


def balance(
    con: duckdb.DuckDBPyConnection, step: Balance, column: str, relation: str, inside: str, wanted: int | None
) -> SelectedSet:
    """Cut common concepts.

    Args:
        con: The connection that holds the source, and the tables that the step reads.
        step: The step.
        column: Prefix for the names of new tables and columns.
        relation: The source as an SQL identifier.
        inside: SQL over one row: whether it entered the step.
        wanted: Rows to take greedily; None to keep by chance.

    Returns:
        The set. `value` is the chance to stay, or the gain when a row was taken, 0 if it was not. Each of `rows`, which
        entered (f0, f1), has `kept`, `value`, and its rarest `concepts` by number. `concepts` has by `number` the
        `label`, and the rows that `entered` and that were `selected`.

    Raises:
        StepError: No row has a concept.
    """
    entered, concepts, rows_table = (quoted(f"{column}_{name}") for name in ("entered", "concepts", "balanced"))
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE {entered} AS SELECT place, f0, f1, row_number() OVER () - 1 AS number, names "
        f"FROM (SELECT row_number() OVER () - 1 AS place, f0, f1, {_names(con, step, relation)} AS names, "
        f"{inside} IS TRUE AS entered FROM {relation}) WHERE entered"
    ).fetchall()
    label, labels = "name", ""
    if step.concepts.startswith(FEATURES):
        label = "trim(coalesce(label, '') || ' #' || name)"
        labels = f"LEFT JOIN (SELECT concept::VARCHAR AS name, label FROM {quoted(step.tables[0])}) USING (name)"
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE {concepts} AS "
        f"SELECT row_number() OVER (ORDER BY name) - 1 AS number, name, {label} AS label, entered FROM "
        f"(SELECT name, count(*) AS entered FROM (SELECT unnest(names) AS name FROM {entered}) GROUP BY name) {labels}"
    ).fetchall()
    if not one(con, f"SELECT count(*) FROM {concepts}")[0]:
        raise StepError(f"no row that entered has a concept of {step.concepts}. Remedy: other concepts, or other words")
    rows = _row_concepts(con, entered, concepts)
    found = con.execute(f"SELECT place, f0, f1 FROM {entered} ORDER BY number").fetchnumpy()
    if wanted is None:
        value = chances(rows, step.cap)
        kept = keep_by_chance(value, found["f0"], found["f1"], seed=step.seed)
    else:
        taken, gains = keep_greedily(rows, found["f0"], found["f1"], cap=step.cap, count=wanted)
        value, kept = np.zeros(len(found["place"])), np.zeros(len(found["place"]), bool)
        value[taken], kept[taken] = gains, True
    _store(con, rows_table, concepts, rows, found, value, kept)
    relation = with_column_at(con, relation, f"{column}_value", found["place"], value, np.nan)
    relation = with_column_at(con, relation, f"{column}_kept", found["place"], kept, False)
    note = None
    if wanted is not None and kept.sum() < wanted:
        note = f"every concept of the other rows has reached the cap, so {int(kept.sum())} of {wanted} rows were taken"
    return SelectedSet(
        relation=relation,
        predicate=quoted(f"{column}_kept"),
        value=f"({quoted(f'{column}_value')} + 0.0)",
        kept=int(kept.sum()),
        rows=f"SELECT * FROM {rows_table} ORDER BY f0, f1",
        concepts=f"SELECT number, label, entered, selected FROM {concepts} ORDER BY number",
        note=note,
    )


def _names(con: duckdb.DuckDBPyConnection, step: Balance, relation: str) -> str:
    """Return SQL for the names of a row's concepts, a list of different texts."""
    if step.concepts == CAPTION:
        names = r"regexp_extract_all(lower(coalesce(caption, '')), '[\p{L}\p{N}]+')"
        if step.words is not None:
            names = f"list_intersect({names}, [{', '.join(text(word.lower()) for word in step.words)}])"
    elif step.concepts.startswith(NEAREST):
        (table,) = step.tables
        index = quoted(step.concepts)
        names = f"[(SELECT label FROM {quoted(table)} WHERE target_index = {index})]"
    elif step.concepts.startswith(FEATURES):
        index, value = map(quoted, feature_columns(step.concepts.removeprefix(FEATURES)))
        names = f"list_transform(list_filter(list_zip({index}, {value}), lambda x: x[2] > 0), lambda x: x[1]::VARCHAR)"
    else:
        kind = str(con.sql(f"SELECT {quoted(step.concepts)} FROM {relation} LIMIT 0").types[0])
        value = quoted(step.concepts)
        names = f"coalesce({value}, [])::VARCHAR[]" if kind.endswith("[]") else f"[{value}::VARCHAR]"
    return f"list_filter(list_distinct({names}), lambda x: x IS NOT NULL)"


def _row_concepts(con: duckdb.DuckDBPyConnection, entered: str, concepts: str) -> RowConcepts:
    flat = con.execute(
        f"SELECT r.number AS row, c.number AS concept FROM (SELECT number, unnest(names) AS name FROM {entered}) AS r "
        f"JOIN {concepts} AS c USING (name) ORDER BY 1, 2"
    ).fetchnumpy()
    counts = con.execute(f"SELECT entered FROM {concepts} ORDER BY number").fetchnumpy()["entered"]
    n = one(con, f"SELECT count(*) FROM {entered}")[0]
    starts = np.concatenate([[0], np.cumsum(np.bincount(flat["row"], minlength=n))]).astype(np.int64)
    return RowConcepts(flat["concept"].astype(np.int64), starts, counts.astype(np.int64))


def _store(
    con: duckdb.DuckDBPyConnection,
    table: str,
    concepts: str,
    rows: RowConcepts,
    found: dict[str, NDArray[np.uint64]],
    value: NDArray[np.float64],
    kept: NDArray[np.bool_],
) -> None:
    """Store the verdict of each row with its rarest concepts, and the concepts' counts after the step."""
    of_row = np.repeat(np.arange(len(value)), np.diff(rows.starts))
    after = np.bincount(rows.concept[kept[of_row]], minlength=len(rows.counts))
    con.register("beside", {"number": np.arange(len(after)), "selected": after})
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE {concepts} AS "
        f"SELECT c.*, selected FROM {concepts} AS c JOIN beside USING (number)"
    ).fetchall()
    con.unregister("beside")
    con.register("beside", {"f0": found["f0"], "f1": found["f1"], "kept": kept, "value": value})
    con.register("flat", {"row": of_row, "concept": rows.concept, "common": rows.counts[rows.concept]})
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT f0, f1, kept, value, coalesce(concepts, []) AS concepts FROM "
        f"(SELECT *, row_number() OVER () - 1 AS row FROM beside) LEFT JOIN (SELECT row, "
        f"list(concept ORDER BY common, concept)[:{_SHOWN}] AS concepts FROM flat GROUP BY row) USING (row)"
    ).fetchall()
    con.unregister("beside")
    con.unregister("flat")
