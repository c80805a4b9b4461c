"""What the runs that have not ended compute, so that sensors leave those shards, and what they are made from, alone.

Here: queued runs too, whoever launched them. Not here: runs whose process died (`dagster_project.dead_runs`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dagster as dg

from assets.base.keys import SHARDS_NAME
from assets.graph import Graph
from dagster_project.dead_runs import close_dead_runs
from dagster_project.staleness import PARTITION, RANGE_END, RANGE_START
from resources.lake.files import Lake

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class ActiveRun:
    """A run that has not ended.

    Attributes:
        run_id: its id.
        assets: keys of its assets.
        shards: the shards that its partitioned assets are computed for; None stands for all.
    """

    run_id: str
    assets: frozenset[str]
    shards: frozenset[str] | None

    def covers(self, shard: str | None) -> bool:
        """Check whether it computes a shard."""
        return self.shards is None or shard in self.shards


@dataclass(frozen=True)
class ActiveRuns:
    """The runs that have not ended, and which work has to wait for them.

    Attributes:
        graph: the project's assets.
        lake: the lake.
        runs: the runs.
    """

    graph: Graph
    lake: Lake
    runs: Sequence[ActiveRun]

    @property
    def ids(self) -> list[str]:
        """The ids of the runs, sorted."""
        return sorted(run.run_id for run in self.runs)

    def hold(self, key: str, shard: str | None) -> bool:
        """Check whether a file has to wait for a run.

        It does where a run writes it, writes what it is made from, or reads it. A run over other shards holds nothing
        up. An unpartitioned asset, a subset too, reads the files that were there when it began, so new ones may arrive.

        Args:
            key: of the asset.
            shard: of the file; None for an unpartitioned asset.
        """
        return any(self._holds(run, key, shard) for run in self.runs)

    def reading(self, keys: Collection[str]) -> list[str]:
        """List the runs that write some assets, or what those are made from."""
        wanted = set(keys).union(*(self._upstream.get(key, ()) for key in keys))
        return [run.run_id for run in self.runs if run.assets & wanted]

    def _holds(self, run: ActiveRun, key: str, shard: str | None) -> bool:
        for other in run.assets:
            together = shard is None or (other in self._partitioned and run.covers(shard))
            if shard is not None and other in self._partitioned and not together:
                continue
            if key == other or other in self._upstream.get(key, ()):
                return True
            if key in self._upstream.get(other, ()) and (together or self.lake.stored(key, shard) is not None):
                return True
        return False

    @cached_property
    def _partitioned(self) -> set[str]:
        return {node.key for node in (*self.graph.nodes, *self.graph.exports) if node.partitioned}

    @cached_property
    def _upstream(self) -> Mapping[str, set[str]]:
        """The keys of everything that each asset is made from."""
        found: dict[str, set[str]] = {}
        for node in (*self.graph.in_order, *self.graph.exports):
            found[node.key] = set(node.deps).union(*(found.get(dep, ()) for dep in node.deps))
        return found


def active_runs(
    instance: dg.DagsterInstance, graph: Graph, lake: Lake, jobs: Mapping[str, Collection[str]]
) -> ActiveRuns:
    """Return the runs that have not ended, less those whose process died, which are marked as failed.

    Args:
        instance: where runs are recorded.
        graph: the project's assets.
        lake: the lake.
        jobs: keys of the assets of each job: a run of a whole job does not list them.
    """
    close_dead_runs(instance)
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED))
    partitions = list(instance.get_dynamic_partitions(SHARDS_NAME)) if runs else []
    return ActiveRuns(
        graph, lake, [ActiveRun(run.run_id, _assets(run, graph, jobs), _shards(run, partitions)) for run in runs]
    )


def _assets(run: dg.DagsterRun, graph: Graph, jobs: Mapping[str, Collection[str]]) -> frozenset[str]:
    if run.asset_selection is not None:
        return frozenset("/".join(key.path) for key in run.asset_selection)
    if run.asset_check_selection:
        return frozenset()
    every = [node.key for node in (*graph.in_order, *graph.exports)]
    return frozenset(jobs.get(run.job_name, [*every, "catalog"]))


def _shards(run: Any, partitions: Sequence[str]) -> frozenset[str] | None:
    if PARTITION in run.tags:
        return frozenset([run.tags[PARTITION]])
    first, last = run.tags.get(RANGE_START), run.tags.get(RANGE_END)
    if first not in partitions or last not in partitions:
        return None
    return frozenset(partitions[partitions.index(first) : partitions.index(last) + 1])
