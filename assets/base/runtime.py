"""From Dagster's execution context to a `Step`: an asset gets its lake, pool and models from the run's resources."""

from dataclasses import replace

import dagster as dg

from assets.base import progress
from assets.base.asset import FileAsset, Step
from assets.base.context import Context, Snapshot

REQUIRED_RESOURCES = {"lake", "pool", "models", "run", "engine"}


def run_context(context: dg.AssetExecutionContext, project: Context) -> Context:
    """Return the project as a run's resources open it."""
    resources = context.resources
    return replace(project, lake=resources.lake, pool=resources.pool, models=resources.models)


def begin_step(context: dg.AssetExecutionContext, asset: FileAsset) -> Step:
    """Return the step of a run that computes an asset, with a fresh snapshot of the inputs."""
    context.resources.lake.refresh()
    layer = context.op_execution_context.job_def.asset_layer
    requested = frozenset("/".join(key.path) for key in layer.selected_asset_keys)
    meter = progress.Meter(lambda line: context.log.info(f"{asset.key}: {line}"), interval=progress.INTERVAL)
    resources, snapshot = context.resources, Snapshot(run_context(context, asset.context))
    return Step(asset, snapshot, {}, resources.run, requested, meter, resources.engine)
