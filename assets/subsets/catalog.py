"""`catalog`: one DuckDB file of views and macros over everything in the lake; it holds no data of its own."""

from pathlib import Path

import dagster as dg

from assets.base.context import Context
from assets.base.keys import asset_key
from assets.base.runtime import REQUIRED_RESOURCES, run_context
from assets.base.score_kind import Scores
from resources.catalog.build import build_catalog

CODE_VERSION = "3"


def catalog(project: Context, scores: Scores) -> dg.AssetsDefinition:
    """Return the asset `catalog` of a project."""
    subsets = [f"subset/{recipe}" for recipe in project.settings.recipes]

    @dg.asset(
        key="catalog",
        deps=[asset_key(key) for key in ["raw_pool", *scores.assets, *_targets(scores), *subsets]],
        code_version=CODE_VERSION,
        group_name="subsets",
        kinds={"duckdb"},
        description="`catalog.duckdb`: views over pool, rejects, scores and subsets, and the macros `explain(uid)`, "
        "`versions(subset)`, `lineage(subset)`, `diff(subset, a, b)` and `overlap(a, b)`. Any number of processes may "
        "open it read-only.",
        required_resource_keys=REQUIRED_RESOURCES,
    )
    def body(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        path = write_catalog(run_context(context, project))
        return dg.MaterializeResult(metadata={"path": dg.MetadataValue.path(str(path))})

    return body


def write_catalog(context: Context) -> Path:
    """Build the project's catalog from the lake's files, and return its path."""
    path, scores = context.catalog_path(), Scores(context.settings)
    build_catalog(
        context.lake.local_root(),
        path,
        scores={key: [column.name for column in declared.columns] for key, declared in scores.assets.items()},
        targets=_targets(scores),
        recipes=list(context.settings.recipes),
    )
    return path


def _targets(scores: Scores) -> list[str]:
    """List the target embeddings whose rows a score points to."""
    found = []
    for declared in scores.assets.values():
        if any(column.explains == "nearest_target" for column in declared.columns):
            found += [dep.key for dep in declared.deps if dep.key.startswith("target_embeddings/")]
    return found
