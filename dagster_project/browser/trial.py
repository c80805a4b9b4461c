"""A recipe's result in memory: the step that dropped each row, and what each step shows.

Here: from a selection that was executed to `Trial`. Not here: which recipes are run over which rows (`trials`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core import sql
from dagster_project.browser.parts import Part
from dagster_project.browser.queries import BrowseError
from selection.recipes.execute import Selection
from selection.recipes.ranking import score_value
from selection.recipes.recipe import Recipe
from selection.recipes.step_report import StepReport

LIMITS = ("fraction", "count", "threshold")
BINS = 60


@dataclass(frozen=True)
class Scale:
    """Numbers of rows of a part beside those of the pool, interpolated between known ones; by default equal numbers.

    Attributes:
        part: known numbers of rows of the part, rising, from 0.
        pool: the same rows of the pool.
    """

    part: tuple[int, ...] = ()
    pool: tuple[int, ...] = ()

    @classmethod
    def through(cls, *known: tuple[int, int]) -> Self:
        """Return the scale through known numbers of the part and the pool; one that contradicts an earlier is out."""
        points = [(0, 0)]
        for rows in known:
            if all((rows[0] - part) * (rows[1] - pool) > 0 for part, pool in points):
                points.append(rows)
        return cls(*zip(*sorted(points), strict=True))

    def to_pool(self, rows: int) -> int:
        """Return rows of the pool for rows of the part."""
        return _interpolated(rows, self.part, self.pool)

    def to_part(self, rows: int) -> int:
        """Return rows of the part for rows of the pool."""
        return _interpolated(rows, self.pool, self.part)


def _interpolated(rows: int, known: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    if len(known) < 2:
        return rows
    beyond = max(0, rows - known[-1]) * wanted[-1] / known[-1]
    return round(float(np.interp(rows, known, wanted)) + beyond)


@dataclass(frozen=True)
class Scaled:
    """A recipe as it is executed over a part of the pool.

    Attributes:
        recipe: with limits for the part.
        scales: of the rows before the first step, and of those that each step keeps.
        begun: the recorded reports of the first steps, which are not executed.
        sets: further sets of uids that these read.
        wanted: rows of the pool that stay after a step if it reaches its limit, by the step's number.
        source_rows: rows of the pool before the first step, where they are known.
    """

    recipe: Recipe
    scales: tuple[Scale, ...]
    begun: tuple[StepReport, ...] = ()
    sets: Mapping[str, pa.Table] = field(default_factory=dict)
    wanted: Mapping[int, int] = field(default_factory=dict)
    source_rows: int | None = None


@dataclass(frozen=True)
class Trial:
    """The result of a recipe, for the rows that were judged.

    Attributes:
        recipe: the recipe as tried, for the whole pool.
        rows: f0, f1, `dropped` (the step that dropped the row; 0 for kept, -1 for a row outside `from`) and `value<n>`
            of each step that ranks.
        steps: of each step its number, kind, text, score, threshold, rows of the pool that entered, were kept and left
            (estimated where `about` and `about_entered` are true), and of the judged rows those that were kept,
            `sampled`; `limits` that can be tried, `basis` (rows of the pool that a fraction refers to) and histogram.
        source_rows: judged rows before the first step.
        pool_rows: rows of the pool before the first step.
        is_estimated: whether a step was executed over a part of the pool.
        known: number of the first steps whose verdict is known of each row; None for all. Rows that the others dropped
            count as dropped by the first of them.
    """

    recipe: Recipe
    rows: pa.Table
    steps: list[dict[str, Any]]
    source_rows: int
    pool_rows: int
    is_estimated: bool
    known: int | None = None

    @property
    def kept(self) -> pa.Table:
        """f0 and f1 of the selected rows."""
        return self.dropped_at(0)

    @property
    def kept_rows(self) -> int:
        """Number of rows of the pool that are selected."""
        return int(self.steps[-1]["kept"]) if self.steps else self.pool_rows

    def dropped_at(self, step: int) -> pa.Table:
        """Return f0 and f1 of the rows that a step dropped; 0 for the rows that were kept."""
        return self.rows.filter(pc.equal(self.rows["dropped"], step)).select(["f0", "f1"])

    def dropped_rows(self, step: int) -> int:
        """Return the number of rows of the pool that `dropped_at` stands for.

        Raises:
            BrowseError: there is no such step, or its rows are not known apart from those of an earlier one.
        """
        left = int(self.step(step)["left"])
        if self.known is None or step <= self.known:
            return left
        if step == self.known + 1:
            return sum(found["left"] for found in self.steps[self.known :])
        raise BrowseError(
            f"the version does not record which rows step {step} dropped and which step {self.known + 1}, which ranks "
            f"by ranks or within strata. Remedy: choose step {self.known + 1}, which shows both"
        )

    def step(self, number: int) -> dict[str, Any]:
        """Return a step by its number, from 1.

        Raises:
            BrowseError: there is none.
        """
        if not 1 <= number <= len(self.steps):
            raise BrowseError(f"there is no step {number}; the recipe has {len(self.steps)}")
        return self.steps[number - 1]

    def near(self, step: int, share: float = 0.02) -> pa.Table:
        """Return f0 and f1 of the rows that reached a step and are nearest to its threshold, 2 % and at least 24.

        Raises:
            BrowseError: the step has no threshold.
        """
        found = self.step(step)
        if found["threshold"] is not None and f"value{step}" not in self.rows.column_names:
            raise BrowseError(
                f"the version records no value of single rows for step {step}, which ranks by ranks or within strata. "
                "Remedy: another step"
            )
        if found["threshold"] is None:
            raise BrowseError(f"step {step} has no threshold. Remedy: a step with keep_top or deduplicate")
        dropped, value = (self.rows[name].to_numpy() for name in ("dropped", f"value{step}"))
        reached = np.flatnonzero((dropped == 0) | (dropped >= step))
        distance = np.abs(value[reached] - found["threshold"])
        count = min(len(reached), max(24, int(share * len(reached))))
        nearest = np.argpartition(distance, count - 1)[:count] if count else np.empty(0, np.int64)
        return self.rows.select(["f0", "f1"]).take(pa.array(reached[nearest]))


def judge(recipe: Recipe, selection: Selection, part: Part, scaled: Scaled) -> Trial:
    """Return the result of a recipe.

    Args:
        recipe: as written, for the whole pool.
        selection: of the recipe as it was executed.
        part: the rows that were judged.
        scaled: the recipe as it was executed.
    """
    inside = selection.inside
    cases = " ".join(
        f"WHEN ({inside[n - 1]}) IS TRUE AND ({inside[n]}) IS NOT TRUE THEN {n}" for n in range(len(inside) - 1, 0, -1)
    )
    dropped = f"CASE WHEN ({inside[-1]}) IS TRUE THEN 0 {cases} ELSE -1 END"
    compared = {step.step: value for step in selection.steps if (value := _value(step)) is not None}
    values = "".join(f", {value} AS value{number}" for number, value in compared.items())
    rows = selection.con.sql(
        f"SELECT f0, f1, ({dropped})::TINYINT AS dropped{values} FROM {selection.source}"
    ).to_arrow_table()
    counted = _counted(selection, part, scaled)
    steps, basis = [], counted[0]["kept"]
    for step, definition, counts in zip(selection.steps, recipe.steps, counted[1:], strict=True):
        value = compared.get(step.step)
        histogram = None if value is None else _histogram(selection, value, inside[step.step - 1])
        limits = [] if definition.keep_top is None else [n for n in LIMITS if n != "threshold" or not _by_ranks(step)]
        if definition.deduplicate is not None and definition.deduplicate.above is not None:
            limits = ["threshold"]
        shown = {name: getattr(step, name) for name in ("step", "kind", "score", "threshold")}
        same = definition == scaled.recipe.steps[step.step - 1]
        text = step.text if same else definition.text
        steps.append({**shown, "text": text, **counts, "histogram": histogram, "limits": limits, "basis": basis})
        if step.kind == "within":
            basis = counts["kept"]
    return Trial(
        recipe,
        rows,
        steps,
        selection.source_rows,
        counted[0]["kept"],
        not part.is_whole and len(scaled.begun) < len(steps),
    )


def _counted(selection: Selection, part: Part, scaled: Scaled) -> list[dict[str, Any]]:
    """Return the rows of the pool that entered each step, were kept and left, and in the part `sampled`, were kept.

    The first entry is of the rows before the first step. `about` marks numbers that are estimated.
    """
    source = scaled.source_rows
    kept = scaled.scales[0].to_pool(selection.source_rows) if source is None else source
    found = [{"kept": kept, "about": not part.is_whole and source is None}]
    for step, definition in zip(selection.steps, scaled.recipe.steps, strict=True):
        entered, number, about = found[-1]["kept"], step.step, not part.is_whole
        limit = getattr(getattr(definition, definition.kind, None), "count", None)
        if part.is_whole:
            kept = step.kept
        elif number <= len(scaled.begun):
            kept, about = scaled.begun[number - 1].kept, False
        elif number in scaled.wanted and step.kept == limit:
            kept, about = min(entered, scaled.wanted[number]), False
        else:
            estimated = scaled.scales[number].to_pool(step.kept)
            kept = max(entered, estimated) if step.kind == "union" else min(entered, estimated)
        counts = {"entered": entered, "kept": kept, "left": max(0, entered - kept)}
        found.append({**counts, "about": about, "about_entered": found[-1]["about"], "sampled": step.kept})
    return found


def _by_ranks(step: StepReport) -> bool:
    """Check whether a step adds ranks, for which a recipe takes no threshold."""
    return str(step.score).startswith("rank_sum of ")


def _value(step: StepReport) -> str | None:
    """Return the SQL of the number that a step compares with a limit; None if it compares none."""
    if step.value is None and step.threshold is not None and step.by is not None:
        return score_value(step.by)
    return step.value


def _histogram(selection: Selection, value: str, entered: str) -> dict[str, Any]:
    """Return counts of a step's value among the rows that entered it: low, high and BINS counts."""
    low, high = sql.one(selection.con, f"SELECT min({value}), max({value}) FROM {selection.source} WHERE {entered}")
    width = (high - low) / BINS or 1.0
    found = selection.con.execute(
        f"SELECT least({BINS - 1}, floor(({value} - {sql.literal(low)}) / {sql.literal(width)}))::INTEGER AS bin, "
        f"count(*) FROM {selection.source} WHERE {entered} GROUP BY bin"
    ).fetchall()
    counts = [0] * BINS
    for place, count in found:
        counts[place] = count
    return {"low": low, "high": high, "counts": counts}
