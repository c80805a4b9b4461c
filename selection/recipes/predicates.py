"""Check the predicate of a `where` and list the columns it reads, with DuckDB's own parser.

A predicate may depend on one row only. The model of a step is in `selection.recipes.steps`.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import duckdb


@cache
def predicate_columns(predicate: str) -> frozenset[str]:
    """Return the columns that a predicate reads.

    Args:
        predicate: A DuckDB expression over one row, such as `least(width, height) >= 200`.

    Returns:
        The names as written.

    Raises:
        ValueError: The text is not a single expression, or its value depends on more than the row: a subquery, an
            aggregate, a window, a parameter, `*`, the clock or a random number.
    """
    # Brackets reject "a GROUP BY b"; the bare form rejects "a) OR (b".
    tree = _parse(predicate, f"SELECT 1 WHERE (\n{predicate}\n)")
    _parse(predicate, f"SELECT 1 WHERE {predicate}")
    return frozenset(_walk(predicate, tree, frozenset()))


_REFUSED = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a column by its number",
    "STAR": "*",
    "DEFAULT": "DEFAULT",
}


def _parse(predicate: str, sql: str) -> dict[str, Any]:
    with duckdb.connect() as con:
        ((text,),) = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    parsed = json.loads(text)
    if parsed["error"]:
        raise ValueError(f"where: {predicate!r} is no DuckDB predicate: {parsed['error_message']}")
    if len(parsed["statements"]) != 1:
        raise ValueError(f"where: {predicate!r} is more than one statement")
    return parsed["statements"][0]["node"]["where_clause"]


def _walk(predicate: str, node: Any, bound: frozenset[str]) -> Iterator[str]:
    """Yield the columns below a node of DuckDB's parse tree; `bound` holds parameters of enclosing lambdas."""
    if isinstance(node, list):
        for child in node:
            yield from _walk(predicate, child, bound)
        return
    if not isinstance(node, dict):
        return
    kind = node.get("class")
    if kind in _REFUSED:
        raise _refused(predicate, _REFUSED[kind])
    if kind == "COLUMN_REF":
        path = node["column_names"]
        if path[0] in bound:
            return
        if len(path) > 1:
            raise _refused(predicate, f'{".".join(path)}: write a score as "{"/".join(path)}"')
        yield path[0]
        return
    if kind == "LAMBDA":
        if node["syntax_type"] != "LAMBDA_KEYWORD":
            raise _refused(predicate, "->: write json_extract(a, b), or lambda x: ...")
        bound |= set(_walk(predicate, node["lhs"], frozenset()))
        node = node["expr"]
    if kind == "FUNCTION":
        path = node["qualified_name"]["path"]
        if len(path) > 1:
            raise _refused(predicate, f"{'.'.join(path)}(): write {path[-1]}({path[0]})")
        if node["function_name"].casefold() not in _row_functions():
            what = "which is unknown, an aggregate, or depends on the clock or on chance"
            raise _refused(predicate, f"the function {node['function_name']}, {what}")
    for child in node.values() if kind != "LAMBDA" else [node]:
        yield from _walk(predicate, child, bound)


@cache
def _row_functions() -> frozenset[str]:
    """List the DuckDB functions whose value depends on their arguments alone, in lower case."""
    with duckdb.connect() as con:
        rows = con.execute(
            """
            SELECT lower(function_name) FROM duckdb_functions() GROUP BY ALL
            HAVING bool_and(
                (function_type = 'scalar' AND stability = 'CONSISTENT')
                OR (function_type = 'macro'
                    AND NOT regexp_matches(macro_definition, '(?i)current_|select')))
            """
        ).fetchall()
    return frozenset(name for (name,) in rows)


def _refused(predicate: str, what: str) -> ValueError:
    return ValueError(
        f"where: {predicate!r} uses {what}. A predicate may use a row's own columns and functions of them."
    )
