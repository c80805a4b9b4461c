"""Dagster's records of a scenario: what they call stale, and runs of long ago."""

from datetime import timedelta

import dagster as dg
import sqlalchemy as sa
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from assets.base.partitioned import PartitionedAsset
from dagster_project.definitions import build_defs
from tests.support.scenario import SHARDS, Scenario


def stale(scenario: Scenario) -> dict[str, set[str | None]]:
    """Return what Dagster does not call fresh: by asset its shards, or None for an asset without shards."""
    project, graph = scenario.open_graph()
    asset_graph = build_defs(project, graph).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(scenario.instance, asset_graph, LoadingContextForTest(scenario.instance))
    return {
        node.key: {
            shard
            for shard in (SHARDS if isinstance(node, PartitionedAsset) else [None])
            if resolver.get_status(dg.AssetKey(node.key.split("/")), shard) != StaleStatus.FRESH
        }
        for node in (*graph.nodes, *graph.subsets)
    }


def age_runs(instance: dg.DagsterInstance, by: timedelta) -> None:
    """Move the end of all runs into the past."""
    with instance.run_storage.connect() as connection:
        connection.execute(sa.text("UPDATE runs SET end_time = end_time - :by"), {"by": by.total_seconds()})
