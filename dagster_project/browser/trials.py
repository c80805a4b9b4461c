"""Recipes run in memory: a version's own recipe, and recipes with other thresholds.

Here: running a recipe over the lake without writing anything. Not here: the selection itself (`selection.recipes`), and
reproducing a version as files (`assets.reproduction`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from assets.base.context import Snapshot
from assets.base.results import NotReady
from assets.base.selection_table import CachedTable, open_selection
from assets.graph import build_graph
from assets.reproduction import open_recorded
from assets.subsets.subset import SubsetAsset, set_uids
from core import sql
from core.names import suggestion
from dagster_project.browser.queries import BrowseError, Table
from resources.lake.versions import Version, Versions
from selection.recipes.execute import Selection, StepReport
from selection.recipes.ranking import score_value
from selection.recipes.recipe import Recipe

LIMITS = ("fraction", "count", "threshold")
BINS = 60
NOW = "now"
"""In the place of a version: the recipe as the project's YAML has it, over today's scores."""
KNOWN = 8
"""Results that are kept in memory."""


@dataclass(frozen=True)
class Trial:
    """The result of a recipe.

    Attributes:
        recipe: the recipe as tried.
        rows: f0, f1, `dropped` (the step that dropped the row; 0 for kept, -1 for a row outside `from`) and `value<n>`
            of each step that ranks.
        steps: of each step its number, kind, text, score, threshold, rows that entered, were kept and left; `limits`
            that can be tried, `basis` (rows that a fraction refers to) and histogram.
    """

    recipe: Recipe
    rows: pa.Table
    steps: list[dict[str, Any]]

    @property
    def kept(self) -> pa.Table:
        """f0 and f1 of the selected rows."""
        return self.dropped_at(0)

    def dropped_at(self, step: int) -> pa.Table:
        """Return f0 and f1 of the rows that a step dropped; 0 for the rows that were kept."""
        return self.rows.filter(pc.equal(self.rows["dropped"], step)).select(["f0", "f1"])

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
        if found["threshold"] is None or f"value{step}" not in self.rows.column_names:
            raise BrowseError(f"step {step} has no threshold. Remedy: a step with keep_top or deduplicate")
        reached = pc.or_(pc.equal(self.rows["dropped"], 0), pc.greater_equal(self.rows["dropped"], step))
        rows = self.rows.filter(reached)
        distance = pc.abs(pc.subtract(rows[f"value{step}"], found["threshold"]))
        nearest = pc.select_k_unstable(
            pa.table({"d": distance}), min(len(rows), max(24, int(share * len(rows)))), [("d", "ascending")]
        )
        return rows.take(nearest).select(["f0", "f1"])


class Trials:
    """Recipes of a project, run over the lake's rows in memory.

    Args:
        table: the project's rows.
    """

    def __init__(self, table: Table) -> None:
        self.context = table.context
        self.subsets = {node.recipe: node for node in build_graph(table.context).subsets}
        self._cached = CachedTable()
        self._known: dict[str, Trial] = {}
        self._lock = Lock()

    def subset(self, recipe: str) -> SubsetAsset:
        """Return the asset of a recipe.

        Raises:
            BrowseError: there is no such recipe.
        """
        if recipe not in self.subsets:
            raise BrowseError(f"there is no recipe {recipe!r}; {suggestion(recipe, self.subsets)}")
        return self.subsets[recipe]

    def changed(self, name: str, limits: Mapping[int, tuple[str, float]]) -> Recipe:
        """Return a recipe with other limits.

        Args:
            name: of the recipe.
            limits: by the step's number: `fraction`, `count` or `threshold`, and its value. A `deduplicate` has a
                threshold only.

        Raises:
            BrowseError: a step has no limit, or the value is not allowed.
        """
        definition = self.subset(name).model.model_dump(by_alias=True, exclude_defaults=True)
        steps = [dict(step) for step in definition["steps"]]
        for number, (kind, value) in limits.items():
            step = steps[number - 1] if 1 <= number <= len(steps) else {}
            if step.get("keep_top") and kind in LIMITS:
                kept = {key: old for key, old in step["keep_top"].items() if key not in (*LIMITS, "rule")}
                step["keep_top"] = {**kept, kind: int(value) if kind == "count" and value.is_integer() else value}
            elif step.get("deduplicate", {}).get("above") is not None and kind == "threshold":
                step["deduplicate"] = {**step["deduplicate"], "above": value}
            else:
                raise BrowseError(f"step {number}: only the limit of keep_top or deduplicate can be tried")
        try:
            return Recipe.model_validate({**definition, "steps": steps})
        except ValueError as error:
            raise BrowseError("; ".join(str(error).split("\n")[2:3]).strip() or str(error)) from error

    def run(self, name: str, recipe: Recipe | None = None) -> Trial:
        """Run a recipe over today's scores, by default as the project's YAML has it.

        Raises:
            BrowseError: a step keeps no row, or an input is missing.
        """
        subset = self.subset(name)
        recipe = recipe or subset.model
        with self._lock:
            snapshot = Snapshot(self.context)
            try:
                inputs = subset.inputs(snapshot)
            except NotReady as error:
                raise BrowseError(str(error)) from error

            def compute() -> Trial:
                sets = {other: set_uids(self.context, read) for other, read in inputs.sets.items()}
                with open_selection(
                    self.context.lake, name, recipe, subset.scores, inputs.shards, sets, self._cached
                ) as (selection, _):
                    return _trial(recipe, selection)

            return self._once(f"{name} {recipe.definition()} {inputs.fingerprint(recipe)}", compute)

    def of(self, name: str, version: str | None = None) -> Trial:
        """Run a version's own recipe over the scores that it was selected from.

        Args:
            name: of the recipe.
            version: by default the newest; `now`, or a recipe without a version: today's recipe over today's scores.

        Raises:
            BrowseError: there is no such recipe or version.
            LakeError: its scores were computed again since, so its steps can't be repeated.
        """
        found = self.version(name, version)
        if found is None:
            return self.run(name)
        with self._lock:

            def compute() -> Trial:
                kinds = type(self.context.settings).kinds
                with open_recorded(self.context.lake, found.lineage, kinds=kinds, cached=self._cached) as selection:
                    return _trial(Recipe.model_validate(found.lineage["definition"]), selection)

            return self._once(f"{name} {found.name} {found.lineage['fingerprint']}", compute)

    def _once(self, key: str, compute: Callable[[], Trial]) -> Trial:
        if key not in self._known:
            try:
                trial = compute()
            except ValueError as error:
                raise BrowseError(str(error)) from error
            while len(self._known) >= KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[key] = trial
        return self._known[key]

    def version(self, name: str, version: str | None = None) -> Version | None:
        """Return a version, by default the newest; None for `now`, and if there is none.

        Raises:
            BrowseError: there is no such recipe or version.
        """
        self.subset(name)
        versions = Versions(self.context.lake, name)
        if version is None:
            return versions.current()
        if version == NOW:
            return None
        if version not in versions.names():
            raise BrowseError(f"{name} has no version {version!r}; {suggestion(version, versions.names())}")
        return versions.read(version)

    def versions(self, name: str) -> list[str]:
        """List the versions of a recipe's subset, oldest first."""
        self.subset(name)
        return Versions(self.context.lake, name).names()

    def kept(self, name: str, version: str | None = None) -> pa.Table:
        """Return f0 and f1 of the rows of a version, or of today's recipe; versions are as `of` takes them."""
        found = self.version(name, version)
        return self.run(name).kept if found is None else Versions(self.context.lake, name).read_uids(found)


def as_yaml(name: str, recipe: Recipe) -> str:
    """Return a recipe as it is written in a project's YAML."""
    return yaml.safe_dump({"recipes": {name: recipe.definition()}}, sort_keys=False, allow_unicode=True)


def _trial(recipe: Recipe, selection: Selection) -> Trial:
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
    steps, basis = [], selection.source_rows
    for step, definition in zip(selection.steps, recipe.steps, strict=True):
        value = compared.get(step.step)
        histogram = None if value is None else _histogram(selection, value, inside[step.step - 1])
        limits = [] if definition.keep_top is None else [n for n in LIMITS if n != "threshold" or not _by_ranks(step)]
        if definition.deduplicate is not None and definition.deduplicate.above is not None:
            limits = ["threshold"]
        shown = ("step", "kind", "text", "score", "threshold", "entered", "kept", "left")
        steps.append(
            {
                **{name: getattr(step, name) for name in shown},
                "histogram": histogram,
                "limits": limits,
                "basis": basis,
            }
        )
        if step.kind == "within":
            basis = step.kept
    return Trial(recipe, rows, steps)


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
