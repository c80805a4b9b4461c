"""The statistics of the study page: what each score of a project finds, and how far the scores agree.

Here: choosing the rows to study, and their statistics. Not here: the formulas (`selection.statistics`), and the page
(`assets.study.page`).

Rows are chosen by a keyed hash of the uid and every draw is seeded: the same lake and truth give the same statistics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import polars as pl

from assets.base.score_tables import to_tensor
from assets.project import Project
from assets.scores.negatives import negatives, read_draws, with_content
from core.errors import UserError
from core.uids import UID_DTYPE
from resources.catalog.build import read_catalog, score_type
from resources.lake.gather import gather
from selection.scores.negatives import keyed_hash, membership
from selection.statistics import auc, best_overlap, bootstrap_auc, spearman

ROWS = 8192
RESAMPLES = 1000
CLEAN = "clean"
FAULTS = "all faults"
BEST = 0.3  # share of the rows whose overlap is reported for each setting
CHANCE = 0.5  # AUC of a score that knows nothing
CONFIGURED = "as configured"
SEED = 0
_NOT_RANKING = ("nearest_target", "neg_clip_loss_stderr", "norm_sim_2_last", "near_duplicate")
_TEMPERATURES = (1 / 4, 1 / 2, 2, 4)
_SMALLER_BATCHES = (64, 16, 4)
_OTHER_ESTIMATOR = {"reference_negatives": "random_partitions", "random_partitions": "reference_negatives"}


def ranking_columns(project: Project) -> list[str]:
    """List the score columns that rank rows, by their names in recipes.

    Identifiers, counts, truth values and texts do not rank. Nor do standard errors, nor values that are comparable
    only within a round or a search.
    """
    return [
        name
        for name, (_, column) in project.settings.score_columns.items()
        if score_type(column) == "FLOAT" and column not in _NOT_RANKING
    ]


class StudyError(UserError, ValueError):
    """The truth can't be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % percentile interval over the resamples; NaN bounds if there is none."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Separation:
    """How well each score separates two groups of rows.

    Attributes:
        name: The fault, a variant of it, or a property of the truth.
        within: The fault of which this is a variant.
        wanted: True for a property, whose rows should score above the others; False for a fault.
        rows: Number of rows with the fault or property.
        others: Number of rows they are compared with.
        covered: Share of all these rows that have the score, by score.
        auc: AUC by score; a score that no row of a side has is left out.
        ahead: Difference of the highest AUC to each other one, paired, by score.
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
        """The score with the highest AUC."""
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
        what: The setting that differs from the configured ones: `as configured`, τ, B, K, `seed` or `estimator`.
        temperature: τ.
        batch_size: B.
        draws: K.
        estimator: `reference_negatives` or `random_partitions`.
        spearman: Rank correlation with the stored score.
        best_overlap: Share of the best 30 % by the stored score that are among the best 30 % by this one.
        auc: AUC by fault; empty without a truth.
        all_faults: AUC of all faults together, with its interval.
        gain: Its difference to `as configured`, paired.
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
        score: Name of the score.
        rows: Number of rows scored again: the studied rows that have embeddings and the score.
        largest_change: Largest difference of a row between the stored score and the configured one computed again.
        variants: The settings; the first is `as configured`.
    """

    score: str
    rows: int
    largest_change: float
    variants: list[Variant]


@dataclass(frozen=True)
class Study:
    """All statistics of a page.

    Attributes:
        project: Name of the project.
        pool_rows: Number of rows in the pool.
        rows: Number of studied rows.
        truth: Name of the truth's file.
        kinds: Number of studied rows by kind; empty without a truth.
        unknown: Number of uids in the truth that the pool does not have.
        scores: Number of studied rows that have the score, by studied score.
        left_out: Score columns that do not rank, or that no studied row has.
        separations: One for each fault, variant and property; empty without a truth.
        spearman: Rank correlations [s, s], in the order of `scores`.
        selections: Rows of each recipe's newest version.
        overlaps: One for each pair of selections.
        sensitivities: One for each encoder with a negCLIPLoss.
        resamples: Number of resamples in each bootstrap.
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

    def as_dict(self) -> dict[str, Any]:
        """Return all statistics as JSON values, rounded to six places; NaN is null."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def study(
    project: Project,
    truth: Path | None = None,
    *,
    ranking: Sequence[str] | None = None,
    rows: int = ROWS,
    resamples: int = RESAMPLES,
) -> Study:
    """Compute the statistics of a project that has been run.

    Args:
        project: The project; its catalog must exist.
        truth: A Parquet file with columns `uid` and `kind` (`clean`, or the name of a fault). An optional `variant`
            divides the faults further, and each boolean column is a property that is wanted.
        ranking: Score columns to compare, by their names in recipes; by default `ranking_columns(project)`.
        rows: Largest number of studied rows. With a truth, only its rows are studied.
        resamples: Number of resamples in each bootstrap.

    Raises:
        FileNotFoundError: There is no catalog, or no such truth.
        StudyError: The truth lacks columns or clean rows, contradicts itself, or belongs to another pool; or the pool
            is empty.
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
    columns = frame.columns[frame.columns.index("key") + 1 :]
    columns = [name for name in columns if labels is None or name not in labels.columns]
    ranks = set(ranking_columns(project) if ranking is None else ranking)
    compared = [n for n in columns if n in ranks and frame[n].cast(pl.Float64).is_finite().any()]
    values = frame.select(compared).cast(pl.Float64).to_numpy()
    groups = [] if labels is None else _groups(frame, labels, truth)
    sensitivities = (_sensitivity(project, e, frame, groups, resamples) for e in project.settings.neg_clip_loss)
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


@dataclass(frozen=True)
class _Group:
    name: str
    within: str | None
    wanted: bool
    better: np.ndarray
    worse: np.ndarray


def _groups(frame: pl.DataFrame, labels: pl.DataFrame, truth: Path | None) -> list[_Group]:
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


class _Setting(NamedTuple):
    """A setting of negCLIPLoss; `seed` is added to the configured one."""

    what: str
    temperature: float
    batch_size: int
    draws: int
    estimator: str
    seed: int = 0


def _sensitivity(
    project: Project, encoder: str, frame: pl.DataFrame, groups: Sequence[_Group], resamples: int
) -> Sensitivity | None:
    """Score the studied rows under other settings; return None if the score is not stored."""
    name = f"neg_clip_loss/{encoder}"
    stored = next((s for shard in project.lake.shards(name) if (s := project.lake.stored(name, shard))), None)
    if stored is None or name not in frame.columns:
        return None
    scorer = _Scorer(project, encoder, frame, stored.provenance.parameters)
    before = frame[name].cast(pl.Float64).to_numpy()[scorer.places]
    settings = _settings(scorer, stored.provenance.parameters)
    scored = np.stack([scorer.score(setting) for setting in settings], axis=1)
    by_fault, overall, gains = _fault_aucs(scored, groups, scorer.places, resamples)
    variants = [
        Variant(
            what=setting.what,
            temperature=float(setting.temperature),
            batch_size=int(setting.batch_size),
            draws=int(setting.draws),
            estimator=setting.estimator,
            spearman=float(spearman(np.stack([before, scored[:, i]], axis=1))[0, 1]),
            best_overlap=best_overlap(before, scored[:, i], BEST) if len(before) * BEST >= 1 else math.nan,
            auc={fault: float(values[i]) for fault, values in by_fault.items()},
            all_faults=overall[i] if overall else None,
            gain=gains[i] if gains else None,
        )
        for i, setting in enumerate(settings)
    ]
    return Sensitivity(name, len(before), float(np.abs(before - scored[:, 0]).max()), variants)


def _settings(scorer: "_Scorer", parameters: Mapping[str, Any]) -> list[_Setting]:
    """Return the settings to compare: the configured one, then others that differ from it in one value."""
    tau, estimator = parameters["temperature"], parameters["estimator"]
    size, draws = scorer.size, scorer.draws
    configured = _Setting(CONFIGURED, tau, size, draws, estimator)
    shared = min(size, len(scorer.places))  # the largest batch that both estimators can have
    temperatures = [tau * factor for factor in _TEMPERATURES if 0.001 <= tau * factor <= 10]
    sizes = sorted({size // d for d in _SMALLER_BATCHES if size // d >= 2} | {shared} - {size})
    return [
        configured,
        *(configured._replace(what="τ", temperature=temperature) for temperature in temperatures),
        *(configured._replace(what="B", batch_size=smaller) for smaller in sizes),
        *(configured._replace(what="K", draws=k) for k in sorted({1, 2, draws // 2}) if 0 < k < draws),
        configured._replace(what="seed", seed=1),
        configured._replace(what="estimator", batch_size=shared, estimator=_OTHER_ESTIMATOR[estimator]),
    ]


def _fault_aucs(
    scored: np.ndarray, groups: Sequence[_Group], places: np.ndarray, resamples: int
) -> tuple[dict[str, np.ndarray], list[Interval], list[Interval]]:
    """Compute the AUCs of every setting.

    Args:
        scored: Scores `[n, settings]`.
        groups: The comparisons of the study.
        places: Positions of the scored rows among the studied ones `[n]`.
        resamples: Number of resamples.

    Returns:
        The AUCs `[settings]` by fault; for all faults together, the AUC of each setting and its difference to the first
        one, paired, with intervals. The lists are empty if there are no faults.
    """
    sides = {
        group.name: (scored[group.better[places]], scored[group.worse[places]])
        for group in groups
        if not group.within and not group.wanted
    }
    sides = {name: (better, worse) for name, (better, worse) in sides.items() if len(better) and len(worse)}
    by_fault = {name: auc(better, worse) for name, (better, worse) in sides.items()}
    if FAULTS not in sides:
        return by_fault, [], []
    exact, drawn = by_fault[FAULTS], bootstrap_auc(*sides[FAULTS], resamples=resamples, seed=SEED)
    overall = [_interval(exact[i], drawn[:, i]) for i in range(len(exact))]
    gains = [_interval(exact[i] - exact[0], drawn[:, i] - drawn[:, 0]) for i in range(len(exact))]
    return by_fault, overall, gains


class _Scorer:
    """negCLIPLoss of the studied rows, by the functions that the asset uses.

    Draws are nested: the first rows of a draw are a smaller draw. So the stored negatives serve every smaller B and K.

    Attributes:
        places: Positions in the frame of the rows that have embeddings and the score `[n]`, ascending.
        size: B as configured.
        draws: K as configured.
    """

    def __init__(self, project: Project, encoder: str, frame: pl.DataFrame, parameters: Mapping[str, Any]) -> None:
        self.project, self.encoder = project, encoder
        self.arithmetic = parameters["arithmetic"]
        self.places, self.uids, self.image, self.text = _embedded(project, encoder, frame)
        settings = project.settings.neg_clip_loss[encoder]
        self.seed = settings.seed
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        if parameters["estimator"] == "reference_negatives":
            self._drawn[0] = read_draws(project.lake.read(f"negatives/{encoder}"))
            self.draws, self.size = self._drawn[0][0].shape
        else:
            self.draws, self.size = settings.draws, settings.batch_size

    def score(self, setting: _Setting) -> np.ndarray:
        """Return the scores of the rows under a setting, float64 `[n]`."""
        import torch

        import selection

        image, text = to_tensor(self.image), to_tensor(self.text)
        if setting.estimator == "random_partitions":
            found = selection.neg_clip_loss_in_batches(
                image,
                text,
                temperature=setting.temperature,
                batch_size=setting.batch_size,
                draws=setting.draws,
                seed=self.seed + setting.seed,
                arithmetic=self.arithmetic,
            )
            return np.asarray(found.cpu().numpy(), np.float64)
        if setting.seed not in self._drawn:
            self._drawn[setting.seed] = self._draw(setting.seed)
        uids, *vectors = (part[: setting.draws, : setting.batch_size] for part in self._drawn[setting.seed])
        rows = with_content(self.uids, self.image, self.text)
        member = membership(with_content(uids, *vectors), rows["f0"].copy(), rows["f1"].copy())
        found, _ = selection.neg_clip_loss(
            image,
            text,
            *(to_tensor(v) for v in vectors),
            temperature=setting.temperature,
            member=torch.from_numpy(member).to(image.device),
            arithmetic=self.arithmetic,
        )
        return np.asarray(found.cpu().numpy(), np.float64)

    def _draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw negatives from the current pool, as the asset would with another seed."""
        settings = self.project.settings
        changed = settings.neg_clip_loss[self.encoder].model_copy(
            update={"seed": self.seed + seed, "draws": self.draws, "batch_size": self.size}
        )
        scores = settings.scores.model_copy(update={"neg_clip_loss": {self.encoder: changed}})
        other = Project(settings.model_copy(update={"scores": scores}), self.project.config)
        return read_draws(negatives(other, self.encoder).compute().table)


def _embedded(
    project: Project, encoder: str, frame: pl.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the embeddings of the studied rows that have the score.

    Returns:
        The positions of these rows in the frame `[n]`, ascending; their uids as records of f0 and f1 `[n]`; float16
        image and text `[n, d]`.
    """
    asset = f"embeddings/{encoder}"
    numbered = frame.with_row_index("place").filter(pl.col(f"neg_clip_loss/{encoder}").is_finite())
    shards: list[str] = []
    parts = []
    for (shard,), rows in numbered.group_by("shard", maintain_order=True):
        if project.lake.stored(asset, str(shard)) is None:
            continue
        stored = pl.DataFrame(project.lake.read(asset, str(shard), ["f0", "f1"])).with_row_index("row")
        found = rows.join(stored.unique(["f0", "f1"], keep="first"), on=["f0", "f1"], how="inner")
        parts.append(found.select("place", "f0", "f1", "row", number=pl.lit(len(shards))))
        shards.append(str(shard))
    if not shards:
        raise StudyError(f"{asset}: no studied row has embeddings. Remedy: run the project")
    chosen = pl.concat(parts).sort("place")
    image, text = gather(
        project.lake, asset, ["image", "text"], shards, chosen["number"].to_numpy(), chosen["row"].to_numpy()
    )
    uids = np.empty(len(chosen), dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = chosen["f0"].to_numpy(), chosen["f1"].to_numpy()
    return chosen["place"].to_numpy(), uids, image, text


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
