"""The jobs of a project, by which people launch runs from the UI; sensors request assets without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from assets.base.keys import asset_key
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph

PROCESS, SELECT, REDRAW = "process_shards", "select_subsets", "redraw_negatives"


def job_assets(graph: Graph) -> Mapping[str, Sequence[str]]:
    """Return the keys of each job's assets, by its name; a project without such assets has no such job."""
    found = {
        PROCESS: [node.key for node in graph.nodes if isinstance(node, PartitionedAsset)],
        SELECT: [*(node.key for node in graph.subsets), "catalog"] if graph.subsets else [],
        REDRAW: [node.key for node in graph.nodes if node.key.startswith("negatives/")],
    }
    return {name: keys for name, keys in found.items() if keys}


def build_jobs(graph: Graph) -> list[Any]:
    """Return the jobs of a project."""
    redraw = {n.definition.op.name: {"config": {"redraw": True}} for n in graph.nodes if n.key.startswith("negatives/")}
    descriptions = {
        PROCESS: "Every asset that is partitioned by shard; choose the shards when launching.",
        SELECT: "Select every recipe's subset again from the existing scores.",
        REDRAW: "Draw the reference negatives again from the current pool. Every negCLIPLoss is then stale and is "
        "computed again.",
    }
    return [
        dg.define_asset_job(
            name,
            selection=dg.AssetSelection.assets(*map(asset_key, keys)),
            config={"ops": redraw} if name == REDRAW else None,
            description=descriptions[name],
        )
        for name, keys in job_assets(graph).items()
    ]
