"""Execute a recipe as SQL and report every step.

Here: from a relation of rows and scores to the selected rows. Not here: where the relation comes from, and where the
result is written.

Every step becomes a predicate over one row. `where` is one already, a set is a boolean column, and `keep_top` becomes
`score > t OR (score = t AND uid <= u)` once the last kept row is known. So selecting needs no sort and no intermediate
table, and the predicate that selected a row also explains it. Steps that compare a row with others
(`selection.recipes.grouping`, `selection.recipes.sampling`) add a column with their verdict, and a table explains it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.sql import literal, one, quoted
from core.uids import UID_DTYPE, format_uid
from selection.recipes.balancing import balance
from selection.recipes.grouping import Grouped, best_of_equals, top_of_strata
from selection.recipes.matching import match
from selection.recipes.model import BASIS, POOL
from selection.recipes.ranking import StepError, cut, keep_predicate, places, ranked_value, score_value, with_column_at
from selection.recipes.recipe import Recipe
from selection.recipes.sampling import soft_cap_sample
from selection.recipes.set_steps import Balance, MatchDistribution
from selection.recipes.step_report import StepReport
from selection.recipes.steps import KeepTop, Ranking, SoftCapSample, Step
from selection.recipes.summaries import summarise

_RANKED_APART = ("stratify", "match_distribution")  # kinds whose ranks are not those of their values
_NO_PREFIX = ("soft_cap_sample", "balance")


@dataclass(frozen=True)
class Selection:
    """The selected rows of a recipe, as queries over its source, which must not change meanwhile.

    Attributes:
        recipe: The recipe's name.
        source_rows: Number of rows before the first step.
        rows: Number of selected rows.
        steps: A report for each step.
        con: The connection that holds the source.
        source: The source as an SQL identifier, with the columns that the steps' predicates read.
        inside: SQL over one row: whether it is selected before step 1, and after step 1, 2, ...
        tables: For steps that compare rows, by step number, the query of the table that explains them.
        concepts: For steps over concepts, by step number, the query of the table of their concepts.
    """

    recipe: str
    source_rows: int
    rows: int
    steps: tuple[StepReport, ...]
    con: duckdb.DuckDBPyConnection
    source: str
    inside: tuple[str, ...]
    tables: Mapping[int, str] = field(default_factory=dict)
    concepts: Mapping[int, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of entries in DataComp's array: the draws of `soft_cap_sample` if there is one, else the rows."""
        return (self.steps[-1].samples if self.steps else None) or self.rows

    @property
    def copies(self) -> str | None:
        """SQL over one row: how often it was drawn. None without `soft_cap_sample`."""
        drawn = bool(self.steps) and self.steps[-1].samples is not None
        return quoted(_copies(self.steps[-1].step)) if drawn else None

    def manifest(self) -> duckdb.DuckDBPyRelation:
        """Return the selected rows, sorted by (f0, f1).

        Returns:
            uid, f0, f1, shard, key; for each ranking step n `step{n}_value` (float64), NULL for a row that a later
            `union` added; for `stratify` also `step{n}_rank` (int64) within the stratum, for
            `match_distribution` the position in which the row was selected; for `soft_cap_sample` also
            `copies` (int64).
        """
        values = []
        for report in self._ranked:
            entered = "true" if report.step > self._last_union else self.inside[report.step]
            values.append(f"CASE WHEN {entered} THEN {report.value} END AS step{report.step}_value")
            if report.kind in _RANKED_APART:
                rank = quoted(f"step{report.step}_rank")
                values.append(f"CASE WHEN {entered} THEN {rank} END::BIGINT AS {rank}")
        if self.copies is not None:
            values.append(f"{self.copies} AS copies")
        columns = ["format('{:016x}{:016x}', f0, f1) AS uid", "f0", "f1", "shard", "key", *values]
        return self.con.sql(f"SELECT {', '.join(columns)} FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1")

    def ranks(self) -> dict[str, np.ma.MaskedArray[Any, np.dtype[np.int64]]]:
        """Compute the rank columns that `manifest` leaves out: sorting arrays is much faster than a window function.

        Returns:
            For each `keep_top`, `soft_cap_sample` and `balance` step n `step{n}_rank`, int64 in the order of the
            manifest: the rank, from 1, among the rows that entered the step, by falling value, then rising uid. Masked
            for a row that a later `union` added.
        """
        ranked = [report for report in self._ranked if report.kind not in _RANKED_APART]
        if not ranked:
            return {}
        columns = [f"{self.inside[-1]} IS TRUE AS chosen"]
        # `keep_top` keeps a prefix of its ranking, so ranks among kept rows are ranks among entered rows. Others keep
        # no prefix, so all rows that entered are ranked.
        among = {r.step: self.inside[r.step - 1 if r.kind in _NO_PREFIX else r.step] for r in ranked}
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
        """Return the selected uids, each once, as `UID_DTYPE` [rows], sorted by (f0, f1)."""
        query = f"SELECT f0, f1 FROM {self.source} WHERE {self.inside[-1]} ORDER BY f0, f1"
        words = self.con.execute(query).fetchnumpy()
        subset = np.empty(self.rows, dtype=UID_DTYPE)
        subset["f0"], subset["f1"] = words["f0"], words["f1"]
        return subset

    @property
    def _last_union(self) -> int:
        """Number of the last `union`, 0 if none: every selected row passed all rankings after it."""
        return max((report.step for report in self.steps if report.kind == "union"), default=0)

    @property
    def _ranked(self) -> list[StepReport]:
        return [report for report in self.steps if report.value is not None]


def select(
    con: duckdb.DuckDBPyConnection,
    name: str,
    recipe: Recipe,
    source: str = "source",
    begun: Sequence[StepReport] = (),
) -> Selection:
    """Execute a recipe.

    Args:
        con: A DuckDB connection.
        name: The recipe's name, for messages.
        recipe: The recipe.
        source: Name of a relation in `con` with f0, f1 (unsigned 64-bit, unique as pairs), shard, key,
            every column of `recipe.columns()`, and for each of `recipe.sets` a boolean column `set_column(set)`. It
            holds all rows of the pool; the recipe starts from those that are in its `from`.
        begun: Reports of the recipe's first steps, whose predicates are applied instead of executing the steps. Of the
            reports that are returned, `entered`, `kept` and `joined` count the source's rows; they may keep none.

    Returns:
        The selected rows and a report for each step.

    Raises:
        ValueError: A step keeps no row, a ranked score is NaN, NULL or infinite, a predicate does not fit the columns'
            types, or the source is empty. The message names recipe and step.
    """
    relation = quoted(source)
    inside = ["true" if recipe.source == POOL else quoted(set_column(recipe.source))]
    total = one(con, f"SELECT count(*) FROM {relation} WHERE {inside[0]}")[0]
    if not total:
        raise ValueError(f"recipe {name}: its source has no rows, so nothing can be selected.")
    reports: list[StepReport] = []
    tables: dict[int, str] = {}
    concepts: dict[int, str] = {}
    entered, basis, basis_name, counted = total, total, BASIS, inside[0]
    for number, step in enumerate(recipe.steps, start=1):
        text = step.describe(basis_name)
        start = StepReport(step=number, kind=step.kind, text=text, entered=entered, kept=entered, predicate="true")
        try:
            if number <= len(begun):
                report, table = _count(con, replace(begun[number - 1], entered=entered), relation, inside[-1]), None
            elif entered:
                report, relation, table = _execute_step(
                    con, step, start, relation, inside[-1], basis, counted, concepts
                )
            else:
                raise StepError("no row reaches this step. Remedy: loosen an earlier one")
            after = combine(inside[-1], step.kind, report.predicate)
            report = replace(report, summary=summarise(con, step.report, relation, inside[-1], after))
        except (duckdb.Error, StepError, ValueError) as error:
            what = str(error).split("\n", 1)[0]  # DuckDB appends every known signature
            raise ValueError(f"recipe {name}, step {number} ({text}): {what}") from error
        if not report.kept and number > len(begun):
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
        concepts=concepts,
    )


def set_column(name: str) -> str:
    """Return the name of the source's boolean column for membership in a recipe's rows or a uid list."""
    return f"in {name}"


def combine(inside: str, kind: str, predicate: str) -> str:
    """Return SQL for "the row is selected after the step", from `inside` before it and the step's predicate."""
    return f"({inside} {'OR' if kind == 'union' else 'AND'} ({predicate}))"


def _execute_step(
    con: duckdb.DuckDBPyConnection,
    step: Step,
    report: StepReport,
    relation: str,
    inside: str,
    basis: int,
    counted: str,
    concepts: dict[int, str],
) -> tuple[StepReport, str, str | None]:
    """Execute a step.

    Args:
        con: The connection that holds the rows.
        step: The step.
        report: Its report, to be completed.
        relation: The rows, as an SQL identifier.
        inside: SQL over one row: whether it entered the step.
        basis: Number of rows that a fraction refers to.
        counted: SQL over one row: whether it is one of those.
        concepts: Gets the query of the step's concepts, if it has any.

    Returns:
        The report; the relation, with another column if the step needs one; and the query of the table that explains
        the step, if its predicate alone does not.
    """
    column = f"step{report.step}"
    if step.keep_top is not None:
        return *_keep_top(con, step.keep_top, report, relation, inside, basis), None
    if step.soft_cap_sample is not None:
        return *_draw(con, step.soft_cap_sample, report, relation, inside, basis), None
    set_step = step.match_distribution or step.balance
    if set_step is not None:
        return _select_set(con, set_step, report, relation, inside, basis, concepts)
    if step.stratify is not None:
        found = top_of_strata(con, step.stratify, column, relation, inside, counted)
    elif step.deduplicate is not None and step.deduplicate.equal is not None:
        found = best_of_equals(con, step.deduplicate, column, relation, inside, report.entered)
    else:
        return _filter(con, step, report, relation, inside), relation, None
    return _grouped(report, step, found), found.relation, found.table


def _filter(con: duckdb.DuckDBPyConnection, step: Step, report: StepReport, relation: str, inside: str) -> StepReport:
    """Execute a step that judges every row by itself."""
    if step.set_name is not None:
        column = quoted(set_column(step.set_name))
        predicate = f"NOT {column}" if step.kind == "except" else column
        report = replace(report, set=step.set_name)
    elif step.where is not None:
        predicate = f"({step.where}\n)"
    else:
        predicate, report = _below_similarity(con, step, report, relation, inside)
    report = _count(con, replace(report, predicate=predicate), relation, inside)
    return replace(report, note="it adds no row") if step.kind == "union" and not report.joined else report


def _count(con: duckdb.DuckDBPyConnection, report: StepReport, relation: str, inside: str) -> StepReport:
    """Complete the report of a step that has its predicate with the number of rows."""
    kept = one(con, f"SELECT count(*) FROM {relation} WHERE {combine(inside, report.kind, report.predicate)}")[0]
    return replace(report, kept=kept, joined=kept - report.entered if report.kind == "union" else 0)


def _below_similarity(
    con: duckdb.DuckDBPyConnection, step: Step, report: StepReport, relation: str, inside: str
) -> tuple[str, StepReport]:
    """Return the predicate of a `deduplicate` by similarity or by uid; uids in the pool are unique already."""
    assert step.deduplicate is not None
    by, above = step.deduplicate.by, step.deduplicate.above
    report = replace(report, by=by)
    if above is None:
        return "true", replace(report, note="a uid is in the pool once: of its copies the first stayed")
    ranked_value(con, Ranking(score=by), "", relation, inside)  # raises for a row without a value
    return f"{score_value(by)} <= {literal(above)}", replace(report, scores=(by,), threshold=above)


def _grouped(report: StepReport, step: Step, found: Grouped) -> StepReport:
    """Complete the report of a step that compared the rows of a group."""
    ranking, like = step.stratify, step.deduplicate
    report = replace(
        report, kept=found.kept, predicate=found.predicate, groups=found.groups, wanted=found.wanted, note=found.note
    )
    if ranking is not None:
        return replace(report, by=ranking.by, score=ranking.label, scores=ranking.scores, value=found.value)
    assert like is not None
    return replace(report, by=like.by, scores=() if like.best is None else (like.best,))


def _select_set(
    con: duckdb.DuckDBPyConnection,
    step: MatchDistribution | Balance,
    report: StepReport,
    relation: str,
    inside: str,
    basis: int,
    concepts: dict[int, str],
) -> tuple[StepReport, str, str]:
    """Execute `match_distribution` or `balance`."""
    wanted = step.wanted(basis)
    if wanted == 0:
        raise _less_than_one(step.fraction, basis)
    column = f"step{report.step}"
    if isinstance(step, Balance):
        found = balance(con, step, column, relation, inside, wanted)
    else:
        assert wanted is not None  # only `balance` has a form without a number of rows
        found = match(con, step, column, relation, inside, wanted)
    concepts[report.step] = found.concepts
    report = replace(
        report,
        kept=found.kept,
        predicate=found.predicate,
        score=step.label,
        scores=step.scores,
        value=found.value,
        wanted=wanted,
        note=found.note,
    )
    return report, found.relation, found.rows


def _draw(
    con: duckdb.DuckDBPyConnection, draw: SoftCapSample, report: StepReport, relation: str, inside: str, basis: int
) -> tuple[StepReport, str]:
    """Execute `soft_cap_sample`; the returned relation has the number of draws of each row as a column."""
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
        f"fraction {fraction!r} of the {basis} rows that it refers to is less than one row, "
        f"so nothing would be kept. Remedy: set a fraction of at least 1/{basis}, or use a larger pool."
    )


def _keep_top(
    con: duckdb.DuckDBPyConnection, top: KeepTop, report: StepReport, relation: str, inside: str, basis: int
) -> tuple[StepReport, str]:
    """Execute `keep_top`; the returned relation holds the combined ranks, if the step ranks by those."""
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
