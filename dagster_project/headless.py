"""The whole path without a browser: discover shards, then compute missing and stale files, in order.

Each asset gets a Dagster run of its own over only the shards that need it. So the UI shows the history, a bad shard
stops no other shard, and nothing is computed twice. The embeddings by several encoders share a run, because they share
the images. Only the lake's provenance decides about staleness.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from assets.base.context import Context, Progress, RunState, Snapshot
from assets.base.keys import SHARDS_NAME, asset_key
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph, Node
from assets.subsets.subset import SubsetAsset
from core.errors import UserError
from dagster_project.definitions import build_defs
from dagster_project.executor import execute
from dagster_project.staleness import RANGE_END, RANGE_START, clear, diff_partitions, neighbours
from resources.catalog.build import CatalogError, read_catalog
from resources.lake.files import LakeError
from resources.lake.versions import Versions

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
HEADLESS = {"clip_selection/by": "headless"}


def _error_names(base: type[Exception]) -> set[str]:
    return {base.__name__}.union(*map(_error_names, base.__subclasses__()))


_OWN_ERRORS = {*_error_names(UserError), ValueError.__name__}
"""Errors whose message has all that a person needs."""


@dataclass
class Outcome:
    """What a pass over the graph did.

    Attributes:
        added: new shards.
        removed: shards that are gone from the pool.
        computed: for each asset that ran, its shards (none for an unpartitioned one).
        failures: for each asset that failed, the message.
        not_attempted: for each asset that could not be computed because another one failed, the key of that one.
        damaged: files that were found damaged, with the reason. They were set aside, and computed again where no
            failure says otherwise.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    computed: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    not_attempted: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


ROUNDS = 3
"""How often a pass goes over the assets at most: damage that a step finds in its inputs needs another round."""

Notice = Callable[[str, int], None]
"""Called with an asset's key and its number of shards before it runs."""


def materialize(
    context: Context,
    graph: Graph,
    instance: dg.DagsterInstance,
    *,
    notice: Notice,
    progress: Progress | None = None,
    redraw: bool = False,
) -> Outcome:
    """Bring every asset up to date.

    Damaged files are set aside when they are found, and computed again.

    Args:
        context: the project.
        graph: its assets.
        instance: where runs are recorded.
        notice: called before each asset.
        progress: called when rows are done.
        redraw: draw the negatives again.
    """
    outcome = Outcome()
    for _ in range(ROUNDS):
        before = set(context.lake.damaged)
        found = _Pass(context, graph, instance, notice, progress, redraw).run()
        outcome.added += [shard for shard in found.added if shard not in outcome.added]
        outcome.removed += [shard for shard in found.removed if shard not in outcome.removed]
        for key, shards in found.computed.items():
            outcome.computed[key] = sorted({*outcome.computed.get(key, []), *shards})
        outcome.failures, outcome.not_attempted = found.failures, found.not_attempted
        outcome.damaged = dict(context.lake.damaged)
        if outcome.damaged.keys() <= before:
            break
        redraw = False
    return outcome


def write_export(
    context: Context,
    graph: Graph,
    instance: dg.DagsterInstance,
    recipe: str,
    *,
    notice: Notice,
    progress: Progress | None = None,
) -> Outcome:
    """Write the tars of a subset's newest version, `export/<recipe>`, as far as they are missing or out of date.

    Args:
        context: the project.
        graph: its assets.
        instance: where runs are recorded.
        recipe: name of the recipe.
        notice: called before each run.
        progress: called when rows are done.

    Raises:
        LakeError: the pool has no tars; or the subset has no version, or was not selected from the pool as it is now.
    """
    return _Pass(context, graph, instance, notice, progress, redraw=False).export(recipe)


class _Pass:
    """One pass over the graph."""

    def __init__(
        self,
        context: Context,
        graph: Graph,
        instance: dg.DagsterInstance,
        notice: Notice,
        progress: Progress | None,
        redraw: bool,
    ) -> None:
        self.graph = graph
        self.instance = instance
        self.notice = notice
        self.redraw = redraw
        self.outcome = Outcome()
        self.snapshot = Snapshot(context)
        state = RunState() if progress is None else RunState(progress)
        # The opened objects, so that a model is loaded once for all runs of this process.
        opened = {"lake": context.lake, "pool": context.pool, "models": context.models, "run": state}
        defs = build_defs(context, graph, resource_overrides=opened)
        self.job = defs.resolve_implicit_global_asset_job_def()

    def run(self) -> Outcome:
        for subset in self.graph.subsets:
            Versions(self.snapshot.context.lake, subset.recipe).set_damaged_aside()
        shards = self._discover()
        for node in self.graph.in_order:
            if (needed := self._needs_failed(node)) is not None:
                self.outcome.not_attempted[node.key] = needed
                continue
            try:
                if isinstance(node, SubsetAsset):
                    now = self._now()
                    if not (node.is_fresh(now) and node.is_sound(now)) or node.has_due_checks(now):
                        self._launch(node.key, None)
                elif isinstance(node, PartitionedAsset):
                    for some in neighbours(shards, set(self._due(node, shards))):
                        self._launch(node.key, some, others=self._together(node, some))
                else:
                    again = self.redraw and node.key.startswith("negatives/")
                    if again or not node.is_fresh(self._now()):
                        config = {"ops": {node.definition.op.name: {"config": {"redraw": again}}}}
                        self._launch(node.key, None, config)
            except UserError as error:
                self.outcome.failures[node.key] = str(error)
        if self.outcome.computed or not _catalog_is_newest(self.snapshot.context, self.graph):
            self._launch("catalog", None)
        return self.outcome

    def _needs_failed(self, node: Node | SubsetAsset) -> str | None:
        """Return the failed asset without which a node can't be computed at all; None if it can be tried."""
        lake = self.snapshot.context.lake
        for dep in node.deps:
            if dep in self.outcome.not_attempted:
                return self.outcome.not_attempted[dep]
            if dep in self.outcome.failures and not lake.shards(dep):
                return dep
        return None

    def export(self, recipe: str) -> Outcome:
        node = next((node for node in self.graph.exports if node.declared.names["recipe"] == recipe), None)
        if node is None:
            raise LakeError(f"export/{recipe}: only pools of tars can be exported. Remedy: read subset.npy instead")
        subset = next(subset for subset in self.graph.subsets if subset.recipe == recipe)
        if not subset.is_fresh(self._now()):
            raise LakeError(f"{subset.key} has no version, or is out of date. Remedy: clip-select run")
        partitions = self.instance.get_dynamic_partitions(SHARDS_NAME)
        for some in neighbours(partitions, set(self._due(node, partitions))):
            self._launch(node.key, some)
        return self.outcome

    def _now(self) -> Snapshot:
        """Return a snapshot that sees what this pass has written."""
        self.snapshot = self.snapshot.after_writes()
        return self.snapshot

    def _discover(self) -> list[str]:
        """Make Dagster's partitions agree with the pool's folder, and remove the files of removed shards."""
        change = diff_partitions(self.snapshot, self.graph, self.instance)
        clear(self.snapshot.context.lake, self.graph, change.gone)
        for shard in change.gone:
            self.instance.delete_dynamic_partition(SHARDS_NAME, shard)
        if change.added:
            self.instance.add_dynamic_partitions(SHARDS_NAME, change.added)
        self.outcome.added, self.outcome.removed = change.added, change.gone
        return list(self.instance.get_dynamic_partitions(SHARDS_NAME))

    def _due(self, node: PartitionedAsset, among: Sequence[str]) -> list[str]:
        tried = self.outcome.computed.get(node.key, [])
        snapshot = self._now()
        return [shard for shard in among if shard not in tried and node.is_due(snapshot, shard)]

    def _together(self, node: PartitionedAsset, among: Sequence[str]) -> dict[str, list[str]]:
        """Return the other assets of a node's run, with their shards: embeddings go with embeddings."""
        found = {}
        for other in self.graph.nodes:
            both = node.key.startswith("embeddings/") and other.key.startswith("embeddings/")
            if isinstance(other, PartitionedAsset) and other is not node and both:
                with contextlib.suppress(UserError):  # reported at its own turn
                    found[other.key] = self._due(other, among)
        return {key: some for key, some in found.items() if some}

    def _launch(
        self,
        key: str,
        shards: list[str] | None,
        config: Mapping[str, Any] | None = None,
        others: Mapping[str, list[str]] | None = None,
    ) -> None:
        others = others or {}
        self.notice(key, len(shards or ()))
        tags = dict(HEADLESS)
        if shards:
            tags |= {RANGE_START: shards[0], RANGE_END: shards[-1]}
        result = execute(
            self.job,
            self.instance,
            location=self.snapshot.context.settings.name,
            asset_selection=[asset_key(key), *map(asset_key, others)],
            run_config={**QUIET, **(config or {})},
            tags=tags,
        )
        outcome = self.outcome
        for name, some in {key: shards or [], **others}.items():
            outcome.computed[name] = outcome.computed.get(name, []) + some
        for name, failure in ({} if result.success else _failures(result, [key, *others])).items():
            outcome.failures[name] = "\n".join(filter(None, [outcome.failures.get(name), failure]))


def _catalog_is_newest(context: Context, graph: Graph) -> bool:
    """Check whether the catalog can be read, and was built after the YAML and every subset's newest version."""
    catalog = context.catalog_path()
    try:
        read_catalog(catalog).close()
    except (CatalogError, FileNotFoundError):
        return False
    versions = (Versions(context.lake, subset.recipe).current() for subset in graph.subsets)
    records = [Path(version.folder) / "lineage.json" for version in versions if version is not None]
    return all(path.stat().st_mtime <= catalog.stat().st_mtime for path in [context.config, *records])


def _failures(result: dg.JobExecutionResult, keys: list[str]) -> dict[str, str]:
    """Return why a run failed, for each of its assets that did."""
    by_step = {key.replace("/", "__"): key for key in keys}
    found: dict[str, str] = {}
    for event in result.all_events:
        if event.is_step_failure and event.step_key in by_step:
            found.setdefault(by_step[event.step_key], _failure(event.step_failure_data))
    return found or {keys[0]: "the run failed before its first step; see its page in the UI"}


def _failure(data: Any) -> str:
    """Return why a step failed: the description of its `dg.Failure`, else the error."""
    if data.user_failure_data is not None and data.user_failure_data.description:
        return data.user_failure_data.description
    # Dagster wraps what an asset raises once; what lies deeper is detail, and is on the run's page.
    error = data.error.cause or data.error if data.error else None
    if error is None:
        return "failed"
    message = error.message.strip()
    return message.split(": ", 1)[-1] if error.cls_name in _OWN_ERRORS else message
