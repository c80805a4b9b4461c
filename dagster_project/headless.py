"""The whole path without a browser: discover shards, make what is missing or out of date, in order.

Each asset gets a Dagster run of its own over just the shards that need it, so the UI shows the history, one bad
shard stops nobody, and nothing is computed twice; the embeddings by several encoders share a run, because they share
the images. What is out of date is asked of the lake's provenance alone.
"""

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from assets.base.checks import asset_key
from assets.base.partitioned import SHARDS_NAME, ShardAsset
from assets.graph import Graph
from assets.project import Project
from assets.subsets.subset import SubsetAsset
from dagster_project.dead_runs import at_work
from dagster_project.definitions import build_defs
from dagster_project.sqlite_event_log import kept_open
from dagster_project.staleness import BAD_INPUT, RANGE_END, RANGE_START, clear, look, neighbours
from resources.lake.versions import Versions

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
HEADLESS = {"clip_selection/by": "headless"}


OUR_ERRORS = {error.__name__ for error in (*BAD_INPUT, ValueError)}
"""Errors whose message says all that a person needs."""


@dataclass
class Outcome:
    """What a pass over the graph did.

    Attributes:
        added: shards that were new.
        removed: shards that had gone from the pool.
        computed: for each asset that ran, its shards (none for an unpartitioned one).
        failures: for each asset that failed, the message.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    computed: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


Notice = Callable[[str, int], None]


def materialize(
    project: Project,
    graph: Graph,
    instance: dg.DagsterInstance,
    *,
    notice: Notice,
    redraw: bool = False,
) -> Outcome:
    """Bring every asset up to date.

    Args:
        project: the opened project.
        graph: its assets.
        instance: where runs are recorded.
        notice: called with an asset's key and its number of shards before it runs.
        redraw: draw the negatives again.
    """
    job = build_defs(project, graph).resolve_implicit_global_asset_job_def()
    outcome = Outcome()
    shards = _discover(project, graph, instance, outcome)

    def run(
        key: str,
        wanted: list[str] | None,
        config: Mapping[str, Any] | None = None,
        others: Mapping[str, list[str]] | None = None,
    ) -> None:
        others = others or {}
        notice(key, len(wanted or ()))
        tags = dict(HEADLESS)
        if wanted:
            tags |= {RANGE_START: wanted[0], RANGE_END: wanted[-1]}
        run_id = str(uuid.uuid4())
        with at_work(instance, run_id), kept_open(instance):
            result = job.execute_in_process(
                instance=instance,
                asset_selection=[asset_key(key), *map(asset_key, others)],
                run_config={**QUIET, **(config or {})},
                tags=tags,
                raise_on_error=False,
                run_id=run_id,
            )
        for name, some in {key: wanted or [], **others}.items():
            outcome.computed[name] = outcome.computed.get(name, []) + some
        for name, failure in ({} if result.success else _failures(result, [key, *others])).items():
            outcome.failures[name] = "\n".join(filter(None, [outcome.failures.get(name), failure]))

    def due(node: ShardAsset, among: Sequence[str]) -> list[str]:
        tried = outcome.computed.get(node.key, [])
        with project.at_rest():
            return [shard for shard in among if shard not in tried and node.is_due(project, shard)]

    def together(node: ShardAsset, among: Sequence[str]) -> dict[str, list[str]]:
        """Give the other assets that go into a node's run, with their shards: embeddings go with embeddings."""
        found = {}
        for other in graph.nodes:
            both = node.key.startswith("embeddings/") and other.key.startswith("embeddings/")
            if isinstance(other, ShardAsset) and other is not node and both:
                with contextlib.suppress(*BAD_INPUT):  # said when its own turn comes
                    found[other.key] = due(other, among)
        return {key: some for key, some in found.items() if some}

    for node in graph.in_order:
        try:
            if isinstance(node, SubsetAsset):
                if not node.is_fresh(project):
                    run(node.key, None)
            elif isinstance(node, ShardAsset):
                for some in neighbours(shards, set(due(node, shards))):
                    run(node.key, some, others=together(node, some))
            else:
                again = redraw and node.key.startswith("negatives/")
                if again or not node.is_fresh(project):
                    run(node.key, None, {"ops": {node.definition.op.name: {"config": {"redraw": again}}}})
        except BAD_INPUT as error:
            outcome.failures[node.key] = str(error)
    if outcome.computed or not _catalog_is_newest(project, graph):
        run("catalog", None)
    return outcome


def _catalog_is_newest(project: Project, graph: Graph) -> bool:
    """Tell whether the catalog was built after the YAML and every subset's newest version were written."""
    catalog = project.catalog_path()
    versions = (Versions(project.lake, subset.recipe).current() for subset in graph.subsets)
    records = [Path(version.folder) / "lineage.json" for version in versions if version is not None]
    return catalog.exists() and all(
        path.stat().st_mtime <= catalog.stat().st_mtime for path in [project.config, *records]
    )


def _discover(project: Project, graph: Graph, instance: dg.DagsterInstance, outcome: Outcome) -> list[str]:
    """Make Dagster's partitions agree with the pool's folder; what a removed shard left is cleared away."""
    change = look(project, graph, instance)
    clear(project, graph, change.gone)
    for shard in change.gone:
        instance.delete_dynamic_partition(SHARDS_NAME, shard)
    if change.added:
        instance.add_dynamic_partitions(SHARDS_NAME, change.added)
    outcome.added, outcome.removed = change.added, change.gone
    return list(instance.get_dynamic_partitions(SHARDS_NAME))


def _failures(result: dg.ExecuteInProcessResult, keys: list[str]) -> dict[str, str]:
    """Say why a run failed, for each of its assets that did."""
    by_step = {key.replace("/", "__"): key for key in keys}
    found: dict[str, str] = {}
    for event in result.all_events:
        if event.is_step_failure and event.step_key in by_step:
            found.setdefault(by_step[event.step_key], _failure(event.step_failure_data))
    return found or {keys[0]: "the run failed before its first step; see its page in the UI"}


def _failure(data: Any) -> str:
    """Say why a step failed: what was written for a person, else the error."""
    if data.user_failure_data is not None and data.user_failure_data.description:
        return data.user_failure_data.description
    # Dagster wraps what an asset raises once; what lies deeper is detail, and is on the run's page.
    error = data.error.cause or data.error if data.error else None
    if error is None:
        return "failed"
    message = error.message.strip()
    return message.split(": ", 1)[-1] if error.cls_name in OUR_ERRORS else message
