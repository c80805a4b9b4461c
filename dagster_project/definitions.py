"""The code location: the assets, jobs, sensors and resources of one project.

The environment variable CLIP_SELECTION_CONFIG names the project's YAML; the demo is the default.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import dagster as dg

from assets.base.context import Context
from assets.graph import Graph, build_graph
from assets.settings import open_project
from dagster_project.early_checks import require_inputs
from dagster_project.executor import one_process_after
from dagster_project.jobs import build_jobs
from dagster_project.location import config_path
from dagster_project.plan.job import plan_job
from dagster_project.resources import build_resources, engine
from dagster_project.sensors import build_sensors
from dagster_project.staleness import shards_per_run


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
        assets=_assets(graph),
        jobs=[*build_jobs(graph), plan_job(context, graph)],
        sensors=build_sensors(context, graph),
        resources={**build_resources(context.settings), "engine": engine(opened), **overrides},
        executor=one_process_after(partial(require_inputs, context, graph)),
    )


def _assets(graph: Graph) -> list[dg.AssetsDefinition]:
    """Return the assets; backfills of those with shards get runs of the size that the environment names."""
    most = shards_per_run()
    if most is None:
        return graph.definitions
    # Beta in Dagster 1.13, like the policy that it replaces (`assets.base.partitioned`)
    policy = dg.BackfillPolicy.multi_run(most)
    return [
        asset.with_attributes(backfill_policy=policy) if asset.partitions_def else asset for asset in graph.definitions
    ]


@dg.definitions
def defs() -> dg.Definitions:
    """Load the project that the environment names."""
    return build_defs(open_project(config_path()))
