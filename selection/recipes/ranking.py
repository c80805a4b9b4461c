"""Rank rows by one score or several combined, and find the last row that stays.

Here: the ranked value as SQL over one row, and its threshold. Not here: executing steps
(`selection.recipes.execute`).

A combined value depends on all rows that entered the step, through their minimum, mean or ranks. Minima and means are
computed first and become numbers in the SQL, so it still reads one row; ranks become a column beside the source.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.sql import literal, one, quoted
from core.uids import format_uid
from selection.recipes.steps import Ranking

_BINS = 4096  # of a pass that narrows down a quantile
_SORTABLE = 1 << 17  # rows of a bin that is sorted instead of divided again
_FIXED = 40  # binary digits of a score in exact sums


class StepError(UserError):
    """A step can't be executed; `select` adds recipe and step to the message."""


@dataclass(frozen=True)
class Ranked:
    """The value that a step ranks by.

    Attributes:
        value: A finite float64 as SQL over one row of `relation`; larger is better.
        relation: The source, or a view of it with one more column, as an SQL identifier.
        least: The smallest value among the rows that entered.
        most: The largest one.
        note: A remark for the reader.
    """

    value: str
    relation: str
    least: float
    most: float
    note: str | None = None


def ranked_value(con: duckdb.DuckDBPyConnection, top: Ranking, column: str, relation: str, inside: str) -> Ranked:
    """Build the SQL of the value that a step ranks by.

    Args:
        con: The connection that holds the source.
        top: The ranking.
        column: Name for a new column, if the value needs one.
        relation: The source as an SQL identifier.
        inside: SQL over one row: whether it entered the step.

    Raises:
        StepError: A score is NaN, NULL or infinite for a row that entered.
    """
    rows = f"FROM {relation} WHERE {inside}"
    ranges = {score: _range(con, score, score_value(score), rows) for score in top.scores}
    if top.score is not None:
        return Ranked(score_value(top.score), relation, *ranges[top.score])
    flat = [score for score, (least, most) in ranges.items() if least == most]
    note = f"{' and '.join(flat)}: the same for every row that entered, so without effect" if flat else None
    if top.normalise in ("min_max", "z_score", "none"):
        value = _weighted(con, top, rows, ranges)
    else:
        value, relation = _by_ranks(con, top, column, relation, inside)
    return Ranked(value, relation, *_range(con, top.label, value, f"FROM {relation} WHERE {inside}"), note)


def score_value(score: str) -> str:
    """Return SQL for a score as float64; adding 0.0 turns -0.0 into 0.0, so reports do not depend on row order."""
    return f"({quoted(score)}::DOUBLE + 0.0)"


def cut(con: duckdb.DuckDBPyConnection, ranked: Ranked, inside: str, keep: int) -> tuple[float, tuple[int, int] | None]:
    """Return the value of the last of `keep` rows and, if not all rows with that value stay, its (f0, f1)."""
    threshold, place, equal = nth(con, ranked, inside, keep)
    if place == equal:
        return threshold, None
    tied = f"FROM {ranked.relation} WHERE {inside} AND {ranked.value} = {literal(threshold)}"
    f0, f1 = one(con, f"SELECT f0, f1 {tied} ORDER BY f0, f1 LIMIT 1 OFFSET {place - 1}")
    return threshold, (f0, f1)


def nth(con: duckdb.DuckDBPyConnection, ranked: Ranked, inside: str, place: int) -> tuple[float, int, int]:
    """Find the value at a place, counted from 1, in falling order.

    Each pass counts values in equal bins of [least, most] and continues in the bin that holds the place. Only a bin
    that is small, or that can't be divided further, is sorted.

    Returns:
        The value, its place among equal values, and the number of equal values.
    """
    value, least, most = ranked.value, ranked.least, ranked.most
    rows = f"FROM {ranked.relation} WHERE {inside}"
    within, size = rows, float("inf")
    while least != most and size > _SORTABLE:
        bins = con.execute(
            f"""
            SELECT min({value}), max({value}), count(*) {within}
            GROUP BY least({_BINS - 1}, floor(
                ({value} - {literal(least)}) / ({literal(most)} - {literal(least)}) * {_BINS}))
            ORDER BY 1 DESC
            """
        ).fetchall()
        for bin_ in bins:  # from the largest values down, until the place is inside
            least, most, size = bin_
            if place <= size:
                break
            place -= size
        within = f"{rows} AND {value} BETWEEN {literal(least)} AND {literal(most)}"
        if len(bins) == 1:  # rounding puts all values into one bin: dividing again would change nothing
            break
    counted = con.execute(f"SELECT {value}, count(*) {within} GROUP BY 1 ORDER BY 1 DESC").fetchall()
    for group in counted:
        found, equal = group
        if place <= equal:
            break
        place -= equal
    return found, place, equal


def keep_predicate(value: str, threshold: float, tie: tuple[int, int] | None) -> str:
    """Return SQL over one row: whether it stays, given the last row that does."""
    if tie is None:
        return f"{value} >= {literal(threshold)}"
    f0, f1 = (f"{word}::UBIGINT" for word in tie)
    at = literal(threshold)
    return f"{value} > {at} OR ({value} = {at} AND (f0 < {f0} OR (f0 = {f0} AND f1 <= {f1})))"


def places(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each value's place in falling order, from 1; equal values keep their order.

    Values that are exact in float32, as scores are, become uint64 keys: 32 bits that sort like the value, then the
    row. One vectorised sort of the keys is several times faster than an argsort of floats.

    Args:
        values: Finite float64 of shape [n].

    Returns:
        int64 of shape [n].
    """
    found = np.empty(len(values), np.int64)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if len(values) < 1 << 32 and (narrow == values).all():
        bits = narrow.view(np.uint32)
        # IEEE 754 bits of positive floats sort like the floats, those of negative floats in reverse. For a falling
        # order the former are inverted (all but the sign), the latter are right already.
        falling = np.where(bits >> 31 != 0, bits, ~bits & np.uint32(0x7FFFFFFF))
        keys = (falling.astype(np.uint64) << np.uint64(32)) | np.arange(len(values), dtype=np.uint64)
        keys.sort()
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    else:
        order = np.argsort(-values, kind="stable")
    found[order] = np.arange(1, len(values) + 1)
    return found


def competition_ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each value's rank, 1 + the number of larger values; equal values have equal ranks.

    Args:
        values: Finite float64 of shape [n].

    Returns:
        int64 of shape [n].
    """
    order = np.argsort(values)
    rising = values[order]
    last_of_equals = np.flatnonzero(np.append(rising[1:] != rising[:-1], True))
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.repeat(len(values) - last_of_equals, np.diff(last_of_equals, prepend=-1))
    return ranks


def _range(con: duckdb.DuckDBPyConnection, label: str, value: str, rows: str) -> tuple[float, float]:
    """Return the smallest and the largest value; raise StepError if one is NULL, NaN or infinite."""
    unusable = f"NOT coalesce(isfinite({value}), false)"
    least, most, bad = one(con, f"SELECT min({value}), max({value}), count(*) FILTER (WHERE {unusable}) {rows}")
    if bad:
        f0, f1, found = one(con, f"SELECT f0, f1, {value} {rows} AND {unusable} ORDER BY f0, f1 LIMIT 1")
        raise StepError(
            f"{label} is {'NULL' if found is None else found} for uid {format_uid(f0, f1)} ({bad} such rows in all), "
            f"which has no rank. Remedy: drop such rows first with where: 'isfinite({quoted(label)})'; if the score is "
            "of an encoder with `of`, intersect that subset first; or compute the score again."
        )
    return least, most


def _weighted(con: duckdb.DuckDBPyConnection, top: Ranking, rows: str, ranges: dict[str, tuple[float, float]]) -> str:
    """Return SQL for the weighted sum of scores; a constant score that is normalised adds nothing."""
    assert top.weighted is not None
    terms = []
    for score, weight in top.weighted.items():
        if top.normalise == "none":
            terms.append(f"{literal(weight)} * {score_value(score)}")
            continue
        least, most = ranges[score]
        if least == most:
            continue
        origin, unit = least, most - least
        if top.normalise == "z_score":
            origin, unit = _mean_and_deviation(con, score_value(score), rows, least, most)
        terms.append(f"{literal(weight)} * (({score_value(score)} - {literal(origin)}) / {literal(unit)})")
    return f"({' + '.join(['0.0::DOUBLE', *terms])})"


def _mean_and_deviation(
    con: duckdb.DuckDBPyConnection, value: str, rows: str, least: float, most: float
) -> tuple[float, float]:
    """Return mean and standard deviation, independent of the order in which threads add rows.

    A sum of floats depends on its order, so values are rounded to multiples of 2⁻⁴⁰ of their range, and these
    integers are summed exactly.
    """
    steps = f"round(({value} - {literal(least)}) / {literal(most - least)} * {1 << _FIXED})::HUGEINT"
    n, total, squares = one(con, f"SELECT count(*), sum(s), sum(s * s) FROM (SELECT {steps} AS s {rows})")
    unit = (most - least) / (1 << _FIXED)
    variance = Fraction(int(n) * int(squares) - int(total) ** 2, int(n) ** 2)
    return least + float(Fraction(int(total), int(n))) * unit, math.sqrt(variance) * unit


def _by_ranks(con: duckdb.DuckDBPyConnection, top: Ranking, column: str, relation: str, inside: str) -> tuple[str, str]:
    """Create a view of the source with the combined ranks as a column, NULL for rows that did not enter.

    Returns:
        SQL of the value, and the view.
    """
    selected = [f"{score_value(score)} AS s{number}" for number, score in enumerate(top.scores)]
    found = con.execute(f"SELECT {inside} IS TRUE AS entered, {', '.join(selected)} FROM {relation}").fetchnumpy()
    entered = np.asarray(found.pop("entered"))
    n = int(entered.sum())
    total = np.zeros(n)
    for number, score in enumerate(top.scores):
        ranks = competition_ranks(np.ma.getdata(found.pop(f"s{number}"))[entered])
        if top.weighted is None:
            total -= ranks
        else:
            total += top.weighted[score] * ((n - ranks) / max(n - 1, 1))
    values = np.full(len(entered), np.nan)
    values[entered] = total
    return f"({quoted(column)} + 0.0)", with_column(con, relation, column, values)


def with_column_at(
    con: duckdb.DuckDBPyConnection,
    relation: str,
    column: str,
    places: NDArray[np.int64],
    values: NDArray[Any] | bool,
    default: bool | int | float,
) -> str:
    """Create a view of a relation with one more column, given by its values at some places, and return its name.

    Args:
        con: The connection that holds the relation.
        relation: As an SQL identifier.
        column: The new column's name.
        places: Positions in the order of a scan, from 0: `row_number() OVER () - 1`.
        values: The values there, of the type of `default`.
        default: The value at all other positions; NaN becomes NULL.
    """
    whole = np.full(one(con, f"SELECT count(*) FROM {relation}")[0], default)
    whole[places] = values
    return with_column(con, relation, column, whole)


def with_column(con: duckdb.DuckDBPyConnection, relation: str, column: str, values: NDArray[Any]) -> str:
    """Create a view of a relation with one more column, given in the order of a scan, and return its name.

    Args:
        con: The connection that holds the relation.
        relation: As an SQL identifier.
        column: The new column's name.
        values: float64, int64 or bool of shape [n]; NaN becomes NULL.
    """
    beside = {"value": values}
    con.register("beside", beside)
    value = "nullif(value, 'nan'::DOUBLE)" if values.dtype.kind == "f" else "value"
    con.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(column)} AS SELECT {value} AS {quoted(column)} FROM beside")
    con.unregister("beside")
    view = quoted(f"source with {column}")
    con.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS SELECT * FROM {relation} POSITIONAL JOIN {quoted(column)}")
    return view
