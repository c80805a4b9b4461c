"""Steps that compare the rows of a group: the best of equal rows, and the top of each stratum.

Here: which rows of each group stay, and the table that explains it. The verdict becomes a column beside the source,
because it depends on other rows.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import duckdb

from core.sql import one, quoted, repeated_hashes
from core.uids import format_uid
from selection.recipes.ranking import StepError, ranked_value, with_column_at
from selection.recipes.steps import Deduplicate, Ranking, Stratify


@dataclass(frozen=True)
class Grouped:
    """The result of a step on groups.

    Attributes:
        relation: A view of the source with one more column, as an SQL identifier.
        predicate: SQL over one row of it: whether the row stays.
        kept: Number of rows that stay.
        table: Query of the table that explains the step. For duplicates: the dropped rows (f0, f1), each with the row
            that stayed for it (kept_f0, kept_f1). For strata: `stratum`, the number of rows that its fraction refers to
            (`basis`), `entered`, `wanted`, `kept`, and value (`threshold`) and uid (tie_f0, tie_f1) of the last row
            that stays.
        value: The ranked value, as SQL over one row, if the step ranks.
        wanted: Rows that the strata ask for, capped by what entered.
        groups: Number of strata, or of groups of duplicates.
        note: A remark for the reader.
    """

    relation: str
    predicate: str
    kept: int
    table: str
    value: str | None = None
    wanted: int | None = None
    groups: int = 0
    note: str | None = None


def best_of_equals(
    con: duckdb.DuckDBPyConnection, step: Deduplicate, column: str, relation: str, inside: str, entered: int
) -> Grouped:
    """Keep the best of the rows that are equal in a column.

    Args:
        con: The connection that holds the source.
        step: The step, with a column to compare.
        column: Prefix for the names of new tables and columns.
        relation: The source as an SQL identifier.
        inside: SQL over one row: whether it entered the step.
        entered: Number of those rows.

    Raises:
        StepError: A row that entered has no value to compare or to rank by.
    """
    assert step.equal is not None
    by = quoted(step.equal)
    kind = str(con.sql(f"SELECT {by} FROM {relation} LIMIT 0").types[0])
    there = f"{by} IS NOT NULL" + (f" AND NOT isnan({by})" if kind in ("FLOAT", "DOUBLE") else "")
    unlike = f"FROM {relation} WHERE {inside} AND NOT ({there})"
    absent, f0, f1 = one(con, f"SELECT count(*), min(f0), arg_min(f1, (f0, f1)) {unlike}")
    if absent:
        raise StepError(
            f"{step.equal} has no value for uid {format_uid(f0, f1)} ({absent} such rows in all), so it can't be "
            f"compared. Remedy: drop such rows first with where: '{there}', or compare another column."
        )
    best = "0.0"
    if step.best is not None:
        best = ranked_value(con, Ranking(score=step.best), f"{column}_best", relation, inside).value
    rows = f"SELECT row_number() OVER () - 1 AS place, f0, f1, {by} AS alike, {best} AS best, {inside} AS entered"
    table = quoted(f"{column}_alike")
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE {table} (place BIGINT, f0 UBIGINT, f1 UBIGINT, kept_f0 UBIGINT, kept_f1 UBIGINT)"
    )
    for twice in repeated_hashes(con, f"hash({by})", f"{relation} WHERE {inside}", entered):
        con.register("twice", {"h": twice})
        con.execute(
            f"""
            INSERT INTO {table}
            SELECT place, f0, f1, first_value(f0) OVER ranked, first_value(f1) OVER ranked
            FROM ({rows} FROM {relation}) WHERE entered AND hash(alike) IN (SELECT h FROM twice)
            WINDOW ranked AS (PARTITION BY alike ORDER BY best DESC, f0, f1)
            QUALIFY row_number() OVER ranked > 1
            """
        ).fetchall()
        con.unregister("twice")
    dropped = con.execute(f"SELECT place FROM {table}").fetchnumpy()["place"]
    groups = one(con, f"SELECT count(DISTINCT (kept_f0, kept_f1)) FROM {table}")[0]
    return Grouped(
        relation=with_column_at(con, relation, f"{column}_kept", dropped, False, default=True),
        predicate=quoted(f"{column}_kept"),
        kept=entered - len(dropped),
        table=f"SELECT f0, f1, kept_f0, kept_f1 FROM {table} ORDER BY f0, f1",
        groups=groups,
    )


def top_of_strata(
    con: duckdb.DuckDBPyConnection, step: Stratify, column: str, relation: str, inside: str, basis: str
) -> Grouped:
    """Keep the best rows of each stratum: floor(N · fraction), or the count.

    Args:
        con: The connection that holds the source.
        step: The step.
        column: Prefix for the names of new tables and columns.
        relation: The source as an SQL identifier.
        inside: SQL over one row: whether it entered the step.
        basis: SQL over one row: whether it counts towards the N of a fraction.

    Raises:
        StepError: A score is NaN, NULL or infinite for a row that entered.
    """
    ranked = ranked_value(con, step, f"{column}_value", relation, inside)
    by, wanted = quoted(step.by), str(step.count)
    if step.fraction is not None:
        part = Fraction(repr(step.fraction))
        wanted = f"(basis::HUGEINT * {part.numerator} // {part.denominator})::BIGINT"
    sizes, ranks = quoted(f"{column}_sizes"), quoted(f"{column}_ranks")
    con.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE {sizes} AS
        SELECT *, {wanted} AS wanted FROM (
            SELECT {by} AS stratum, count(*) FILTER (WHERE {basis}) AS basis,
                count(*) FILTER (WHERE {inside}) AS entered
            FROM {ranked.relation} GROUP BY ALL)
        WHERE basis > 0 OR entered > 0
        """
    ).fetchall()
    strata, expected = one(con, f"SELECT count(*), sum(least(wanted, entered))::BIGINT FROM {sizes}")
    if not expected:
        raise StepError(
            f"fraction {step.fraction!r} of the rows of each {step.by} is less than one row in every one that has rows "
            "here. Remedy: set a larger fraction or a count, or stratify by a column with fewer values."
        )
    con.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE {ranks} AS
        SELECT place, f0, f1, r.stratum, value, rank FROM (
            SELECT *, row_number() OVER (PARTITION BY stratum ORDER BY value DESC, f0, f1) AS rank FROM (
                SELECT row_number() OVER () - 1 AS place, f0, f1, {by} AS stratum, {ranked.value} AS value,
                    {inside} AS entered
                FROM {ranked.relation})
            WHERE entered) AS r JOIN {sizes} AS s ON r.stratum IS NOT DISTINCT FROM s.stratum
        WHERE rank <= wanted
        """
    ).fetchall()
    placed = con.execute(f"SELECT place, rank FROM {ranks}").fetchnumpy()
    return Grouped(
        relation=with_column_at(con, ranked.relation, f"{column}_rank", placed["place"], placed["rank"], math.nan),
        predicate=f"{quoted(f'{column}_rank')} IS NOT NULL",
        kept=len(placed["place"]),
        table=f"""
            SELECT s.stratum, basis, s.entered, wanted, coalesce(kept, 0) AS kept, threshold, tie_f0, tie_f1
            FROM {sizes} AS s LEFT JOIN (
                SELECT stratum, count(*) AS kept, arg_max(value, rank) AS threshold, arg_max(f0, rank) AS tie_f0,
                    arg_max(f1, rank) AS tie_f1
                FROM {ranks} GROUP BY stratum) AS k ON s.stratum IS NOT DISTINCT FROM k.stratum
            ORDER BY s.entered DESC, s.stratum""",
        value=ranked.value,
        wanted=expected,
        groups=strata,
        note=ranked.note,
    )
