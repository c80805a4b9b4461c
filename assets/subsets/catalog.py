"""`catalog`: one DuckDB file of views and macros over everything in the lake; it holds no data of its own."""

from pathlib import Path

import dagster as dg

from assets.base.checks import asset_key
from assets.project import Project
from resources.catalog.build import build_catalog

CODE_VERSION = "3"


def catalog(project: Project) -> dg.AssetsDefinition:
    """Make the asset `catalog`."""
    settings = project.settings
    deps = [
        "raw_pool",
        *settings.score_assets,
        *_targets(project),
        *(f"subset/{recipe}" for recipe in settings.recipes),
    ]

    @dg.asset(
        key="catalog",
        deps=[asset_key(dep) for dep in deps],
        code_version=CODE_VERSION,
        group_name="subsets",
        kinds={"duckdb"},
        description="`catalog.duckdb`: views over pool, rejects, scores and subsets, and the macros "
        "`explain(uid)`, `versions(subset)`, `lineage(subset)`, `diff(subset, a, b)` "
        "and `overlap(a, b)`. Opened read-only by any number of people.",
    )
    def body() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"path": dg.MetadataValue.path(str(write_catalog(project)))})

    return body


def write_catalog(project: Project) -> Path:
    """Build the project's catalog from what the lake holds now; give its path."""
    path = project.catalog_path()
    build_catalog(
        project.lake.local_root(),
        path,
        scores=project.settings.score_assets,
        targets=_targets(project),
        recipes=list(project.settings.recipes),
    )
    return path


def _targets(project: Project) -> list[str]:
    norm_sim = project.settings.norm_sim
    return [f"target_embeddings/{encoder}/{target}" for encoder, targets in norm_sim.items() for target in targets]
