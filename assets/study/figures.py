"""The statistics of the study page: what each score of a project finds, and how far the scores agree.

Here: choosing the rows to study, and comparing scores and selections on them. Not here: other settings of negCLIPLoss
(`sensitivity`), the formulas (`selection.statistics`), and the page (`page`).

Rows are chosen by a keyed hash of the uid and every draw is seeded: the same lake and truth give the same statistics.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from assets.base.context import Context
from assets.base.score_kind import Scores
from assets.scores.neg_clip_loss_settings import configured
from assets.study.cascades import cascades
from assets.study.results import FAULTS, SEED, Group, Overlap, Separation, Study, StudyError, interval
from assets.study.sensitivity import sensitivity
from assets.study.sets import set_measures
from resources.catalog.build import read_catalog
from selection.scores.negatives import keyed_hash
from selection.statistics import auc, bootstrap_auc, spearman

ROWS = 8192
RESAMPLES = 1000
CLEAN = "clean"
FEWEST = 10
"""Rows of a side that need a value of a score; with fewer, its AUC is not shown, unless the side has no more rows."""


def ranking_columns(project: Context) -> list[str]:
    """List the score columns that rank rows, by their names in recipes.

    Identifiers, counts, truth values and texts do not rank. Nor do standard errors, nor values that are comparable
    only within a round or a search.
    """
    scores = Scores(project.settings).by_name
    return [name for name, score in scores.items() if score.column.direction is not None]


def study(
    project: Context,
    truth: Path | None = None,
    *,
    ranking: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    rows: int = ROWS,
    resamples: int = RESAMPLES,
) -> Study:
    """Compute the statistics of a project that has been run.

    Args:
        project: The project; its catalog must exist.
        truth: A Parquet file with columns `uid` and `kind` (`clean`, or the name of a fault). An optional `variant`
            divides the faults further, and each boolean column is a property that is wanted.
        ranking: Score columns to compare, by their names in recipes; by default `ranking_columns(project)`.
        pairs: Recipes of full selections and of the cascades to compare them with.
        rows: Largest number of studied rows. With a truth, only its rows are studied.
        resamples: Number of resamples in each bootstrap.

    Raises:
        FileNotFoundError: There is no catalog, or no such truth.
        StudyError: The truth lacks columns or clean rows, contradicts itself, or belongs to another pool; the pool
            is empty; or a pair is not one of a full selection and a cascade.
    """
    labels = None if truth is None else _read_truth(truth)
    with read_catalog(project.catalog_path()) as con:
        ((pool_rows,),) = con.execute("SELECT count(*) FROM pool").fetchall()
        frame = _choose(con, labels, rows)
        if not len(frame):
            raise StudyError(
                f"{truth or project.catalog_path()}: no row of the pool is to be studied. Remedy: "
                + ("the truth of this pool" if truth else "run the project first")
            )
        unknown = 0 if labels is None else len(labels.join(con.sql("SELECT uid FROM pool").pl(), on="uid", how="anti"))
        selections, overlaps = _overlaps(con, list(project.settings.recipes))
        sets = set_measures(project, con, list(selections))
        compared_cascades = cascades(project, con, pairs)
    columns = frame.columns[frame.columns.index("key") + 1 :]
    columns = [name for name in columns if labels is None or name not in labels.columns]
    ranks = set(ranking_columns(project) if ranking is None else ranking)
    compared = [n for n in columns if n in ranks and frame[n].cast(pl.Float64).is_finite().any()]
    values = frame.select(compared).cast(pl.Float64).to_numpy()
    groups = [] if labels is None else _groups(frame, labels, truth)
    sensitivities = (sensitivity(project, e, frame, groups, resamples) for e in configured(project.settings))
    return Study(
        project=project.settings.name,
        pool_rows=pool_rows,
        rows=len(frame),
        truth=truth.name if truth else None,
        kinds={} if labels is None else dict(frame["kind"].value_counts().sort("kind").iter_rows()),
        unknown=unknown,
        scores={name: int(np.isfinite(values[:, i]).sum()) for i, name in enumerate(compared)},
        left_out=[name for name in columns if name not in compared],
        separations=[_separation(group, values, compared, resamples) for group in groups],
        spearman=spearman(values).tolist(),
        selections=selections,
        overlaps=overlaps,
        sensitivities=[found for found in sensitivities if found is not None],
        resamples=resamples,
        sets=sets,
        cascades=compared_cascades,
    )


# The rows


def _read_truth(path: Path) -> pl.DataFrame:
    try:
        truth = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise StudyError(f"{path}: not a parquet file ({error}). Remedy: a parquet of uid and kind") from error
    for column in ("uid", "kind"):
        if truth.schema.get(column) != pl.String:
            raise StudyError(f"{path}: no text column {column!r}. Remedy: a parquet of uid and kind")
    flags = [name for name, kind in truth.schema.items() if kind == pl.Boolean]
    variant = ["variant"] if truth.schema.get("variant") == pl.String else []
    truth = truth.select("uid", "kind", *variant, *flags).unique().sort("uid")
    if truth["uid"].is_duplicated().any() or truth["kind"].has_nulls():
        raise StudyError(f"{path}: a uid has two kinds, or none. Remedy: one row per uid")
    return truth


def _choose(con: duckdb.DuckDBPyConnection, labels: pl.DataFrame | None, rows: int) -> pl.DataFrame:
    """Return the rows with the smallest keyed hashes, with their scores and labels, sorted by uid."""
    pool = con.sql("SELECT DISTINCT uid, f0, f1 FROM pool").pl()
    if labels is not None:
        pool = pool.join(labels.select("uid"), on="uid", how="semi")
    order = np.lexsort((pool["uid"].to_numpy(), keyed_hash(SEED, 0, pool["f0"].to_numpy(), pool["f1"].to_numpy())))
    con.register("chosen", pool[np.sort(order[:rows])].select("f0", "f1").to_arrow())
    frame = con.sql("SELECT * FROM scores SEMI JOIN chosen USING (f0, f1) ORDER BY f0, f1, shard, key").pl()
    frame = frame.unique(["f0", "f1"], keep="first", maintain_order=True)
    return frame if labels is None else frame.join(labels, on="uid", how="inner", maintain_order="left")


# Separation


def _groups(frame: pl.DataFrame, labels: pl.DataFrame, truth: Path | None) -> list[Group]:
    """Return the comparisons: every kind of fault, its variants, all faults, and every property of the truth."""
    kind = frame["kind"].to_numpy()
    clean = kind == CLEAN
    if not clean.any():
        raise StudyError(
            f"{truth}: no studied row is of kind {CLEAN!r}. Remedy: give that kind to rows without a fault, with which "
            "the others are compared"
        )
    groups = []
    for fault in sorted(set(kind[~clean])):
        groups.append(Group(fault, None, False, clean, kind == fault))
        if "variant" in labels.columns:
            variant = frame["variant"].fill_null("").to_numpy()
            variants = sorted(set(variant[kind == fault]))
            if len(variants) > 1:
                groups += [
                    Group(name or "(none)", fault, False, clean, (kind == fault) & (variant == name))
                    for name in variants
                ]
    if (~clean).any():
        groups.append(Group(FAULTS, None, False, clean, ~clean))
    for name in (name for name, dtype in labels.schema.items() if dtype == pl.Boolean):
        has, lacks = (frame[name].fill_null(not side).to_numpy() == side for side in (True, False))
        if has.any() and lacks.any():
            groups.append(Group(name, None, True, has, lacks))
    return groups


def _separation(group: Group, values: np.ndarray, names: Sequence[str], resamples: int) -> Separation:
    better, worse = values[group.better], values[group.worse]
    exact = auc(better, worse)
    few = [(np.isfinite(side).sum(0) < FEWEST) & ~np.isfinite(side).all(0) for side in (better, worse)]
    exact = np.where(few[0] | few[1], np.nan, exact)
    drawn = bootstrap_auc(better, worse, resamples=resamples, seed=SEED)
    found = {name: interval(exact[i], drawn[:, i]) for i, name in enumerate(names) if not math.isnan(exact[i])}
    ahead = {}
    if found:
        top = max(range(len(names)), key=lambda i: -math.inf if math.isnan(exact[i]) else exact[i])
        ahead = {
            name: interval(exact[top] - exact[i], drawn[:, top] - drawn[:, i])
            for i, name in enumerate(names)
            if name in found and i != top
        }
    return Separation(
        group.name,
        group.within,
        group.wanted,
        len(better) if group.wanted else len(worse),
        len(worse) if group.wanted else len(better),
        dict(zip(names, np.isfinite(np.concatenate([better, worse])).mean(0).tolist(), strict=True)),
        found,
        ahead,
    )


# Overlap


def _overlaps(con: duckdb.DuckDBPyConnection, recipes: Sequence[str]) -> tuple[dict[str, int], list[Overlap]]:
    found = dict(con.execute('SELECT recipe, "rows" FROM subsets WHERE current').fetchall())
    selections = {recipe: found[recipe] for recipe in recipes if recipe in found}
    overlaps = []
    for a, b in combinations(selections, 2):
        (row,) = con.execute("FROM overlap($a, $b)", {"a": a, "b": b}).fetchall()
        overlaps.append(Overlap(a, b, *row))
    return selections, overlaps
