"""Recipes tried out: how many rows each step keeps under other thresholds, and which rows enter and leave.

Here: running a recipe over the lake without writing anything. Not here: the selection itself (`selection.recipes`).
"""

from collections.abc import Mapping
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
from assets.subsets.subset import SubsetAsset, set_uids
from core import sql
from core.names import suggestion
from dagster_project.browser.queries import BrowseError, Table
from resources.lake.versions import Versions
from selection.recipes.recipe import Recipe

LIMITS = ("fraction", "count", "threshold")
BINS = 60


@dataclass(frozen=True)
class Trial:
    """The result of a recipe.

    Attributes:
        recipe: the recipe as tried.
        rows: f0, f1, `dropped` (the step that dropped the row; 0 for kept, -1 for a row outside `from`) and `value<n>`
            of each step that ranks.
        steps: step, text, score, threshold, entered, kept, left and histogram of each step.
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

    def near(self, step: int, share: float = 0.02) -> pa.Table:
        """Return f0 and f1 of the rows that reached a step and are nearest to its threshold, 2 % and at least 24.

        Raises:
            BrowseError: the step has no threshold.
        """
        found = next((found for found in self.steps if found["step"] == step), None)
        if found is None or found["threshold"] is None or f"value{step}" not in self.rows.column_names:
            raise BrowseError(f"step {step} has no threshold. Remedy: a step with keep_top")
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
            limits: for steps with keep_top, by number: `fraction`, `count` or `threshold`, and its value.

        Raises:
            BrowseError: a step has no limit, or the value is not allowed.
        """
        definition = self.subset(name).model.model_dump(by_alias=True, exclude_defaults=True)
        steps = [dict(step) for step in definition["steps"]]
        for number, (kind, value) in limits.items():
            if kind not in LIMITS or not 1 <= number <= len(steps) or not steps[number - 1].get("keep_top"):
                raise BrowseError(f"step {number}: only the limit of a keep_top can be tried")
            top = {key: old for key, old in steps[number - 1]["keep_top"].items() if key not in (*LIMITS, "rule")}
            steps[number - 1] = {
                **steps[number - 1],
                "keep_top": {**top, kind: int(value) if kind == "count" else value},
            }
        try:
            return Recipe.model_validate({**definition, "steps": steps})
        except ValueError as error:
            raise BrowseError("; ".join(str(error).split("\n")[2:3]).strip() or str(error)) from error

    def run(self, name: str, recipe: Recipe | None = None) -> Trial:
        """Run a recipe, by default as the project's YAML has it.

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
            key = f"{name} {recipe.definition()} {inputs.fingerprint(recipe)}"
            if key not in self._known:
                sets = {other: set_uids(self.context, read) for other, read in inputs.sets.items()}
                try:
                    with open_selection(
                        self.context.lake, name, recipe, subset.scores, inputs.shards, sets, self._cached
                    ) as (selection, _):
                        trial = _trial(recipe, selection)
                except ValueError as error:
                    raise BrowseError(str(error)) from error
                while len(self._known) >= 8:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = trial
            return self._known[key]

    def version(self, name: str, version: str | None) -> pa.Table | None:
        """Return f0 and f1 of a version's rows; by default the newest, None if there is none."""
        self.subset(name)
        versions = Versions(self.context.lake, name)
        if version is not None and version not in versions.names():
            raise BrowseError(f"{name} has no version {version!r}; {suggestion(version, versions.names())}")
        found = versions.current() if version is None else versions.read(version)
        return None if found is None else versions.read_uids(found)


def as_yaml(name: str, recipe: Recipe) -> str:
    """Return a recipe as it is written in a project's YAML."""
    return yaml.safe_dump({"recipes": {name: recipe.definition()}}, sort_keys=False, allow_unicode=True)


def _trial(recipe: Recipe, selection: Any) -> Trial:
    inside = selection.inside
    cases = " ".join(
        f"WHEN ({inside[n - 1]}) IS TRUE AND ({inside[n]}) IS NOT TRUE THEN {n}" for n in range(len(inside) - 1, 0, -1)
    )
    dropped = f"CASE WHEN ({inside[-1]}) IS TRUE THEN 0 {cases} ELSE -1 END"
    ranked = [step for step in selection.steps if step.value is not None]
    values = "".join(f", {step.value} AS value{step.step}" for step in ranked)
    rows = selection.con.sql(
        f"SELECT f0, f1, ({dropped})::TINYINT AS dropped{values} FROM {selection.source}"
    ).to_arrow_table()
    steps = []
    for step in selection.steps:
        histogram = _histogram(selection, step, inside[step.step - 1]) if step.value is not None else None
        steps.append(
            {
                "step": step.step,
                "kind": step.kind,
                "text": step.text,
                "score": step.score,
                "threshold": step.threshold,
                "entered": step.entered,
                "kept": step.kept,
                "left": step.left,
                "histogram": histogram,
            }
        )
    return Trial(recipe, rows, steps)


def _histogram(selection: Any, step: Any, entered: str) -> dict[str, Any]:
    """Return counts of a step's value among the rows that entered it: low, high and BINS counts."""
    low, high = sql.one(
        selection.con, f"SELECT min({step.value}), max({step.value}) FROM {selection.source} WHERE {entered}"
    )
    width = (high - low) / BINS or 1.0
    found = selection.con.execute(
        f"SELECT least({BINS - 1}, floor(({step.value} - {sql.literal(low)}) / {sql.literal(width)}))::INTEGER AS bin, "
        f"count(*) FROM {selection.source} WHERE {entered} GROUP BY bin"
    ).fetchall()
    counts = [0] * BINS
    for place, count in found:
        counts[place] = count
    return {"low": low, "high": high, "counts": counts}
