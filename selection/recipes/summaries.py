"""What a step's `report` tells of columns: over the rows that entered, that stayed, and that were dropped.

Here belongs which figures those are. They are places in an order and counts, never sums of floats, so that they do not
depend on which thread added what first.
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
    """Sum columns up.

    Of numbers: the smallest, the quartiles (the value at place ceil(q · n), from 1, upwards) and the largest. Of
    anything else: how often the commonest values occur among the rows that entered, and all others together. Of both:
    how many rows have no finite value, if any.

    Args:
        con: The connection that holds the rows.
        columns: Their names.
        relation: The rows, as an SQL identifier.
        before: SQL over one row: whether it entered.
        after: The same: whether it is in after the step.

    Returns:
        Rows of a table: `name` (the column), `what`, and a figure for each of `entered`, `kept`, `dropped`, None where
        a group has none.
    """
    groups = (before, after, f"({before} AND {after} IS NOT TRUE)")  # which a NULL did not let through either
    rows: list[dict[str, Any]] = []
    for column in columns:
        kind = str(con.sql(f"SELECT {quoted(column)} FROM {relation} LIMIT 0").types[0])
        figures = _numbers if kind in _NUMBERS else _values
        rows += [
            {"name": column, "what": what, **dict(zip(_GROUPS, found, strict=True))}
            for what, found in figures(con, column, relation, groups)
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
    told = one(con, f"SELECT {', '.join([*asked, *absent])} FROM {relation}")
    found = []
    for number, rows in enumerate(inside):
        n, least, most = told[3 * number : 3 * number + 3]
        ranked = Ranked(value, relation, least, most)
        quartiles = [nth(con, ranked, rows, n - -(-n * q // 4) + 1)[0] if n else None for q in (1, 2, 3)]
        found.append([least, *quartiles, most])
    missing = list(told[3 * len(groups) :])
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
