"""Check the predicate of a `where` and list the columns it reads, with DuckDB's own parser.

A predicate may depend on one row only. The model of a step is in `selection.recipes.steps`.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import duckdb

from core.names import suggestion


@cache
def predicate_columns(predicate: str) -> frozenset[str]:
    """Return the columns that a predicate reads.

    Args:
        predicate: A DuckDB expression over one row, such as `least(width, height) >= 200`.

    Returns:
        The names as written.

    Raises:
        ValueError: The text is not a single expression, or its value depends on more than the row: a subquery, an
            aggregate, a window, a parameter, `*`, or a function that is not in `FUNCTIONS`.
    """
    # Brackets reject "a GROUP BY b"; the bare form rejects "a) OR (b".
    tree = _parse(predicate, f"SELECT 1 WHERE (\n{predicate}\n)")
    _parse(predicate, f"SELECT 1 WHERE {predicate}")
    return frozenset(_walk(predicate, tree, frozenset()))


FUNCTIONS = {
    "conditions": "coalesce, greatest, if, ifnull, least, nullif",
    "numbers": (
        "abs, acos, add, asin, atan, atan2, bit_count, cbrt, ceil, ceiling, cos, degrees, divide, even, exp, "
        "fdiv, floor, fmod, gcd, isfinite, isinf, isnan, lcm, ln, log, log10, log2, mod, multiply, pi, pow, "
        "power, radians, round, round_even, sign, signbit, sin, sqrt, subtract, tan, trunc, xor"
    ),
    "text": (
        "ascii, bit_length, char_length, character_length, chr, concat, concat_ws, contains, ends_with, "
        "ilike_escape, instr, lcase, left, len, length, length_grapheme, like_escape, lower, lpad, ltrim, "
        "nfc_normalize, not_ilike_escape, not_like_escape, octet_length, ord, overlay, parse_filename, "
        "position, prefix, regexp_escape, regexp_extract, regexp_extract_all, regexp_full_match, "
        "regexp_matches, regexp_replace, replace, reverse, right, rpad, rtrim, split, split_part, "
        "starts_with, str_split, str_split_regex, string_split, string_split_regex, strip_accents, strlen, "
        "strpos, substr, substring, suffix, translate, trim, ucase, unicode, upper, url_decode, url_encode"
    ),
    "similar text": (
        "damerau_levenshtein, editdist3, hamming, jaccard, jaro_similarity, jaro_winkler_similarity, "
        "levenshtein, mismatches"
    ),
    "hashes": ("from_hex, hex, md5, md5_number, md5_number_lower, md5_number_upper, sha1, sha256, to_hex, unhex"),
    "lists and maps": (
        "array_contains, array_length, array_to_string, cardinality, element_at, flatten, list_avg, "
        "list_concat, list_contains, list_count, list_distinct, list_element, list_extract, list_filter, "
        "list_has, list_has_all, list_has_any, list_max, list_min, list_pack, list_position, list_reduce, "
        "list_reverse, list_slice, list_sort, list_sum, list_transform, list_unique, list_value, map, "
        "map_contains, map_extract, map_keys, map_values, row, struct_extract, struct_pack"
    ),
    "JSON": (
        "json_array_length, json_contains, json_exists, json_extract, json_extract_path, "
        "json_extract_path_text, json_extract_string, json_keys, json_type, json_valid, json_value"
    ),
    "dates": (
        "date_diff, date_part, date_trunc, datediff, datepart, datetrunc, day, dayofweek, dayofyear, hour, "
        "make_date, minute, month, second, strptime, to_days, to_hours, to_minutes, to_months, to_seconds, "
        "to_weeks, to_years, try_strptime, week, year"
    ),
}
"""The functions that a predicate may use, by subject. Operators, CASE, CAST, IN, LIKE and BETWEEN need no entry.

Each depends on its arguments alone: not on the clock, chance, the session, files or the environment. `hash` is
left out, because its values differ between versions of DuckDB.
"""

_ALLOWED = frozenset(name for names in FUNCTIONS.values() for name in names.split(", "))

_KEYWORDS = frozenset(
    (
        "current_catalog",
        "current_date",
        "current_localtime",
        "current_localtimestamp",
        "current_role",
        "current_schema",
        "current_time",
        "current_timestamp",
        "current_user",
        "localtime",
        "localtimestamp",
        "session_user",
        "user",
    )
)
"""Functions that SQL calls without brackets; DuckDB's parser takes them for columns."""

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
        if path[0].casefold() in _KEYWORDS:
            raise _refused(predicate, f"{path[0]}, whose value does not depend on the row")
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
        name = node["function_name"].casefold()
        if name not in _ALLOWED and any(letter.isalpha() for letter in name):  # an operator's name has no letter
            raise _refused(predicate, f"the function {name}, which is not in the list; {suggestion(name, _ALLOWED)}")
    for child in node.values() if kind != "LAMBDA" else [node]:
        yield from _walk(predicate, child, bound)


def _refused(predicate: str, what: str) -> ValueError:
    return ValueError(
        f"where: {predicate!r} uses {what}. A predicate may use a row's own columns and functions of them."
    )
