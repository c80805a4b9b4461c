"""Statistics of columns for a step's `report`: over the rows that entered, stayed and were dropped.

All are quantiles and counts. None is a sum of floats, which would depend on the order in which threads add.
"""

from collections.abc import Sequence
from typing import Any

import duckdb

from core.sql import one, quoted
from selection.recipes.ranking import Ranked, nth, score_value

COMMONEST = 10
OTHERS, MISSING = "all others", "missing"
_GROUPS = ("entered", "kept", "dropped")
_QUARTILES = ("smallest", "lower quartile", "median", "upper quartile", "largest")
_NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
_NUMBERS |= {"FLOAT", "DOUBLE"}


def summarise(
    con: duckdb.DuckDBPyConnection, columns: Sequence[str], relation: str, before: str, after: str
) -> tuple[dict[str, Any], ...]:
    """Summarise columns.

    Numbers: smallest, quartiles (the value at place ceil(q · n), from 1, in rising order) and largest. Other types:
    counts of the commonest values among the rows that entered, and of all others together. Both: the number of rows
    without a finite value, if any.

    Args:
        con: The connection that holds the rows.
        columns: Their names.
        relation: The rows, as an SQL identifier.
        before: SQL over one row: whether it entered.
        after: SQL over one row: whether it is selected after the step.

    Returns:
        Rows of a table: `name` (the column), `what`, and a value for each of `entered`, `kept` and `dropped`; None
        for an empty group.
    """
    groups = (before, after, f"({before} AND {after} IS NOT TRUE)")  # a predicate that is NULL drops the row too
    rows: list[dict[str, Any]] = []
    for column in columns:
        kind = str(con.sql(f"SELECT {quoted(column)} FROM {relation} LIMIT 0").types[0])
        statistics = _numbers if kind in _NUMBERS else _values
        rows += [
            {"name": column, "what": what, **dict(zip(_GROUPS, found, strict=True))}
            for what, found in statistics(con, column, relation, groups)
        ]
    return tuple(rows)


def _numbers(
    con: duckdb.DuckDBPyConnection, column: str, relation: str, groups: Sequence[str]
) -> list[tuple[str, list[Any]]]:
    value = score_value(column)
    usable = f"coalesce(isfinite({value}), false)"
    inside = [f"({group} AND {usable})" for group in groups]
    asked = [
        f"count(*) FILTER (WHERE {rows}), min({value}) FILTER (WHERE {rows}), max({value}) FILTER (WHERE {rows})"
        for rows in inside
    ]
    absent = [f"count(*) FILTER (WHERE {group} AND NOT {usable})" for group in groups]
    result = one(con, f"SELECT {', '.join([*asked, *absent])} FROM {relation}")
    found = []
    for number, rows in enumerate(inside):
        n, least, most = result[3 * number : 3 * number + 3]
        ranked = Ranked(value, relation, least, most)
        # ceil(q·n/4) in rising order is n - ceil(q·n/4) + 1 in the falling order of `nth`.
        quartiles = [nth(con, ranked, rows, n - -(-n * q // 4) + 1)[0] if n else None for q in (1, 2, 3)]
        found.append([least, *quartiles, most])
    missing = list(result[3 * len(groups) :])
    table = list(zip(_QUARTILES, map(list, zip(*found, strict=True)), strict=True))
    return table + [(MISSING, missing)] * any(missing)


def _values(
    con: duckdb.DuckDBPyConnection, column: str, relation: str, groups: Sequence[str]
) -> list[tuple[str, list[Any]]]:
    counts = ", ".join(f"count(*) FILTER (WHERE {group})" for group in groups)
    anywhere = " OR ".join(groups)
    found = con.execute(
        f"SELECT {quoted(column)}::VARCHAR AS value, {counts} FROM {relation} WHERE {anywhere} GROUP BY 1 "
        f"ORDER BY value IS NULL, 2 DESC, 1 LIMIT {COMMONEST}"
    ).fetchall()
    total = con.execute(f"SELECT {counts} FROM {relation}").fetchall()[0]
    absent = con.execute(f"SELECT {counts} FROM {relation} WHERE {quoted(column)} IS NULL").fetchall()[0]
    table = [(value, list(figures)) for value, *figures in found if value is not None]
    listed = [sum(figures[place] for _, figures in table) for place in range(len(groups))]
    others = [all_ - some - none for all_, some, none in zip(total, listed, absent, strict=True)]
    table += [(OTHERS, others)] * any(others)
    return table + [(MISSING, list(absent))] * any(absent)
