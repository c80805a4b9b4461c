"""`catalog`: one DuckDB file of views and macros over everything in the lake; it holds no data of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.base.context import Context, Snapshot
from assets.base.freshness import ShardState, shard_states
from assets.base.keys import asset_key
from assets.base.runtime import REQUIRED_RESOURCES, run_context
from assets.base.score_kind import Scores
from resources.catalog.build import CatalogError, build_catalog, read_catalog
from resources.catalog.scores import CatalogColumn, CatalogScore
from resources.lake.versions import Versions

CODE_VERSION = "4"
SHOWN = 200
"""Shards in the metadata."""
TARGET_EMBEDDINGS = "target_embeddings/"


def catalog(project: Context, scores: Scores, assets: Mapping[str, Any]) -> dg.AssetsDefinition:
    """Return the asset `catalog` of a project.

    Args:
        project: the project.
        scores: its scores.
        assets: its assets of files and subsets by key, whose state the metadata shows for each shard.
    """
    subsets = [f"subset/{recipe}" for recipe in project.settings.recipes]

    @dg.asset(
        key="catalog",
        deps=[asset_key(key) for key in ["raw_pool", *scores.assets, *_targets(scores), *subsets]],
        code_version=CODE_VERSION,
        group_name="subsets",
        kinds={"duckdb"},
        description="`catalog.duckdb`: views over pool, rejects, scores, subsets and evaluations, and the "
        "macros `explain(uid)`, "
        "`versions(subset)`, `lineage(subset)`, `diff(subset, a, b)` and `overlap(a, b)`. Any number of processes may "
        "open it read-only.",
        required_resource_keys={*REQUIRED_RESOURCES, "catalog"},
    )
    def body(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        opened = run_context(context, project)
        path = write_catalog(opened, Path(context.resources.catalog.path))
        states = shard_states(Snapshot(opened), assets)
        return dg.MaterializeResult(metadata={"path": dg.MetadataValue.path(str(path)), **_shards(states)})

    return body


def _shards(states: Sequence[ShardState]) -> dict[str, Any]:
    """Return how far the shards are, as metadata: a table of some shards, the incomplete ones first."""
    records = [
        dg.TableRecord(
            {
                "shard": state.shard,
                "rows": -1 if state.rows is None else state.rows,
                "complete": f"{len(state.complete)} of {len(state.complete + state.due + state.waiting)}",
                "due": ", ".join(state.due),
                "waiting for inputs": ", ".join(state.waiting),
            }
        )
        for state in states[:SHOWN]
    ]
    table = {"shards": dg.MetadataValue.table(records)} if records else {}
    return {"shards_complete": sum(state.is_complete for state in states), "shards_in_pool": len(states), **table}


def write_catalog(context: Context, path: Path) -> Path:
    """Build the project's catalog from the lake's files, and return its path."""
    scores = Scores(context.settings)
    build_catalog(
        context.lake,
        path,
        scores=catalog_scores(scores),
        targets=_targets(scores),
        recipes=list(context.settings.recipes),
    )
    return path


def catalog_scores(scores: Scores) -> list[CatalogScore]:
    """Return the project's score assets as the catalog takes them."""
    found = []
    for asset, declared in scores.assets.items():
        names = scores.names_of(asset)
        columns = tuple(
            CatalogColumn(column.name, name, column.sql_type)
            for column, name in zip(declared.columns, names, strict=True)
        )
        shown = {c.explains: name for c, name in zip(declared.columns, names, strict=True) if c.explains is not None}
        targets = next((dep.key for dep in declared.deps if dep.key.startswith(TARGET_EMBEDDINGS)), None)
        found.append(CatalogScore(asset, columns, targets=targets, **shown))
    return found


def _targets(scores: Scores) -> list[str]:
    """List the target embeddings whose rows a score points to."""
    return [s.targets for s in catalog_scores(scores) if s.nearest_target is not None and s.targets is not None]


def catalog_is_newest(project: Context) -> bool:
    """Check whether the catalog can be read, and was built after the YAML and every subset's newest version."""
    catalog = project.catalog_path()
    try:
        read_catalog(catalog).close()
    except (CatalogError, FileNotFoundError):
        return False
    versions = (Versions(project.lake, recipe).current() for recipe in project.settings.recipes)
    records = [f"{version.folder}/lineage.json" for version in versions if version is not None]
    times = [project.config.stat().st_mtime, *(project.lake.changed(record) for record in records)]
    return all(time <= catalog.stat().st_mtime for time in times)
