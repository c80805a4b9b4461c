"""The code location: the assets, jobs, sensors and resources of one project.

The environment variable CLIP_SELECTION_CONFIG names the project's YAML; the demo is the default.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import dagster as dg

from assets.base.context import Context
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph, build_graph
from assets.settings import open_project
from dagster_project.early_checks import require_inputs
from dagster_project.executor import one_process_after
from dagster_project.location import config_path
from dagster_project.plan.job import plan_job
from dagster_project.resources import build_resources
from dagster_project.sensors import build_sensors


def build_defs(
    context: Context, graph: Graph | None = None, *, resource_overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """Assemble the code location of a project.

    Args:
        context: the project.
        graph: its assets, where the caller has built them already.
        resource_overrides: resources that replace the project's own, by name: `lake`, `pool`, `models`, `catalog`,
            `run`, `engine`. Each is a resource, or the object that a step gets. Sensors use the same lake and pool.
    """
    overrides = dict(resource_overrides or {})
    opened = {
        name: value.open() if hasattr(value, "open") else value
        for name, value in overrides.items()
        if name in ("lake", "pool", "models")
    }
    context = replace(context, **opened)
    graph = graph or build_graph(context)
    return dg.Definitions(
        assets=graph.definitions,
        jobs=[*_jobs(graph), plan_job(context, graph)],
        sensors=build_sensors(context, graph),
        resources={**build_resources(context.settings), **overrides},
        executor=one_process_after(partial(require_inputs, context, graph)),
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
