"""What Dagster loads: the assets, jobs and sensors of one project.

The project is the YAML that the environment variable CLIP_SELECTION_CONFIG names; the demo where it is not set.
"""

import dagster as dg

from assets.base.partitioned import ShardAsset
from assets.graph import Graph, build_graph
from assets.project import Project, open_project
from dagster_project.executor import one_process
from dagster_project.location import config_path
from dagster_project.sensors import build_sensors


def build_defs(project: Project, graph: Graph | None = None) -> dg.Definitions:
    """Assemble the code location of a project.

    Args:
        project: the opened project.
        graph: its assets, where the caller has built them already.
    """
    graph = graph or build_graph(project)
    shard_assets = [node.definition for node in graph.nodes if isinstance(node, ShardAsset)]
    jobs = [
        dg.define_asset_job(
            "process_shards",
            selection=dg.AssetSelection.assets(*shard_assets),
            description="Everything that is computed shard by shard; choose the shards when launching.",
        )
    ]
    if graph.subsets:
        jobs.append(
            dg.define_asset_job(
                "select_subsets",
                selection=dg.AssetSelection.assets(*(node.definition for node in graph.subsets), graph.catalog),
                description="Choose every recipe's subset again from the scores that are there.",
            )
        )
    negatives = [node for node in graph.nodes if node.key.startswith("negatives/")]
    if negatives:
        jobs.append(
            dg.define_asset_job(
                "redraw_negatives",
                selection=dg.AssetSelection.assets(*(node.definition for node in negatives)),
                config={"ops": {n.definition.op.name: {"config": {"redraw": True}} for n in negatives}},
                description="Draw the reference negatives again from the pool as it is now. Every negCLIPLoss "
                "is then out of date and follows.",
            )
        )
    return dg.Definitions(
        assets=graph.definitions,
        jobs=jobs,
        sensors=build_sensors(project, graph),
        executor=one_process,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """Load the project that the environment names."""
    return build_defs(open_project(config_path()))
