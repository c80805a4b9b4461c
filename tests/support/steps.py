"""Assets without Dagster: their checks, and the step of a run that computes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from assets.base.asset import Step
from assets.base.checks import Check, run_checks
from assets.base.context import Context, Progress, RunState, Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import build_graph


def node_of(project: Context, key: str) -> PartitionedAsset | UnpartitionedAsset:
    """Return an asset of a project."""
    (node,) = (node for node in build_graph(project).nodes if node.key == key)
    return node


def checks_of(project: Context, key: str) -> tuple[Check, ...]:
    """Return the checks of an asset."""
    return node_of(project, key).checks


def findings(
    project: Context, key: str, shard: str | None, new: Mapping[str, pa.Table] | None = None
) -> dict[str, dict[str, Any]]:
    """Run an asset's checks, except those on demand, with some tables in the place of the lake's."""
    node = node_of(project, key)
    return run_checks([c for c in node.checks if not c.on_demand], node.tables(Snapshot(project), shard, new))


def begin_shards(node: PartitionedAsset, shards: Sequence[str], progress: Progress | None = None) -> Step:
    """Return the step of a run that computes shards."""
    snapshot = Snapshot(node.context)
    state = RunState() if progress is None else RunState(progress)
    return Step(node, snapshot, {shard: node.provenance(snapshot, shard) for shard in shards}, state)


def begin(node: UnpartitionedAsset) -> Step:
    """Return the step of a run that computes an unpartitioned asset."""
    snapshot = Snapshot(node.context)
    return Step(node, snapshot, {None: node.provenance(snapshot)})
