"""Running a recipe: the SQL that it means, and what each step did.

Here belongs the way from a relation of rows and scores to the rows that stay. Where the relation
comes from, and where the result goes, does not.

A step is a predicate over one row. `where` is one as it stands, a set is a column of the relation, and
`keep_top` becomes one when the value of the last row that stays is known: `score > t OR (score = t AND
uid <= u)`. So nothing is sorted to choose, no intermediate table is written, and the predicate that chose
a row later explains it. Steps whose verdict on a row needs the rows beside it (`selection.recipes.grouping`,
`selection.recipes.sampling`) put it into a column of the relation; what explains it later is a table of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.sql import literal, one, quoted
from core.uids import UID_DTYPE, format_uid
from selection.recipes.grouping import Grouped, best_of_equals, top_of_strata
from selection.recipes.ranking import StepError, cut, keep_predicate, places, ranked_value, score_value, with_column_at
from selection.recipes.recipe import Recipe
from selection.recipes.sampling import soft_cap_sample
from selection.recipes.steps import BASIS, POOL, KeepTop, Ranking, SoftCapSample, Step
from selection.recipes.summaries import summarise


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
        threshold: Smallest value that was kept; for `threshold`, the value that was asked for; for `above`, the
            largest that was kept.
        tie_uid: Where some rows at the threshold stayed and others not, the largest uid that stayed.
        by: What `deduplicate` or `stratify` goes by.
        groups: Number of strata, or of sets of equals with more than one row.
        samples: Number of draws of `soft_cap_sample`.
        note: What a reader should know besides.
        summary: What the step's `report` asked for, as rows of a table (`selection.recipes.summaries`).
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
    by: str | None = None
    groups: int | None = None
    samples: int | None = None
    note: str | None = None
    summary: tuple[dict[str, Any], ...] = ()

    @property
    def left(self) -> int:
        """Rows that did not stay."""
        return self.entered + self.joined - self.kept

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON values; floats read back as the same floats."""
        return {**asdict(self), "scores": list(self.scores), "summary": list(self.summary), "left": self.left}


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
        tables: By the number of a step whose verdict on a row needs the rows beside it, the query that explains it.
    """

    recipe: str
    source_rows: int
    rows: int
    steps: tuple[StepReport, ...]
    con: duckdb.DuckDBPyConnection
    source: str
    inside: tuple[str, ...]
    tables: Mapping[int, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Entries of DataComp's array: rows, and where samples were drawn, draws."""
        return (self.steps[-1].samples if self.steps else None) or self.rows

    @property
    def copies(self) -> str | None:
        """How often a row was drawn, as SQL over one row, where samples were drawn."""
        drawn = bool(self.steps) and self.steps[-1].samples is not None
        return quoted(_copies(self.steps[-1].step)) if drawn else None

    def manifest(self) -> duckdb.DuckDBPyRelation:
        """Give the chosen rows, sorted by (f0, f1).

        Returns:
            uid, f0, f1, shard, key, and for each step n that ranks the column `step{n}_value` (float64), NULL for a
            row that a `union` brought in after it; for a `stratify` also `step{n}_rank` (int64) among the rows of its
            stratum; and at last, where samples were drawn, `copies` (int64).
        """
        values = []
        for report in self._ranked:
            entered = "true" if report.step > self._last_union else self.inside[report.step]
            values.append(f"CASE WHEN {entered} THEN {report.value} END AS step{report.step}_value")
            if report.kind == "stratify":
                rank = quoted(f"step{report.step}_rank")
                values.append(f"CASE WHEN {entered} THEN {rank} END::BIGINT AS {rank}")
        if self.copies is not None:
            values.append(f"{self.copies} AS copies")
        columns = ["format('{:016x}{:016x}', f0, f1) AS uid", "f0", "f1", "shard", "key", *values]
        return self.con.sql(f"SELECT {', '.join(columns)} FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1")

    def ranks(self) -> dict[str, np.ma.MaskedArray[Any, np.dtype[np.int64]]]:
        """Give what the manifest leaves out, because sorting arrays takes a fraction of a window function's time.

        Returns:
            For each `keep_top` and `soft_cap_sample` step n `step{n}_rank`, in the manifest's order: from 1, among the
            rows that entered the step, by value downwards and uid upwards; masked for a row that a `union` brought in
            after it.
        """
        ranked = [report for report in self._ranked if report.kind != "stratify"]
        if not ranked:
            return {}
        columns = [f"{self.inside[-1]} IS TRUE AS chosen"]
        # What a `keep_top` kept are the first of what entered; of what a draw was made from any row may be left out.
        among = {r.step: self.inside[r.step - 1 if r.kind == "soft_cap_sample" else r.step] for r in ranked}
        for report in ranked:
            columns += [f"{report.value} AS v{report.step}", f"{among[report.step]} IS TRUE AS in{report.step}"]
        anywhere = among[ranked[0].step]
        if self._last_union:
            anywhere = " OR ".join([*among.values(), self.inside[-1]])
        found = self.con.execute(
            f"SELECT {', '.join(columns)} FROM {self.source} WHERE {anywhere} ORDER BY f0, f1"
        ).fetchnumpy()
        ranks, chosen = {}, found["chosen"]
        for report in ranked:
            inside = found.pop(f"in{report.step}")
            placed = np.zeros(len(chosen), np.int64)
            placed[inside] = places(np.ma.getdata(found.pop(f"v{report.step}"))[inside])
            ranks[f"step{report.step}_rank"] = np.ma.masked_array(placed[chosen], mask=~inside[chosen])
        return ranks

    def subset(self) -> NDArray[np.void]:
        """Give the chosen uids, each once, in DataComp's dtype, sorted by (f0, f1)."""
        query = f"SELECT f0, f1 FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1"
        words = self.con.execute(query).fetchnumpy()
        subset = np.empty(self.rows, dtype=UID_DTYPE)
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
    tables: dict[int, str] = {}
    entered, basis, basis_name, counted = total, total, BASIS, inside[0]
    for number, step in enumerate(recipe.steps, start=1):
        text = step.said(basis_name)
        start = StepReport(step=number, kind=step.kind, text=text, entered=entered, kept=entered, predicate="true")
        try:
            report, relation, table = _carry_out(con, step, start, relation, inside[-1], basis, counted)
            after = combine(inside[-1], step.kind, report.predicate)
            report = replace(report, summary=summarise(con, step.report, relation, inside[-1], after))
        except (duckdb.Error, StepError, ValueError) as error:
            what = str(error).split("\n", 1)[0]  # DuckDB adds every signature that it knows
            raise ValueError(f"recipe {name}, step {number} ({text}): {what}") from error
        if not report.kept:
            raise ValueError(
                f"recipe {name}, step {number} ({text}): none of the {entered} rows that entered stays"
                f"{f' ({report.note})' if report.note else ''}, and an empty subset can't be trained on. "
                "Remedy: loosen this step."
            )
        reports.append(report)
        inside.append(after)
        tables |= {} if table is None else {number: table}
        entered = report.kept
        if step.kind == "within":
            basis, basis_name, counted = entered, f"what is within {step.set_name}", after
    return Selection(
        recipe=name,
        source_rows=total,
        rows=entered,
        steps=tuple(reports),
        con=con,
        source=relation,
        inside=tuple(inside),
        tables=tables,
    )


def set_column(name: str) -> str:
    """Name the column of the source that says whether a row is in a set: another recipe's rows, or a uid list's."""
    return f"in {name}"


def combine(inside: str, kind: str, predicate: str) -> str:
    """Write whether a row is in after a step of a kind, from whether it was before and what the step says of it."""
    return f"({inside} {'OR' if kind == 'union' else 'AND'} ({predicate}))"


def _carry_out(
    con: duckdb.DuckDBPyConnection,
    step: Step,
    report: StepReport,
    relation: str,
    inside: str,
    basis: int,
    counted: str,
) -> tuple[StepReport, str, str | None]:
    """Carry out a step.

    Args:
        con: The connection that holds the rows.
        step: The step.
        report: Its beginning.
        relation: The rows, as an SQL identifier.
        inside: SQL over one row: whether it entered.
        basis: Number of rows that a fraction counts from.
        counted: SQL over one row: whether it is one of those.

    Returns:
        What the step did; the rows, with a column more where its verdict needs one; and the query that explains it,
        where nothing but that does.
    """
    column = f"step{report.step}"
    if step.keep_top is not None:
        return *_keep_top(con, step.keep_top, report, relation, inside, basis), None
    if step.soft_cap_sample is not None:
        return *_draw(con, step.soft_cap_sample, report, relation, inside, basis), None
    if step.stratify is not None:
        found = top_of_strata(con, step.stratify, column, relation, inside, counted)
    elif step.deduplicate is not None and step.deduplicate.equal is not None:
        found = best_of_equals(con, step.deduplicate, column, relation, inside, report.entered)
    else:
        return _filter(con, step, report, relation, inside), relation, None
    return _grouped(report, step, found), found.relation, found.table


def _filter(con: duckdb.DuckDBPyConnection, step: Step, report: StepReport, relation: str, inside: str) -> StepReport:
    """Carry out a step that a row passes by itself."""
    if step.set_name is not None:
        column = quoted(set_column(step.set_name))
        predicate = f"NOT {column}" if step.kind == "except" else column
        report = replace(report, set=step.set_name)
    elif step.where is not None:
        predicate = f"({step.where}\n)"
    else:
        predicate, report = _no_more_alike(con, step, report, relation, inside)
    kept = one(con, f"SELECT count(*) FROM {relation} WHERE {combine(inside, step.kind, predicate)}")[0]
    report = replace(report, kept=kept, predicate=predicate)
    if step.kind == "union":
        joined = kept - report.entered
        report = replace(report, joined=joined, note=None if joined else "it adds no row")
    return report


def _no_more_alike(
    con: duckdb.DuckDBPyConnection, step: Step, report: StepReport, relation: str, inside: str
) -> tuple[str, StepReport]:
    """Write "no better row is so much like it" over one row; of a uid there is but one row."""
    assert step.deduplicate is not None
    by, above = step.deduplicate.by, step.deduplicate.above
    report = replace(report, by=by)
    if above is None:
        return "true", replace(report, note="a uid is in the pool once: of its copies the first stayed")
    ranked_value(con, Ranking(score=by), "", relation, inside)  # which refuses a row without a value
    return f"{score_value(by)} <= {literal(above)}", replace(report, scores=(by,), threshold=above)


def _grouped(report: StepReport, step: Step, found: Grouped) -> StepReport:
    """Tell what a step did that looked at a row among those it shares a value with."""
    ranking, like = step.stratify, step.deduplicate
    report = replace(
        report, kept=found.kept, predicate=found.predicate, groups=found.groups, wanted=found.wanted, note=found.note
    )
    if ranking is not None:
        return replace(report, by=ranking.by, score=ranking.label, scores=ranking.scores, value=found.value)
    assert like is not None
    return replace(report, by=like.by, scores=() if like.best is None else (like.best,))


def _draw(
    con: duckdb.DuckDBPyConnection, draw: SoftCapSample, report: StepReport, relation: str, inside: str, basis: int
) -> tuple[StepReport, str]:
    """Draw samples; give the relation with the column that tells how often each row was drawn."""
    wanted = draw.wanted(basis)
    if not wanted:
        raise _less_than_one(draw.fraction, basis)
    ranked = ranked_value(con, draw, f"step{report.step}_value", relation, inside)
    rows = f"SELECT row_number() OVER () - 1 AS place, f0, f1, {ranked.value} AS value, {inside} AS entered"
    found = con.execute(f"SELECT * EXCLUDE entered FROM ({rows} FROM {ranked.relation}) WHERE entered").fetchnumpy()
    copies = soft_cap_sample(
        found["value"],
        found["f0"],
        found["f1"],
        samples=wanted,
        batch=draw.batch,
        penalty=draw.penalty,
        temperature=draw.temperature,
        seed=draw.seed,
    )
    report = replace(
        report,
        kept=int(np.count_nonzero(copies)),
        predicate=f"{quoted(_copies(report.step))} > 0",
        score=draw.label,
        scores=draw.scores,
        value=ranked.value,
        wanted=wanted,
        samples=wanted,
        note=ranked.note,
    )
    return report, with_column_at(con, ranked.relation, _copies(report.step), found["place"], copies, 0)


def _copies(step: int) -> str:
    return f"step{step}_copies"


def _less_than_one(fraction: float | None, basis: int) -> StepError:
    return StepError(
        f"fraction {fraction!r} of the {basis} rows that it counts from is less than one row, "
        f"so nothing would be kept. Remedy: a fraction of at least 1/{basis}, or a larger pool."
    )


def _keep_top(
    con: duckdb.DuckDBPyConnection, top: KeepTop, report: StepReport, relation: str, inside: str, basis: int
) -> tuple[StepReport, str]:
    """Rank and cut; give the relation with the column that the value may need."""
    wanted, entered = top.wanted(basis), report.entered
    if wanted == 0:
        raise _less_than_one(top.fraction, basis)
    ranked = ranked_value(con, top, f"step{report.step}_value", relation, inside)
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
            note = f"the largest value is {ranked.most!r}"
    else:
        kept = min(wanted, entered)
    report = replace(
        report,
        kept=kept,
        predicate=predicate,
        score=top.label,
        scores=top.scores,
        value=ranked.value,
        wanted=wanted,
        threshold=threshold,
        tie_uid=format_uid(*tie) if tie else None,
        note=note,
    )
    return report, ranked.relation
