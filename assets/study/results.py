"""The statistics of a study as values: `figures` and `sensitivity` compute them, the page shows them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from core.errors import UserError

FAULTS = "all faults"
BEST = 0.3  # share of the rows whose overlap is reported for each setting
CHANCE = 0.5  # AUC of a score that knows nothing
CONFIGURED = "as configured"
SEED = 0
POOL = "the pool"
SIMILAR = 0.95  # cosine from which two images are near duplicates
TARGET_OVERLAP = 0.98  # share of a full selection that a cascade should keep
SAMPLE = 2_048  # rows of a set that are compared with all others


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
class SetMeasures:
    """Measures of a recipe's newest version, or of the whole pool, by the concepts of one encoder.

    Attributes:
        recipe: The recipe; `POOL` for the pool.
        encoder: The encoder.
        rows: Number of rows.
        divergence: KL(p ‖ q) in nats of each target set's distribution from that of the rows, by target.
        effective_concepts: Number of equally frequent concepts that would have the same entropy.
        near_duplicates: Share of rows with another row of the set at a cosine of `SIMILAR` or more; of a sample of
            `SAMPLE` rows.
    """

    recipe: str
    encoder: str
    rows: int
    divergence: dict[str, float]
    effective_concepts: float
    near_duplicates: float


@dataclass(frozen=True)
class Cascade:
    """A selection by an encoder that embeds a subset, compared with that from all rows.

    Attributes:
        full: Recipe of the selection from all rows.
        cascade: Recipe of the cascade.
        rows: Number of rows of the full selection.
        overlap: Share of them that the cascade also keeps.
        embedded: Share of the pool's rows that each encoder with `of` embeds.
        cheap: The score whose top rows those are; None if the subset is selected otherwise.
        within: Share of the full selection within the top by the cheap score, by the share of the pool that the top is.
            A cascade over that top can't keep more. Empty without a cheap score.
        needed: Smallest top that has `TARGET_OVERLAP` of the full selection, as a share of the pool.
    """

    full: str
    cascade: str
    rows: int
    overlap: float
    embedded: dict[str, float]
    cheap: str | None
    within: dict[float, float]
    needed: float | None


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
        sets: Measures of the pool and of each recipe's newest version as sets, by each encoder with sparse features.
        cascades: One for each pair of recipes that the study was asked for.
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
    sets: list[SetMeasures] = field(default_factory=list)
    cascades: list[Cascade] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all statistics as JSON values, rounded to six places; NaN is null."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


@dataclass(frozen=True)
class Group:
    """Two groups of rows to compare.

    Attributes:
        name: The fault, a variant of it, or a property of the truth.
        within: The fault of which this is a variant.
        wanted: True for a property, False for a fault.
        better: Which of the studied rows should score higher, bool `[n]`.
        worse: Which should score lower, bool `[n]`.
    """

    name: str
    within: str | None
    wanted: bool
    better: np.ndarray
    worse: np.ndarray


def interval(value: float, drawn: np.ndarray) -> Interval:
    """Return a statistic with its percentile interval over the resamples `[r]`, of which some may be NaN."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return Interval(float(value), float(low), float(high))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
