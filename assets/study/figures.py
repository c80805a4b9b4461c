"""The figures of the study page: what each score of a project that was run tells, and how far the scores agree.

Here: which rows are studied, and their figures. Not here: the statistics (`selection.statistics`), and how figures are
drawn and put in words (`assets.study.page`).

Rows are chosen by a keyed hash of the uid and everything is seeded: the same lake and truth give the same figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.score_kind import Scores
from assets.base.score_tables import to_tensor
from assets.scores.draws import draw, read_draws, with_content
from assets.scores.neg_clip_loss_settings import configured
from core.errors import UserError
from core.uids import UID_DTYPE
from resources.catalog.build import read_catalog
from resources.lake.files import column_to_vectors
from selection.scores.negatives import keyed_hash, membership
from selection.statistics import auc, best_overlap, bootstrap_auc, spearman

ROWS = 8192
RESAMPLES = 1000
CLEAN = "clean"
FAULTS = "all faults"
BEST = 0.3  # share of the rows whose overlap is told of each setting
SEED = 0
_TEMPERATURES = (1 / 4, 1 / 2, 2, 4)
_SMALLER_BATCHES = (64, 16, 4)


class StudyError(UserError, ValueError):
    """The truth can't be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % percentile interval over the resamples."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Tell whether a value lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Separation:
    """How well each score tells two groups of rows apart.

    Attributes:
        name: the fault, a variant of it, or a property of the truth.
        within: the fault that this is a variant of.
        wanted: the rows that should score above others have the property, rather than lacking the fault.
        rows: with the fault or property.
        others: rows that they are told from.
        covered: share of all these rows that have the score, by score.
        auc: by score; a score that no row of a side has is left out.
        ahead: difference of the highest AUC to each other one, paired, by score.
    """

    name: str
    within: str | None
    wanted: bool
    rows: int
    others: int
    covered: dict[str, float]
    auc: dict[str, Interval]
    ahead: dict[str, Interval]

    @property
    def best(self) -> str:
        """The score of the highest AUC."""
        return max(self.auc, key=lambda score: self.auc[score].value)


@dataclass(frozen=True)
class Overlap:
    """Two selections: rows of each and of both, and Jaccard's index."""

    a: str
    b: str
    rows_a: int
    rows_b: int
    rows_both: int
    jaccard: float


@dataclass(frozen=True)
class Variant:
    """negCLIPLoss under one setting.

    Attributes:
        what: what differs from the configured setting: `as configured`, τ, B, K, `seed` or `estimator`.
        temperature: τ.
        batch_size: B.
        draws: K.
        estimator: `reference_negatives` or `random_partitions`.
        spearman: rank correlation with the stored score.
        best_overlap: share of the best 30 % by the stored score that are among the best 30 % by this one.
        auc: by fault, where there is a truth.
        all_faults: AUC of all faults together, with its interval.
        gain: its difference to `as configured`, paired.
    """

    what: str
    temperature: float
    batch_size: int
    draws: int
    estimator: str
    spearman: float
    best_overlap: float
    auc: dict[str, float] = field(default_factory=dict)
    all_faults: Interval | None = None
    gain: Interval | None = None


@dataclass(frozen=True)
class Sensitivity:
    """negCLIPLoss of one encoder under other settings.

    Attributes:
        score: its name.
        rows: that were scored again: the studied rows that have embeddings and the score.
        largest_change: of a row, between the stored score and the configured one computed again.
        variants: the first is `as configured`.
    """

    score: str
    rows: int
    largest_change: float
    variants: list[Variant]


@dataclass(frozen=True)
class Study:
    """All figures of a page.

    Attributes:
        project: its name.
        pool_rows: rows of the pool.
        rows: of these, studied.
        truth: name of the truth's file.
        kinds: studied rows by kind, where there is a truth.
        unknown: uids of the truth that the pool does not have.
        scores: studied scores, each with the number of studied rows that have it.
        left_out: score columns that rank nothing, or that no studied row has.
        separations: where there is a truth.
        spearman: [s, s], in the order of `scores`.
        selections: rows of each recipe's newest version.
        overlaps: of each two of these.
        sensitivities: one for each encoder with a negCLIPLoss.
        resamples: of each bootstrap.
    """

    project: str
    pool_rows: int
    rows: int
    truth: str | None
    kinds: dict[str, int]
    unknown: int
    scores: dict[str, int]
    left_out: list[str]
    separations: list[Separation]
    spearman: list[list[float]]
    selections: dict[str, int]
    overlaps: list[Overlap]
    sensitivities: list[Sensitivity]
    resamples: int

    def figures(self) -> dict[str, Any]:
        """Give all figures as JSON values, rounded to six places; NaN is null."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def study(project: Context, truth: Path | None = None, *, rows: int = ROWS, resamples: int = RESAMPLES) -> Study:
    """Gather the figures of a project that was run.

    Args:
        project: the project; its catalog has to be there.
        truth: a parquet file of columns `uid` and `kind`, `clean` or the name of a fault; if there, `variant` divides
            the faults further, and each boolean column is a property that is wanted.
        rows: how many are studied at most, of those that the truth knows where it is given.
        resamples: of each bootstrap.

    Raises:
        FileNotFoundError: there is no catalog, or no such truth.
        StudyError: the truth lacks columns or clean rows, contradicts itself, or is of another pool; or the pool is
            empty.
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
        selections, overlaps = _overlaps(con, list(project.settings.recipes))
    names = frame.columns[frame.columns.index("key") + 1 :]
    names = [name for name in names if labels is None or name not in labels.columns]
    scores = Scores(project.settings).by_name
    ranking = [name for name in names if scores[name].column.direction is not None and frame[name].is_finite().any()]
    values = frame.select(ranking).cast(pl.Float64).to_numpy()
    groups = [] if labels is None else _groups(frame, labels, truth)
    return Study(
        project=project.settings.name,
        pool_rows=pool_rows,
        rows=len(frame),
        truth=truth.name if truth else None,
        kinds={} if labels is None else dict(frame["kind"].value_counts().sort("kind").iter_rows()),
        unknown=0 if labels is None else _unknown(project, labels),
        scores={name: int(np.isfinite(values[:, i]).sum()) for i, name in enumerate(ranking)},
        left_out=[name for name in names if name not in ranking],
        separations=[_separation(group, values, ranking, resamples) for group in groups],
        spearman=spearman(values).tolist(),
        selections=selections,
        overlaps=overlaps,
        sensitivities=[
            found
            for encoder in configured(project.settings)
            if (found := _sensitivity(project, encoder, frame, groups, resamples)) is not None
        ],
        resamples=resamples,
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
        raise StudyError(f"{path}: a uid has two kinds, or none. Remedy: one row a uid")
    return truth


def _choose(con: duckdb.DuckDBPyConnection, labels: pl.DataFrame | None, rows: int) -> pl.DataFrame:
    """Give the studied rows with their scores and labels, sorted by uid: those of the smallest keyed hash."""
    pool = con.sql("SELECT DISTINCT uid, f0, f1 FROM pool").pl()
    if labels is not None:
        pool = pool.join(labels.select("uid"), on="uid", how="semi")
    order = np.lexsort((pool["uid"].to_numpy(), keyed_hash(SEED, 0, pool["f0"].to_numpy(), pool["f1"].to_numpy())))
    con.register("chosen", pool[np.sort(order[:rows])].select("f0", "f1").to_arrow())
    frame = con.sql("SELECT * FROM scores SEMI JOIN chosen USING (f0, f1) ORDER BY f0, f1, shard, key").pl()
    frame = frame.unique(["f0", "f1"], keep="first", maintain_order=True)
    return frame if labels is None else frame.join(labels, on="uid", how="inner", maintain_order="left")


def _unknown(project: Context, labels: pl.DataFrame) -> int:
    with read_catalog(project.catalog_path()) as con:
        return len(labels.join(con.sql("SELECT uid FROM pool").pl(), on="uid", how="anti"))


# Separation


@dataclass(frozen=True)
class _Group:
    name: str
    within: str | None
    wanted: bool
    better: np.ndarray
    worse: np.ndarray


def _groups(frame: pl.DataFrame, labels: pl.DataFrame, truth: Path | None) -> list[_Group]:
    """Name the comparisons: every kind of fault, its variants, all faults, and every property of the truth."""
    kind = frame["kind"].to_numpy()
    clean = kind == CLEAN
    if not clean.any():
        raise StudyError(
            f"{truth}: no studied row is of kind {CLEAN!r}. Remedy: give that kind to rows without a fault, which "
            "the others are told from"
        )
    groups = []
    for fault in sorted(set(kind[~clean])):
        groups.append(_Group(fault, None, False, clean, kind == fault))
        if "variant" in labels.columns:
            variant = frame["variant"].fill_null("").to_numpy()
            variants = sorted(set(variant[kind == fault]))
            if len(variants) > 1:
                groups += [
                    _Group(name or "(none)", fault, False, clean, (kind == fault) & (variant == name))
                    for name in variants
                ]
    if (~clean).any():
        groups.append(_Group(FAULTS, None, False, clean, ~clean))
    for name in (name for name, dtype in labels.schema.items() if dtype == pl.Boolean):
        has, lacks = (frame[name].fill_null(not side).to_numpy() == side for side in (True, False))
        if has.any() and lacks.any():
            groups.append(_Group(name, None, True, has, lacks))
    return groups


def _separation(group: _Group, values: np.ndarray, names: Sequence[str], resamples: int) -> Separation:
    better, worse = values[group.better], values[group.worse]
    exact = auc(better, worse)
    drawn = bootstrap_auc(better, worse, resamples=resamples, seed=SEED)
    found = {name: _interval(exact[i], drawn[:, i]) for i, name in enumerate(names) if not math.isnan(exact[i])}
    ahead = {}
    if found:
        top = max(range(len(names)), key=lambda i: -math.inf if math.isnan(exact[i]) else exact[i])
        ahead = {
            name: _interval(exact[top] - exact[i], drawn[:, top] - drawn[:, i])
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


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return Interval(float(value), float(low), float(high))


# Overlap


def _overlaps(con: duckdb.DuckDBPyConnection, recipes: Sequence[str]) -> tuple[dict[str, int], list[Overlap]]:
    found = dict(con.execute('SELECT recipe, "rows" FROM subsets WHERE current').fetchall())
    selections = {recipe: found[recipe] for recipe in recipes if recipe in found}
    overlaps = []
    for a, b in combinations(selections, 2):
        (row,) = con.execute("FROM overlap($a, $b)", {"a": a, "b": b}).fetchall()
        overlaps.append(Overlap(a, b, *row))
    return selections, overlaps


# Sensitivity


def _sensitivity(
    project: Context, encoder: str, frame: pl.DataFrame, groups: Sequence[_Group], resamples: int
) -> Sensitivity | None:
    """Score the studied rows under other settings; None where the lake has not what that needs."""
    name = f"neg_clip_loss/{encoder}"
    stored = next((s for shard in project.lake.shards(name) if (s := project.lake.stored(name, shard))), None)
    if stored is None or name not in frame.columns:
        return None
    scorer = _Scorer(project, encoder, frame, stored.provenance.parameters)
    places = scorer.places
    before = frame[name].cast(pl.Float64).to_numpy()[places]
    size, draws = scorer.size, scorer.draws
    tau, estimator = stored.provenance.parameters["temperature"], stored.provenance.parameters["estimator"]
    other = {"reference_negatives": "random_partitions", "random_partitions": "reference_negatives"}[estimator]
    shared = min(size, len(places))  # a batch that both estimators can have
    wanted = [("as configured", tau, size, draws, estimator, 0)]
    wanted += [
        ("τ", tau * factor, size, draws, estimator, 0) for factor in _TEMPERATURES if 0.001 <= tau * factor <= 10
    ]
    smaller = {size // d for d in _SMALLER_BATCHES if size // d >= 2} | {shared} - {size}
    wanted += [("B", tau, b, draws, estimator, 0) for b in sorted(smaller)]
    wanted += [("K", tau, size, k, estimator, 0) for k in sorted({1, 2, draws // 2}) if 0 < k < draws]
    wanted += [("seed", tau, size, draws, estimator, 1)]
    wanted += [("estimator", tau, shared, draws, other, 0)]
    scored = np.stack([scorer.score(*setting) for _, *setting in wanted], axis=1)
    cut = [(g, g.better[places], g.worse[places]) for g in groups if not g.within and not g.wanted]
    by_fault = {g.name: auc(scored[better], scored[worse]) for g, better, worse in cut if better.any() and worse.any()}
    drawn = next(
        (
            bootstrap_auc(scored[better], scored[worse], resamples=resamples, seed=SEED)
            for g, better, worse in cut
            if g.name == FAULTS and g.name in by_fault
        ),
        None,
    )
    variants = []
    for i, (what, tau_, size_, draws_, estimator_, _) in enumerate(wanted):
        overall = gain = None
        if drawn is not None:
            exact = by_fault[FAULTS]
            overall = _interval(exact[i], drawn[:, i])
            gain = _interval(exact[i] - exact[0], drawn[:, i] - drawn[:, 0])
        variants.append(
            Variant(
                what,
                float(tau_),
                int(size_),
                int(draws_),
                estimator_,
                float(spearman(np.stack([before, scored[:, i]], axis=1))[0, 1]),
                best_overlap(before, scored[:, i], BEST) if len(before) * BEST >= 1 else math.nan,
                {fault: float(values[i]) for fault, values in by_fault.items()},
                overall,
                gain,
            )
        )
    return Sensitivity(name, len(places), float(np.abs(before - scored[:, 0]).max()), variants)


class _Scorer:
    """negCLIPLoss of the studied rows by the functions that the asset uses.

    Draws are nested: a draw's first rows are a smaller draw, and the first draws are fewer draws. So the stored
    negatives serve every smaller B and K.

    Attributes:
        places: which rows of the frame have embeddings and the score.
        size: B as configured.
        draws: K as configured.
    """

    def __init__(self, project: Context, encoder: str, frame: pl.DataFrame, parameters: Mapping[str, Any]) -> None:
        self.project, self.encoder = project, encoder
        self.arithmetic = parameters["arithmetic"]
        self.places, self.uids, self.image, self.text = _embedded(project, encoder, frame)
        settings = configured(project.settings)[encoder]
        self.seed = settings.seed
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        if parameters["estimator"] == "reference_negatives":
            self._drawn[0] = read_draws(project.lake.read(f"negatives/{encoder}"))
            self.draws, self.size = self._drawn[0][0].shape
        else:
            self.draws, self.size = settings.draws, settings.batch_size

    def score(self, temperature: float, size: int, draws: int, estimator: str, seed: int) -> np.ndarray:
        """Score the rows, float64 `[n]`; `seed` is added to the configured one."""
        import torch

        import selection

        image, text = to_tensor(self.image), to_tensor(self.text)
        if estimator == "random_partitions":
            found = selection.neg_clip_loss_in_batches(
                image,
                text,
                temperature=temperature,
                batch_size=size,
                draws=draws,
                seed=self.seed + seed,
                arithmetic=self.arithmetic,
            )
            return np.asarray(found.cpu().numpy(), np.float64)
        if seed not in self._drawn:
            self._drawn[seed] = self._draw(seed)
        uids, *vectors = (part[:draws, :size] for part in self._drawn[seed])
        rows = with_content(self.uids, self.image, self.text)
        member = membership(with_content(uids, *vectors), rows["f0"].copy(), rows["f1"].copy())
        found, _ = selection.neg_clip_loss(
            image,
            text,
            *(to_tensor(v) for v in vectors),
            temperature=temperature,
            member=torch.from_numpy(member).to(image.device),
            arithmetic=self.arithmetic,
        )
        return np.asarray(found.cpu().numpy(), np.float64)

    def _draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw negatives from the current pool, as the asset would with another seed."""
        key = f"embeddings/{self.encoder}"
        shards = embedded_shards(Snapshot(self.project), key)
        drawn = draw(self.project.lake, key, shards, draws=self.draws, batch_size=self.size, seed=self.seed + seed)
        return read_draws(drawn.table)


def _embedded(
    project: Context, encoder: str, frame: pl.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the studied rows' embeddings, each shard once.

    Returns:
        The rows' places in the frame `[n]`, ascending; their uids as records of f0 and f1 `[n]`; float16 image and text
        `[n, d]`.
    """
    asset = f"embeddings/{encoder}"
    numbered = frame.with_row_index("place").filter(pl.col(f"neg_clip_loss/{encoder}").is_finite())
    places, images, texts = [], [], []
    for (shard,), rows in numbered.group_by("shard", maintain_order=True):
        if project.lake.stored(asset, str(shard)) is None:
            continue
        table = project.lake.read(asset, str(shard))
        here = pl.DataFrame(table.select(["f0", "f1"])).with_row_index("row").unique(["f0", "f1"], keep="first")
        found = rows.join(here, on=["f0", "f1"], how="inner", maintain_order="left")
        at = found["row"].to_numpy()
        places.append(found["place"].to_numpy())
        images.append(column_to_vectors(table["image"])[at])
        texts.append(column_to_vectors(table["text"])[at])
    if not places:
        raise StudyError(f"{asset}: no studied row has embeddings. Remedy: run the project")
    place = np.concatenate(places)
    order = np.argsort(place)
    place = place[order]
    uids = np.empty(len(place), dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = frame["f0"].to_numpy()[place], frame["f1"].to_numpy()[place]
    return place, uids, np.concatenate(images)[order], np.concatenate(texts)[order]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
