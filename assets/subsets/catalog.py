"""`catalog`: one DuckDB file of views and macros over everything in the lake; it holds no data of its own."""

from dataclasses import replace
from pathlib import Path

import dagster as dg

from assets.base.checks import asset_key
from assets.base.score_names import score_names, score_type
from assets.project import Project, ProjectSettings
from resources.catalog.build import build_catalog
from resources.catalog.scores import CatalogColumn, CatalogScore

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
        scores=catalog_scores(project.settings),
        targets=_targets(project),
        recipes=list(project.settings.recipes),
    )
    return path


def catalog_scores(settings: ProjectSettings) -> list[CatalogScore]:
    """Return the project's score assets as the catalog takes them."""
    names = score_names(settings.score_assets)
    found = []
    for asset, columns in settings.score_assets.items():
        kind, _, rest = asset.partition("/")
        named = zip(columns, names[asset], strict=True)
        score = CatalogScore(asset, tuple(CatalogColumn(name, recipe, score_type(name)) for name, recipe in named))
        if kind == "norm_sim":
            score = replace(score, nearest_target=f"nearest_target/{rest}", targets=f"target_embeddings/{rest}")
        elif kind == "sieve":
            score = replace(score, best_caption=f"sieve_caption/{rest}")
        elif kind == "near_duplicates":
            score = replace(score, in_favour_of=f"near_duplicate_of/{rest}")
        found.append(score)
    return found


def _targets(project: Project) -> list[str]:
    norm_sim = project.settings.norm_sim
    return [f"target_embeddings/{encoder}/{target}" for encoder, targets in norm_sim.items() for target in targets]
