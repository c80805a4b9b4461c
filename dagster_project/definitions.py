"""The code location: the assets, jobs, sensors and resources of one project.

The environment variable CLIP_SELECTION_CONFIG names the project's YAML; the demo is the default.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.base.context import Context, RunState
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph, build_graph
from assets.settings import open_project
from dagster_project.dead_runs import one_process
from dagster_project.sensors import build_sensors

CONFIG_VARIABLE = "CLIP_SELECTION_CONFIG"
DEMO_CONFIG = Path(__file__).resolve().parent.parent / "config" / "demo.yaml"


def config_path() -> Path:
    """Return the path of the project's YAML."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEMO_CONFIG)


def build_defs(
    context: Context, graph: Graph | None = None, *, resource_overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """Assemble the code location of a project.

    Args:
        context: the project.
        graph: its assets, where the caller has built them already.
        resource_overrides: resources that replace the project's own, by name: `lake`, `pool`, `models`, `run`.
    """
    graph = graph or build_graph(context)
    resources = {
        "lake": context.lake,
        "pool": context.pool,
        "models": context.models,
        "run": RunState(),
        **(resource_overrides or {}),
    }
    return dg.Definitions(
        assets=graph.definitions,
        jobs=_jobs(graph),
        sensors=build_sensors(context, graph),
        resources=resources,
        executor=one_process,
    )


def _jobs(graph: Graph) -> list[Any]:
    shard_assets = [node.definition for node in graph.nodes if isinstance(node, PartitionedAsset)]
    jobs = [
        dg.define_asset_job(
            "process_shards",
            selection=dg.AssetSelection.assets(*shard_assets),
            description="Every asset that is partitioned by shard; choose the shards when launching.",
        )
    ]
    if graph.subsets:
        jobs.append(
            dg.define_asset_job(
                "select_subsets",
                selection=dg.AssetSelection.assets(*(node.definition for node in graph.subsets), graph.catalog),
                description="Select every recipe's subset again from the existing scores.",
            )
        )
    negatives = [node for node in graph.nodes if node.key.startswith("negatives/")]
    if negatives:
        jobs.append(
            dg.define_asset_job(
                "redraw_negatives",
                selection=dg.AssetSelection.assets(*(node.definition for node in negatives)),
                config={"ops": {n.definition.op.name: {"config": {"redraw": True}} for n in negatives}},
                description="Draw the reference negatives again from the current pool. Every negCLIPLoss is then stale "
                "and is computed again.",
            )
        )
    return jobs


@dg.definitions
def defs() -> dg.Definitions:
    """Load the project that the environment names."""
    return build_defs(open_project(config_path()))
