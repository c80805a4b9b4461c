"""`catalog`: one DuckDB file of views and macros over everything in the lake; it holds no data of its own."""

import dagster as dg

from assets.checks import asset_key
from assets.project import Project
from resources.catalog import build_catalog

CODE_VERSION = "2"


def catalog(project: Project) -> dg.AssetsDefinition:
    """Make the asset `catalog`."""
    settings = project.settings
    targets = [f"target_embeddings/{e}/{target}" for e, targets in settings.norm_sim.items() for target in targets]
    deps = ["raw_pool", *settings.score_assets, *targets, *(f"subset/{recipe}" for recipe in settings.recipes)]

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
        path = project.catalog_path()
        build_catalog(
            project.lake.local_root(),
            path,
            scores=settings.score_assets,
            targets=targets,
            recipes=list(settings.recipes),
        )
        return dg.MaterializeResult(metadata={"path": dg.MetadataValue.path(str(path))})

    return body
