"""Cascades on the study page: how much of a full selection one keeps, and how many rows its encoder embeds.

Here: comparing a recipe that ranks by an encoder with `of` to the same selection from all rows. Not here: computing the
embeddings (`assets.pool.embeddings`).
"""

import math
from collections.abc import Sequence

import duckdb
import numpy as np
import polars as pl

from assets.base.context import Context
from assets.base.score_kind import Scores
from assets.study.results import TARGET_OVERLAP, Cascade, StudyError
from core.names import suggestion
from core.sql import quoted, text
from resources.lake.versions import Versions
from selection.recipes.model import POOL
from selection.recipes.recipe import Recipe
from selection.recipes.steps import part_of

SHARES = (0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)


def cascades(project: Context, con: duckdb.DuckDBPyConnection, pairs: Sequence[tuple[str, str]]) -> list[Cascade]:
    """Compare cascades with full selections.

    Args:
        project: The project.
        con: Its catalog.
        pairs: Recipes of the full selection and of the cascade.

    Raises:
        StudyError: A recipe does not exist or has no version, or the second one reads no score of an encoder with `of`.
    """
    return [_compared(project, con, full, cascade) for full, cascade in pairs]


def _compared(project: Context, con: duckdb.DuckDBPyConnection, full: str, cascade: str) -> Cascade:
    all_of, some_of = (_members(project, con, recipe) for recipe in (full, cascade))
    _require_same_shards(project, full, cascade)
    encoders = _encoders(project, cascade)
    embedded = {encoder: _rows(project, f"embeddings/{encoder}") for encoder in encoders}
    cheap = _cheap_score(project, encoders)
    places, rows = (np.empty(0, np.int64), 0) if cheap is None else _places(con, cheap, all_of)
    needed = places[math.ceil(TARGET_OVERLAP * len(places)) - 1] + 1 if len(places) else 0
    return Cascade(
        full=full,
        cascade=cascade,
        rows=all_of.height,
        overlap=all_of.join(some_of, on=["f0", "f1"], how="semi").height / all_of.height,
        embedded={encoder: count / _rows(project, "raw_pool") for encoder, count in embedded.items()},
        cheap=cheap,
        within={
            share: float((places < top).mean())
            for share in SHARES
            if len(places) and (top := part_of(rows, share)) >= len(places)
        },
        needed=float(needed / rows) if len(places) else None,
    )


def _members(project: Context, con: duckdb.DuckDBPyConnection, recipe: str) -> pl.DataFrame:
    """Return f0 and f1 of the rows of a recipe's newest version."""
    if recipe not in project.settings.recipes:
        raise StudyError(f"--cascade: there is no recipe {recipe!r}; {suggestion(recipe, project.settings.recipes)}")
    newest = "SEMI JOIN (FROM subsets WHERE current) USING (recipe, version)"
    found = con.sql(f"SELECT f0, f1 FROM subset_members {newest} WHERE recipe = {text(recipe)}").pl()
    if not found.height:
        raise StudyError(f"--cascade: recipe {recipe!r} has selected no row yet. Remedy: run the project")
    return found


def _require_same_shards(project: Context, *recipes: str) -> None:
    versions = [Versions(project.lake, recipe).current() for recipe in recipes]
    if len({tuple(sorted(version.lineage["shards"])) for version in versions if version is not None}) > 1:
        raise StudyError(
            f"--cascade: {' and '.join(recipes)} were selected from different shards, so their rows can't be compared. "
            "Remedy: run the project"
        )


def _encoders(project: Context, recipe: str) -> list[str]:
    """List the encoders with `of` that a recipe reads scores of."""
    scores = Scores(project.settings)
    names = {scores.assets[key].names.get("encoder", "") for key in scores.of_recipe(recipe)}
    found = sorted(name for name in names if name and project.settings.encoders[name].of is not None)
    if not found:
        raise StudyError(
            f"--cascade: recipe {recipe!r} reads no score of an encoder with `of`. Remedy: the full recipe first, then "
            "the one that ranks within a subset"
        )
    return found


def _rows(project: Context, key: str) -> int:
    return sum(project.lake.rows(key).values())


def _cheap_score(project: Context, encoders: Sequence[str]) -> str | None:
    """Return the score by which all encoders' subset is the top of the pool; None if there is none."""
    (first, *others) = {project.settings.encoders[name].recipe for name in encoders}
    assert first is not None
    recipe: Recipe = project.settings.recipes[first]
    if others or recipe.source != POOL or len(recipe.steps) != 1 or recipe.steps[0].keep_top is None:
        return None
    return recipe.steps[0].keep_top.score


def _places(con: duckdb.DuckDBPyConnection, cheap: str, full: pl.DataFrame) -> tuple[np.ndarray, int]:
    """Return the places of the full selection's rows by the cheap score, from 0, sorted; and the number of all rows."""
    ranked = (
        con.sql(f"SELECT f0, f1, {quoted(cheap)} AS cheap FROM scores ORDER BY shard, key")
        .pl()
        .unique(["f0", "f1"], keep="first")
        .sort(["cheap", "f0", "f1"], descending=[True, False, False], nulls_last=True)
        .with_row_index("place")
    )
    return np.sort(ranked.join(full, on=["f0", "f1"], how="semi")["place"].to_numpy().astype(np.int64)), ranked.height
