"""Running a recipe: the SQL that it means, and what each step did.

Here belongs the way from a relation of rows and scores to the rows that stay. Where the relation
comes from, and where the result goes, does not.

A step is a predicate over one row. `where` is one as it stands, a set is a column of the relation, and
`keep_top` becomes one when the value of the last row that stays is known: `score > t OR (score = t AND
uid <= u)`. So nothing is sorted to choose, no intermediate table is written, and the predicate that chose
a row later explains it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from selection.ranking import StepError, cut, keep_predicate, one, places, quoted, ranked_value
from selection.recipes import POOL, KeepTop, Recipe, Step
from selection.uids import SUBSET_DTYPE, format_uids


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: Its number, from 1.
        kind: As in the recipe: `where`, `keep_top`, `union`, ...
        text: The step in one line.
        entered: Rows that reached the step.
        kept: Rows that were in after it.
        predicate: The step as SQL over one row's f0, f1 and columns.
        joined: Rows that a `union` brought in.
        set: The recipe or uid list that the step names.
        score: What was ranked by, in words: for one score, its name.
        scores: The scores that were ranked by.
        value: What was ranked, as SQL over one row's columns: a finite float64.
        wanted: Rows that a fraction or a count asked for.
        threshold: Smallest value that was kept; for `threshold`, the value that was asked for.
        tie_uid: Where some rows at the threshold stayed and others not, the largest uid that stayed.
        note: What a reader should know besides.
    """

    step: int
    kind: str
    text: str
    entered: int
    kept: int
    predicate: str
    joined: int = 0
    set: str | None = None
    score: str | None = None
    scores: tuple[str, ...] = ()
    value: str | None = None
    wanted: int | None = None
    threshold: float | None = None
    tie_uid: str | None = None
    note: str | None = None

    @property
    def left(self) -> int:
        """Rows that did not stay."""
        return self.entered + self.joined - self.kept

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON values; floats read back as the same floats."""
        return {**asdict(self), "scores": list(self.scores), "left": self.left}


@dataclass(frozen=True)
class Selection:
    """The rows that a recipe chose, as queries over its source, which has to stay as it is.

    Attributes:
        recipe: The recipe's name.
        source_rows: Rows that the recipe began with.
        rows: Rows that are in after all steps.
        steps: One report a step.
        con: The connection that holds the source.
        source: The source as an SQL identifier, with the columns that the steps' predicates read.
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
            uid, f0, f1, shard, key, and for each `keep_top` step n the column `step{n}_value` (float64), NULL for a
            row that a `union` brought in after it.
        """
        values = []
        for report in self._ranked:
            entered = "true" if report.step > self._last_union else self.inside[report.step]
            values.append(f"CASE WHEN {entered} THEN {report.value} END AS step{report.step}_value")
        columns = ["format('{:016x}{:016x}', f0, f1) AS uid", "f0", "f1", "shard", "key", *values]
        return self.con.sql(f"SELECT {', '.join(columns)} FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1")

    def ranks(self) -> dict[str, np.ma.MaskedArray[Any, np.dtype[np.int64]]]:
        """Give what the manifest leaves out, because sorting arrays takes a fraction of a window function's time.

        Returns:
            For each `keep_top` step n `step{n}_rank`, in the manifest's order: from 1, among the rows that entered
            the step, by value downwards and uid upwards; masked for a row that a `union` brought in after it. The
            rows that a step keeps are the first of those that entered, so their ranks among the kept are their ranks
            among the entered.
        """
        if not self._ranked:
            return {}
        columns = [f"{self.inside[-1]} IS TRUE AS chosen"]
        for report in self._ranked:
            columns += [f"{report.value} AS v{report.step}", f"{self.inside[report.step]} IS TRUE AS in{report.step}"]
        anywhere = self.inside[self._ranked[0].step]
        if self._last_union:
            anywhere = " OR ".join([*(self.inside[report.step] for report in self._ranked), self.inside[-1]])
        found = self.con.execute(
            f"SELECT {', '.join(columns)} FROM {self.source} WHERE {anywhere} ORDER BY f0, f1"
        ).fetchnumpy()
        ranks, chosen = {}, found["chosen"]
        for report in self._ranked:
            inside = found.pop(f"in{report.step}")
            placed = np.zeros(len(chosen), np.int64)
            placed[inside] = places(np.ma.getdata(found.pop(f"v{report.step}"))[inside])
            ranks[f"step{report.step}_rank"] = np.ma.masked_array(placed[chosen], mask=~inside[chosen])
        return ranks

    def subset(self) -> NDArray[np.void]:
        """Give the chosen uids as DataComp's array, sorted by (f0, f1)."""
        query = f"SELECT f0, f1 FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1"
        words = self.con.execute(query).fetchnumpy()
        subset = np.empty(self.rows, dtype=SUBSET_DTYPE)
        subset["f0"], subset["f1"] = words["f0"], words["f1"]
        return subset

    @property
    def _last_union(self) -> int:
        """The last step that brings rows in; what is chosen has gone through all rankings after it."""
        return max((report.step for report in self.steps if report.kind == "union"), default=0)

    @property
    def _ranked(self) -> list[StepReport]:
        return [report for report in self.steps if report.value is not None]


def select(con: duckdb.DuckDBPyConnection, name: str, recipe: Recipe, source: str = "source") -> Selection:
    """Choose rows.

    Args:
        con: A DuckDB connection.
        name: The recipe's name, for messages.
        recipe: The recipe.
        source: Name of a relation in `con` with f0, f1 (unsigned 64-bit, unique as pairs), shard, key,
            every column of `recipe.columns()`, and for each of `recipe.sets` a boolean column `set_column(set)`: the
            rows of the pool, of which the recipe begins with all, or with those of the set that `from` names.

    Returns:
        The chosen rows and a report for each step.

    Raises:
        ValueError: A step keeps nothing, a score that is ranked is NaN, NULL or infinite, a predicate
            does not fit the columns' types, or the source is empty. The message names recipe and step.
    """
    relation = quoted(source)
    inside = ["true" if recipe.source == POOL else quoted(set_column(recipe.source))]
    total = one(con, f"SELECT count(*) FROM {relation} WHERE {inside[0]}")[0]
    if not total:
        raise ValueError(f"recipe {name}: its source has no rows, so there is nothing to choose from.")
    reports: list[StepReport] = []
    entered, basis, basis_name = total, total, "the pool"
    for number, step in enumerate(recipe.steps, start=1):
        text = step.said(basis_name)
        try:
            if step.keep_top is None:
                report = _filter(con, step, number, text, relation, inside[-1], entered)
            else:
                report, relation = _keep_top(con, step.keep_top, number, text, relation, inside[-1], entered, basis)
        except (duckdb.Error, StepError) as error:
            what = str(error).split("\n", 1)[0]  # DuckDB adds every signature that it knows
            raise ValueError(f"recipe {name}, step {number} ({text}): {what}") from error
        if not report.kept:
            raise ValueError(
                f"recipe {name}, step {number} ({text}): none of the {entered} rows that entered stays"
                f"{report.note or ''}, and an empty subset can't be trained on. Remedy: loosen this step."
            )
        reports.append(report)
        inside.append(combine(inside[-1], step.kind, report.predicate))
        entered = report.kept
        if step.kind == "within":
            basis, basis_name = entered, f"what is within {step.set_name}"
    return Selection(
        recipe=name,
        source_rows=total,
        rows=entered,
        steps=tuple(reports),
        con=con,
        source=relation,
        inside=tuple(inside),
    )


def set_column(name: str) -> str:
    """Name the column of the source that says whether a row is in a set: another recipe's rows, or a uid list's."""
    return f"in {name}"


def combine(inside: str, kind: str, predicate: str) -> str:
    """Write whether a row is in after a step of a kind, from whether it was before and what the step says of it."""
    return f"({inside} {'OR' if kind == 'union' else 'AND'} ({predicate}))"


def _filter(
    con: duckdb.DuckDBPyConnection, step: Step, number: int, text: str, relation: str, inside: str, entered: int
) -> StepReport:
    """Carry out a step that a row passes by itself."""
    if step.set_name is None:
        predicate = f"({step.where}\n)"
    else:
        column = quoted(set_column(step.set_name))
        predicate = f"NOT {column}" if step.kind == "except" else column
    kept = one(con, f"SELECT count(*) FROM {relation} WHERE {combine(inside, step.kind, predicate)}")[0]
    joined = kept - entered if step.kind == "union" else 0
    return StepReport(
        step=number,
        kind=step.kind,
        text=text,
        entered=entered,
        kept=kept,
        predicate=predicate,
        joined=joined,
        set=step.set_name,
        note="it adds no row" if step.kind == "union" and not joined else None,
    )


def _keep_top(
    con: duckdb.DuckDBPyConnection,
    top: KeepTop,
    number: int,
    text: str,
    relation: str,
    inside: str,
    entered: int,
    basis: int,
) -> tuple[StepReport, str]:
    """Rank and cut; give the relation with the column that the value may need."""
    wanted = top.wanted(basis)
    if wanted == 0:
        raise StepError(
            f"fraction {top.fraction!r} of the {basis} rows that it counts from is less than one row, "
            f"so nothing would be kept. Remedy: a fraction of at least 1/{basis}, or a larger pool."
        )
    ranked = ranked_value(con, top, f"step{number}_value", relation, inside)
    note, threshold, tie = ranked.note, top.threshold, None
    if wanted is not None:
        if wanted > entered:
            note = "; ".join(filter(None, [note, f"{entered} rows entered, fewer than the {wanted} wanted: all stay"]))
        threshold, tie = cut(con, ranked, inside, min(wanted, entered))
        tie = tie if top.rule == "exact" else None
    assert threshold is not None
    predicate = keep_predicate(ranked.value, threshold, tie)
    if wanted is None or top.rule == "datacomp":
        kept = one(con, f"SELECT count(*) FROM {ranked.relation} WHERE {inside} AND ({predicate})")[0]
        if not kept:
            note = f" (the largest value is {ranked.most!r})"
    else:
        kept = min(wanted, entered)
    report = StepReport(
        step=number,
        kind="keep_top",
        text=text,
        entered=entered,
        kept=kept,
        predicate=predicate,
        score=top.label,
        scores=top.scores,
        value=ranked.value,
        wanted=wanted,
        threshold=threshold,
        tie_uid=format_uids(*(np.array([word], dtype=np.uint64) for word in tie))[0] if tie else None,
        note=note,
    )
    return report, ranked.relation
