"""Recipes run in memory: a version's own recipe, and recipes with other thresholds.

Here: running a recipe over the lake without writing anything, and which rows a version kept. Not here: the selection
itself (`selection.recipes`), how limits are scaled to a part of the pool (`scaling`), and reproducing a version as
files (`assets.reproduction`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import pyarrow as pa
import yaml
from pydantic import ValidationError

from assets.base.context import Snapshot
from assets.base.results import NotReady
from assets.base.score_kind import Scores
from assets.base.selection_table import CachedTable, open_selection
from assets.graph import build_graph
from assets.reproduction import open_recorded, recorded_settings
from assets.subsets.subset import CODE_VERSION, Inputs, SubsetAsset, set_uids
from core.errors import UserError
from core.names import suggestion
from dagster_project.browser import members
from dagster_project.browser.memory import Memory
from dagster_project.browser.parts import JUDGED, Part, first_part
from dagster_project.browser.queries import POOL, THREADS, BrowseError, Place, Table
from dagster_project.browser.recorded import Recorded, recorded
from dagster_project.browser.scaling import Reference, in_part
from dagster_project.browser.trial import LIMITS, Trial, judge
from resources.lake.versions import Version, Versions
from selection.recipes.recipe import Recipe

NOW = "now"
"""In the place of a version: the recipe as the project's YAML has it, over today's scores."""
MEMORY = "384MB"
"""DuckDB's, for the table that recipes select from."""
Named = tuple[str, str | None]
"""A recipe's name, and a version as `Trials.of` takes it."""


class Trials:
    """Recipes of a project, run in memory over the lake's rows, or over a part of them.

    Args:
        table: the project's rows.
        rows: rows to judge at most; of a larger pool, whole shards are judged.
    """

    def __init__(self, table: Table, rows: int = JUDGED) -> None:
        self.table, self.rows = table, rows
        self.context = table.context
        self.subsets = {node.recipe: node for node in build_graph(table.context).subsets}
        self._cached = CachedTable(memory=MEMORY, threads=THREADS)
        self._trials: Memory[Trial] = Memory(lambda trial: trial.rows.nbytes, most=192 << 20)
        self._uids: Memory[pa.Table] = Memory(lambda table: table.nbytes, most=128 << 20)
        self._recorded: Memory[Recorded] = Memory(
            lambda found: sum(uids.nbytes for uids in found.sets.values()), most=64 << 20
        )

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
        except ValidationError as error:
            raise BrowseError(_explained(error)) from error

    def part(self, *named: Named) -> Part:
        """Return the rows on which recipes or versions are judged: all, or whole shards up to the budget of rows."""
        shards: set[str] = set()
        for name, version in named:
            found = self.version(name, version)
            if found is None:
                shards |= self._usable(name)
            else:
                shards.update(found.lineage["shards"])
        return first_part(
            {shard: rows for shard, rows in self.table.sizes([POOL]).items() if shard in shards}, self.rows
        )

    def part_of_shard(self, part: Part, shard: str) -> Part:
        """Return one shard of the pool of which `part` is a part.

        Raises:
            BrowseError: there is no such shard.
        """
        sizes = self.table.sizes([POOL])
        if shard not in sizes:
            raise BrowseError(f"there is no shard {shard!r}; {suggestion(shard, sizes)}")
        return Part((shard,), sizes[shard], part.total, part.of)

    def run(self, name: str, recipe: Recipe | None = None, part: Part | None = None) -> Trial:
        """Run a recipe over today's scores, by default as the project's YAML has it.

        In a part of the pool, the steps before the first one that differs from the newest version's keep the rows that
        they kept there, if that was selected from the same inputs; and the limits of later ones are scaled.

        Args:
            name: of the recipe.
            recipe: the recipe to run.
            part: the rows to judge; by default as `part` returns them.

        Raises:
            BrowseError: a step keeps no row, or an input is missing.
        """
        subset = self.subset(name)
        recipe, part = recipe or subset.model, part or self.part((name, NOW))
        only = None if part.is_whole else part.shards
        try:
            inputs = subset.inputs(Snapshot(self.context), only)
        except NotReady as error:
            raise BrowseError(str(error)) from error
        reference = None if part.is_whole else self._reference(name, inputs, part)
        part = part if part.is_whole else self._readable(name, inputs, part)
        scaled = in_part(recipe, part, reference)
        if reference is not None and reference.trial is not None and len(scaled.begun) == len(recipe.steps):
            return replace(reference.trial, recipe=recipe)

        def compute() -> Trial:
            read = {other: how for other, how in inputs.sets.items() if other not in scaled.sets}
            sets = {**scaled.sets, **{other: self._set(how, part) for other, how in read.items()}}
            with open_selection(
                self.context.lake, name, scaled.recipe, subset.scores, inputs.shards, sets, self._cached, scaled.begun
            ) as (selection, _):
                return judge(recipe, selection, part, scaled)

        key = (
            f"{name} {recipe.definition()} {inputs.fingerprint(recipe)} {part} {reference and reference.version.folder}"
        )
        return self._once(key, compute, part)

    def of(self, name: str, version: str | None = None, part: Part | None = None) -> Trial:
        """Apply a version's own recipe to the scores that it was selected from.

        In a part of the pool, the recorded thresholds and files are applied.

        Args:
            name: of the recipe.
            version: by default the newest; `now`, or a recipe without a version: today's recipe over today's scores.
            part: the rows to judge; by default as `part` returns them.

        Raises:
            BrowseError: there is no such recipe or version.
            LakeError: its scores were computed again since, so its steps can't be repeated.
        """
        found = self.version(name, version)
        if found is None:
            return self.run(name, part=part)
        part = part or self.part((name, version))
        whole = part.is_whole
        key = f"{name} {found.name} {found.lineage['fingerprint']} {part}"
        return self._once(key, lambda: self._all_of(found, part) if whole else self._part_of(found, part), part)

    def _all_of(self, version: Version, part: Part) -> Trial:
        kinds = type(self.context.settings).kinds
        with open_recorded(self.context.lake, version.lineage, kinds=kinds, cached=self._cached) as selection:
            recipe = Recipe.model_validate(version.lineage["definition"])
            return judge(recipe, selection, part, in_part(recipe, part, None))

    def _part_of(self, version: Version, part: Part) -> Trial:
        lake, lineage = self.context.lake, version.lineage
        shards = {shard: lineage["shards"][shard] for shard in part.shards if shard in lineage["shards"]}
        if not shards:
            raise BrowseError(f"{version.recipe} {version.name} read none of the shards that are judged")
        settings = recorded_settings(lake, lineage, shards, type(self.context.settings).kinds)
        recipe = settings.recipes[version.recipe]
        found = self._steps(version, part)
        scores = Scores(settings).places(recipe.columns().scores)
        scaled = in_part(recipe, part, Reference(version, found))
        with open_selection(lake, version.recipe, recipe, scores, shards, found.sets, self._cached, found.reports) as (
            selection,
            _,
        ):
            known = None if found.known == len(recipe.steps) else found.known
            return replace(judge(recipe, selection, part, scaled), known=known)

    def _steps(self, version: Version, part: Part) -> Recorded:
        """Return the recorded steps of a version, with the uids of the part that they refer to."""
        versions = Versions(self.context.lake, version.recipe)

        def within(blocks: Iterable[pa.Table]) -> pa.Table:
            return members.among(self.table, self._rows(part), blocks)

        key = f"{version.folder} {version.lineage['fingerprint']} {part}"
        return self._recorded.once(key, lambda: recorded(versions, version, within))

    def _readable(self, name: str, inputs: Inputs, part: Part) -> Part:
        """Return the shards of a part that a recipe can read, as a part of all that it can read."""
        usable = self._usable(name)
        sizes = {shard: rows for shard, rows in self.table.sizes([POOL]).items() if shard in usable}
        shards = tuple(shard for shard in part.shards if shard in inputs.shards)
        return Part(shards, sum(sizes[shard] for shard in shards), sum(sizes.values()), len(sizes))

    def _usable(self, name: str) -> set[str]:
        """Return the shards that have all that a recipe reads."""
        return set(self.table.shards([POOL, *{asset for asset, _ in self.subset(name).scores.values()}]))

    def _reference(self, name: str, inputs: Inputs, part: Part) -> Reference | None:
        """Return the newest version with its verdicts on a part, if it was selected from the same inputs."""
        version = self.version(name)
        if version is None:
            return None
        lineage = version.lineage
        source = lineage["source"]
        sets = {**lineage.get("sets", {}), **({} if source["kind"] == "pool" else {source["name"]: source})}
        if (
            lineage.get("code_version") != CODE_VERSION
            or lineage["shards"].keys() != self._usable(name)
            or any(lineage["shards"][shard] != read for shard, read in inputs.shards.items())
            or {other: read["fingerprint"] for other, read in sets.items()}
            != {other: read["fingerprint"] for other, read in inputs.sets.items()}
            or any(lineage["inputs"].get(key, {}).get("fingerprint") != wanted for key, wanted in inputs.tables.items())
        ):
            return None
        try:
            return Reference(version, self._steps(version, part), self.of(name, version.name, part))
        except UserError:  # its rows are those of its manifest, and its thresholds are estimated
            return None

    def _set(self, read: Mapping[str, str], part: Part) -> pa.Table:
        """Return f0 and f1 of a set that a recipe reads, of a part of the pool those that are in it."""
        if part.is_whole:
            return set_uids(self.context, read)
        if read["kind"] == "recipe":
            return self.members(read["name"], read["version"], part)

        def compute() -> pa.Table:
            uids = set_uids(self.context, read)
            return members.among(self.table, self._rows(part), [uids])

        return self._uids.once(f"{dict(read)} {part}", compute)

    def _once(self, key: str, compute: Callable[[], Trial], part: Part) -> Trial:
        def told() -> Trial:
            try:
                return compute()
            except ValueError as error:
                note = "" if part.is_whole else f" {part.note('Judged on')}"
                raise BrowseError(f"{error}{note}") from error

        return self._trials.once(key, told)

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

    def kept(self, name: str, version: str | None = None, part: Part | None = None) -> pa.Table:
        """Return f0 and f1 of the rows of a version, or of today's recipe; versions are as `of` takes them.

        Args:
            name: of the recipe.
            version: the version.
            part: the rows to judge; by default as `part` returns them. Other rows are left out.
        """
        found, part = self.version(name, version), part or self.part((name, version))
        if found is None:
            return self.run(name, part=part).kept
        if part.is_whole:
            return Versions(self.context.lake, name).read_uids(found)
        try:
            return self.of(name, found.name, part).kept
        except UserError:  # a score was computed again since
            return self.members(name, found.name, part)

    def members(self, name: str, version: str, part: Part) -> pa.Table:
        """Return f0 and f1 of the rows of a part that a version kept, by its uids."""
        versions = Versions(self.context.lake, name)
        found = versions.read(version)

        def compute() -> pa.Table:
            return members.among(self.table, self._rows(part), members.listed(versions, found, "subset.npy"))

        return self._uids.once(f"{found.folder} {found.lineage['fingerprint']} {part}", compute)

    def places(self, part: Part, uids: pa.Table, count: int) -> list[Place]:
        """Return the places of some rows of a table of uids, in random order, the same in every call."""
        return members.some_places(self.table, part, self._rows(part), uids, count) if len(uids) else []

    def by_shard(self, part: Part, uids: pa.Table) -> list[int]:
        """Return how many rows of each shard of a part have one of these uids."""
        return members.count_by_shard(self.table, part, self._rows(part), uids)

    def _rows(self, part: Part) -> pa.Table:
        prints = [stored and stored.fingerprint for stored in (self.context.lake.stored(POOL, s) for s in part.shards)]
        return self._uids.once(f"rows {part} {prints}", lambda: members.rows_of(self.table, part))


def _explained(error: ValidationError) -> str:
    """Return which limit of which step a recipe does not take, and what it takes."""
    problem = error.errors(include_url=False)[0]
    place, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
    expected = message.replace("Input should be", "expected")
    if len(place) < 4 or place[0] != "steps":
        return expected
    return f"step {int(place[1]) + 1}, {place[-1]}: {expected} (given: {problem['input']})"


def as_yaml(name: str, recipe: Recipe) -> str:
    """Return a recipe as it is written in a project's YAML."""
    return yaml.safe_dump({"recipes": {name: recipe.definition()}}, sort_keys=False, allow_unicode=True)
