"""Running a recipe: the SQL that it means, and what each step did.

Here belongs the way from a relation of rows and scores to the rows that stay. Where the relation
comes from, and where the result goes, does not.

A step is a predicate over one row. `where` is one as it stands; `keep_top` becomes one when the
value of the last row that stays is known: `score > t OR (score = t AND uid <= u)`. So nothing is
sorted to choose, no intermediate table is written, and the predicate that chose a row later explains
it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from selection.recipes import KeepTop, Recipe, Step
from selection.uids import SUBSET_DTYPE, format_uids

_BINS = 4096
_SORTABLE = 1 << 17


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: Its number, from 1.
        kind: `where` or `keep_top`.
        text: The step in one line.
        score: The score that was ranked, for a `keep_top`.
        value: What was ranked, as SQL over one row's columns: a finite float64.
        entered: Rows that reached the step.
        kept: Rows that stayed.
        left: Rows that did not: entered - kept.
        wanted: Rows that a fraction or a count asked for.
        threshold: Smallest value that was kept; for `threshold`, the value that was asked for.
        tie_uid: Where some rows at the threshold stayed and others not, the largest uid that stayed.
        predicate: The step as SQL over one row's f0, f1 and columns.
        note: What a reader should know besides.
    """

    step: int
    kind: str
    text: str
    score: str | None
    value: str | None
    entered: int
    kept: int
    left: int
    wanted: int | None
    threshold: float | None
    tie_uid: str | None
    predicate: str
    note: str | None

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON values; floats read back as the same floats."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """The rows that a recipe chose, as queries over its source, which has to stay as it is.

    Attributes:
        recipe: The recipe's name.
        source_rows: Rows that the recipe began with.
        rows: Rows that stayed after all steps.
        steps: One report a step.
        con: The connection that holds the source.
        source: The source as an SQL identifier.
        inside: SQL over one row: whether the recipe began with it, and whether it was in after step 1, 2, ...
    """

    recipe: str
    source_rows: int
    rows: int
    steps: tuple[StepReport, ...]
    con: duckdb.DuckDBPyConnection
    source: str
    inside: tuple[str, ...]

    def manifest(self) -> duckdb.DuckDBPyRelation:
        """Give the chosen rows, sorted by (f0, f1).

        Returns:
            uid, f0, f1, shard, key, and for each `keep_top` step n the column `step{n}_value` (float64).
        """
        values = [f"{report.value} AS step{report.step}_value" for report in self.steps if report.value]
        columns = ["format('{:016x}{:016x}', f0, f1) AS uid", "f0", "f1", "shard", "key", *values]
        return self.con.sql(f"SELECT {', '.join(columns)} FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1")

    def ranks(self) -> dict[str, NDArray[np.int64]]:
        """Give what the manifest leaves out, because sorting arrays takes a fraction of a window function's time.

        Returns:
            For each `keep_top` step n `step{n}_rank`, in the manifest's order: from 1, among the rows that entered
            the step, by value downwards and uid upwards. The rows that a step keeps are the first of those that
            entered, so their ranks among the kept are their ranks among the entered.
        """
        ranked = [report for report in self.steps if report.value]
        if not ranked:
            return {}
        columns = [f"{self.inside[-1]} IS TRUE AS chosen"]
        for report in ranked:
            columns += [f"{report.value} AS v{report.step}", f"{self.inside[report.step]} IS TRUE AS in{report.step}"]
        anywhere = " OR ".join(self.inside[report.step] for report in ranked)
        found = self.con.execute(
            f"SELECT {', '.join(columns)} FROM {self.source} WHERE {anywhere} ORDER BY f0, f1"
        ).fetchnumpy()
        ranks = {}
        for report in ranked:
            inside = found[f"in{report.step}"]
            values = np.ma.getdata(found[f"v{report.step}"])[inside]
            ranks[f"step{report.step}_rank"] = _ranks(values)[found["chosen"][inside]]
        return ranks

    def subset(self) -> NDArray[np.void]:
        """Give the chosen uids as DataComp's array, sorted by (f0, f1)."""
        query = f"SELECT f0, f1 FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1"
        words = self.con.execute(query).fetchnumpy()
        subset = np.empty(self.rows, dtype=SUBSET_DTYPE)
        subset["f0"], subset["f1"] = words["f0"], words["f1"]
        return subset


def select(con: duckdb.DuckDBPyConnection, name: str, recipe: Recipe, source: str = "source") -> Selection:
    """Choose rows.

    Args:
        con: A DuckDB connection.
        name: The recipe's name, for messages.
        recipe: The recipe.
        source: Name of a relation in `con` with f0, f1 (unsigned 64-bit, unique as pairs), shard, key and
            every column of `recipe.columns()`: the rows that the recipe begins with.

    Returns:
        The chosen rows and a report for each step.

    Raises:
        ValueError: A step keeps nothing, a score that is ranked is NaN, NULL or infinite, a predicate
            does not fit the columns' types, or the source is empty. The message names recipe and step.
    """
    relation = quoted(source)
    total = _one(con, f"SELECT count(*) FROM {relation}")[0]
    if not total:
        raise ValueError(f"recipe {name}: its source has no rows, so there is nothing to choose from.")
    reports: list[StepReport] = []
    inside = ["true"]
    for number, step in enumerate(recipe.steps, start=1):
        rows = f"FROM {relation} WHERE {inside[-1]}"
        try:
            report = _run(con, step, number, rows, reports[-1].kept if reports else total, total)
        except (duckdb.Error, _StepError) as error:
            what = str(error).split("\n", 1)[0]  # DuckDB adds every signature that it knows
            raise ValueError(f"recipe {name}, step {number} ({step.text}): {what}") from error
        reports.append(report)
        inside.append(f"({inside[-1]} AND {_condition(report.predicate)})")
    return Selection(
        recipe=name,
        source_rows=total,
        rows=reports[-1].kept if reports else total,
        steps=tuple(reports),
        con=con,
        source=relation,
        inside=tuple(inside),
    )


def quoted(name: str) -> str:
    """Write a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class _StepError(Exception):
    """A step that can't be carried out; `select` adds recipe and step to the message."""


def _run(con: duckdb.DuckDBPyConnection, step: Step, number: int, rows: str, entered: int, total: int) -> StepReport:
    wanted = threshold = tie_uid = note = None
    if step.keep_top is None:
        predicate = f"({step.where}\n)"
    else:
        top = step.keep_top
        wanted = _wanted(top, total)
        least, most = _range(con, top.score, rows)
        threshold = top.threshold
        if threshold is None:
            assert wanted is not None
            if wanted > entered:
                note = f"{entered} rows entered, fewer than the {wanted} wanted: all stay"
            threshold, tie = _cut(con, top.score, rows, min(wanted, entered), least, most)
            tie_uid = format_uids(*(np.array([word], dtype=np.uint64) for word in tie))[0] if tie else None
        else:
            tie = None
        predicate = _keep_predicate(top.score, threshold, tie)
    if wanted is None:
        kept = _one(con, f"SELECT count(*) {rows} AND {_condition(predicate)}")[0]
    else:
        kept = min(wanted, entered)
    if not kept:
        largest = "" if step.keep_top is None else f" (the largest value is {most!r})"
        raise _StepError(
            f"none of the {entered} rows that entered stays{largest}, and an empty subset can't be "
            "trained on. Remedy: loosen this step."
        )
    return StepReport(
        step=number,
        kind=step.kind,
        text=step.text,
        score=step.keep_top.score if step.keep_top else None,
        value=_value(step.keep_top.score) if step.keep_top else None,
        entered=entered,
        kept=kept,
        left=entered - kept,
        wanted=wanted,
        threshold=threshold,
        tie_uid=tie_uid,
        predicate=predicate,
        note=note,
    )


def _wanted(top: KeepTop, total: int) -> int | None:
    wanted = top.wanted(total)
    if wanted == 0:
        raise _StepError(
            f"fraction {top.fraction!r} of the {total} rows that the recipe began with is less than one row, "
            f"so nothing would be kept. Remedy: a fraction of at least 1/{total}, or a larger pool."
        )
    return wanted


def _range(con: duckdb.DuckDBPyConnection, score: str, rows: str) -> tuple[float, float]:
    """Give the least and the largest value; refuse values that have no place in an order."""
    value = _value(score)
    unusable = f"NOT coalesce(isfinite({value}), false)"
    least, most, bad = _one(con, f"SELECT min({value}), max({value}), count(*) FILTER (WHERE {unusable}) {rows}")
    if bad:
        f0, f1, found = _one(con, f"SELECT f0, f1, {value} {rows} AND {unusable} ORDER BY f0, f1 LIMIT 1")
        uid = format_uids(np.array([f0], dtype=np.uint64), np.array([f1], dtype=np.uint64))[0]
        raise _StepError(
            f"{score} is {'NULL' if found is None else found} for uid {uid} ({bad} such rows in all), "
            f"which has no rank. Remedy: compute the score again, or drop such rows first with "
            f"where: 'isfinite({quoted(score)})'."
        )
    return least, most


def _cut(
    con: duckdb.DuckDBPyConnection, score: str, rows: str, keep: int, least: float, most: float
) -> tuple[float, tuple[int, int] | None]:
    """Find the value of the last row that stays and, if it parts equals, that row's (f0, f1).

    Each pass counts the values in equal bins of [least, most] and goes on with the bin that holds the
    value; a bin that is small, or that can't be divided further, is sorted. So the rows never are.
    """
    value = _value(score)
    within, size, place = rows, float("inf"), keep
    while least != most and size > _SORTABLE:
        bins = con.execute(
            f"""
            SELECT min({value}), max({value}), count(*) {within}
            GROUP BY least({_BINS - 1}, floor(
                ({value} - {_literal(least)}) / ({_literal(most)} - {_literal(least)}) * {_BINS}))
            ORDER BY 1 DESC
            """
        ).fetchall()
        for bin_ in bins:
            least, most, size = bin_
            if place <= size:
                break
            place -= size
        within = f"{rows} AND {value} BETWEEN {_literal(least)} AND {_literal(most)}"
        if len(bins) == 1:
            break
    counted = con.execute(f"SELECT {value}, count(*) {within} GROUP BY 1 ORDER BY 1 DESC").fetchall()
    for group in counted:
        threshold, equal = group
        if place <= equal:
            break
        place -= equal
    if place == equal:
        return threshold, None
    tied = f"{rows} AND {value} = {_literal(threshold)}"
    f0, f1 = _one(con, f"SELECT f0, f1 {tied} ORDER BY f0, f1 LIMIT 1 OFFSET {place - 1}")
    return threshold, (f0, f1)


def _value(score: str) -> str:
    """Write a score as a float64 with one zero, so that a report never depends on which zero came first."""
    return f"({quoted(score)}::DOUBLE + 0.0)"


def _literal(number: float) -> str:
    """Write a float64 so that DuckDB reads the same float64; a bare 0.1 would be a decimal."""
    return f"'{number!r}'::DOUBLE"


def _keep_predicate(score: str, threshold: float, tie: tuple[int, int] | None) -> str:
    value, literal = f"{quoted(score)}::DOUBLE", _literal(threshold)
    if tie is None:
        return f"{value} >= {literal}"
    f0, f1 = (f"{word}::UBIGINT" for word in tie)
    return f"{value} > {literal} OR ({value} = {literal} AND (f0 < {f0} OR (f0 = {f0} AND f1 <= {f1})))"


def _condition(predicate: str) -> str:
    return f"({predicate})"


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank values downwards, from 1; of equal ones the first comes first.

    Float32 numbers, which scores are, become integers in the same order, with the place as the low half: one
    vectorised sort of uint64.

    Args:
        values: Finite float64 of shape [n].

    Returns:
        int64 of shape [n].
    """
    ranks = np.empty(len(values), np.int64)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if len(values) < 1 << 32 and (narrow == values).all():
        bits = narrow.view(np.uint32)
        falling = np.where(bits >> 31 != 0, bits, ~bits & np.uint32(0x7FFFFFFF))
        keys = (falling.astype(np.uint64) << np.uint64(32)) | np.arange(len(values), dtype=np.uint64)
        keys.sort()
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    else:
        order = np.argsort(-values, kind="stable")
    ranks[order] = np.arange(1, len(values) + 1)
    return ranks


def _one(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """Run a query of one row; `fetchall`, because a result left open blocks its connection."""
    return con.execute(sql).fetchall()[0]
