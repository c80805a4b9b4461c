"""Target distribution matching (SDM, openreview cgmo3v18sx): select a set whose concepts are distributed as a target's.

NumPy only. Here: the objective F and its stochastic greedy maximisation. Not here: the sparse features themselves, and
the cut of a quality score into bins.
"""

from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from selection.scores.negatives import keyed_hash

QUALITY_WEIGHTS = (0.0, 0.01, 0.99)
"""u_l of low, middle and high quality, as published."""

REASONS = 3
"""Concepts that are kept for each selected row."""

_ROWS = 1 << 16  # checked or summed at once
_STEPS = 1 << 10  # whose candidates are drawn at once
# Draw number in the keyed hash. Draws of negatives count from 0, those of soft cap sampling from 2⁶³.
_APART = 1 << 62

Indices = NDArray[np.integer]
Values = NDArray[np.floating]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """Sparse features of n rows; arrays may be memory-mapped.

    Attributes:
        index: Concepts of a row, integers of shape [n, k] from 0 to d − 1. The concepts of a row with values above 0
            are distinct.
        value: z of these concepts, float16 or wider of shape [n, k], finite and not negative. An entry of 0 has no
            effect.
    """

    index: Indices
    value: Values

    def mass(self, concepts: int, rows: Indices | None = None) -> Floats:
        """Compute m_i of some rows, by default all, float64 [d].

        Args:
            concepts: d.
            rows: Positions.
        """
        mass = np.zeros(concepts)
        for start in range(0, len(self.index if rows is None else rows), _ROWS):
            some = slice(start, start + _ROWS) if rows is None else rows[start : start + _ROWS]
            value = self.value[some].astype(np.float64)
            mass += np.bincount(self.index[some].ravel(), value.ravel(), minlength=concepts)
        return mass


@dataclass(frozen=True)
class Matched:
    """A selection in the order in which its rows were taken.

    Attributes:
        rows: Positions of the selected rows, int64 of shape [count].
        gain: What each row added to F when it was taken, float64 of shape [count].
        concepts: The concepts that added most of it, the largest first, int32 of shape [count, min(k, 3)].
        parts: What each of these added, float64 of that shape; 0 where a row has fewer concepts.
        mass: m_i of the whole selection, float64 [d].
        counts: Its rows in each quality bin, float64 [3].
    """

    rows: NDArray[np.int64]
    gain: Floats
    concepts: NDArray[np.int32]
    parts: Floats
    mass: Floats
    counts: Floats


def concept_distribution(features: Features, concepts: int) -> Floats:
    """Compute p_i = Σ_t z_ti / Σ_i Σ_t z_ti over all rows.

    Args:
        features: Sparse features of the target set.
        concepts: d.

    Returns:
        float64 [d]; the sum is 1.

    Raises:
        ValueError: No row has a concept, or the features are not as `Features` describes.
    """
    _check_features(features, concepts)
    mass = features.mass(concepts)
    if not mass.sum():
        raise ValueError(
            "no row of the target has a concept. Remedy: use a larger target, or train the features longer"
        )
    return mass / mass.sum()


def objective(features: Features, target: Floats, quality: Indices, rows: Indices, *, trade_off: float) -> float:
    """Compute F(A) = λ Σ_i p_i log(1 + m_i(A)) + (1 − λ) Σ_l u_l log(1 + c_l(A)) in float64.

    Args:
        features: Sparse features of n rows.
        target: p, float64 [d].
        quality: Quality bin of each row, 0 (low), 1 or 2 (high), of shape [n].
        rows: A, positions without repeats.
        trade_off: λ, from 0 to 1.

    Returns:
        F, where m_i sums the features of concept i over A, and c_l counts the rows of A in bin l.
    """
    rows = np.asarray(rows, np.int64)
    counts = np.bincount(quality[rows], minlength=len(QUALITY_WEIGHTS))
    concepts = float(target @ np.log1p(features.mass(len(target), rows)))
    return trade_off * concepts + (1 - trade_off) * float(np.asarray(QUALITY_WEIGHTS) @ np.log1p(counts))


def kl_divergence(target: Floats, mass: Floats) -> float:
    """Compute KL(p ‖ q) in nats, with q_i = (m_i + 1/d) / (Σ m + 1).

    The added mass of one row's feature, spread over all concepts, keeps a concept that the set lacks from making the
    divergence infinite.

    Args:
        target: p, float64 [d].
        mass: m_i of a set, float64 [d].
    """
    smoothed = (mass + 1 / len(mass)) / (mass.sum() + 1)
    present = target > 0
    return float(target[present] @ (np.log(target[present]) - np.log(smoothed[present])))


def effective_concepts(mass: Floats) -> float:
    """Compute exp(H) of the distribution m / Σ m: the number of equally frequent concepts with the same entropy."""
    share = mass[mass > 0] / mass.sum()
    return float(np.exp(-(share @ np.log(share))))


def match_distribution(
    features: Features,
    target: Floats,
    quality: Indices,
    f0: NDArray[np.uint64],
    f1: NDArray[np.uint64],
    *,
    count: int,
    trade_off: float = 0.5,
    epsilon: float = 0.1,
    seed: int = 0,
) -> Matched:
    """Select `count` rows by stochastic greedy maximisation of F, `objective`.

    Each step takes the candidate with the largest gain; the smaller uid wins ties. Candidates are
    r = ⌈(n / count) ln(1 / ε)⌉ draws from the rows that are left, or all of them if they are no more than r. Draws are
    a keyed hash of (seed, step, number of the draw) into the rows in the order of their uids, so the selected uids do
    not depend on the order of rows. The expected F is at least 1 − 1/e − ε of the optimum.

    Memory beyond the features: d + 3 counters, 8 bytes per row, and 44 per selected row.

    Args:
        features: Sparse features of n rows.
        target: p, float64 [d], finite and not negative.
        quality: Quality bin of each row, 0 (low), 1 or 2 (high), of shape [n].
        f0: First halves of the uids, uint64 of shape [n].
        f1: Second halves.
        count: Rows to select, from 1 to n.
        trade_off: λ, from 0 (quality alone) to 1 (concepts alone).
        epsilon: ε, above 0 and below 1.
        seed: Any integer.

    Returns:
        The selected rows in order, with their gains.

    Raises:
        ValueError: An argument is out of its range, or shapes differ.
    """
    n = len(f0)
    _check_features(features, len(target))
    _check_arguments(features, target, quality, f0, f1, count=count, trade_off=trade_off, epsilon=epsilon)
    draws = ceil(n / count * log(1 / epsilon))
    small = np.uint32 if n <= 1 << 32 else np.uint64
    by_uid = np.lexsort((f1, f0)).astype(small)
    left = np.arange(n, dtype=small)  # ranks by uid; the first n − step are not selected yet
    state = _Counters(target, trade_off)
    rows, gains = np.empty(count, np.int64), np.empty(count)
    shown = min(REASONS, features.index.shape[1])
    concepts, parts = np.empty((count, shown), np.int32), np.empty((count, shown))
    for step in range(count):
        if step % _STEPS == 0:
            hashes = _hashes(seed, step, min(_STEPS, count - step), draws)
        remaining = n - step
        at = np.arange(remaining) if remaining <= draws else (hashes[step % _STEPS] % np.uint64(remaining)).astype(int)
        ranks = left[at]
        candidates = by_uid[ranks]
        index, value = features.index[candidates], features.value[candidates].astype(np.float64)
        by_concept = state.by_concept(index, value)
        gain = by_concept.sum(axis=1) + state.by_bin[quality[candidates]]
        best = np.flatnonzero(gain == gain.max())
        chosen = best[np.argmin(ranks[best])]
        rows[step], gains[step] = candidates[chosen], gain[chosen]
        most = np.argsort(-by_concept[chosen], kind="stable")[:shown]
        concepts[step], parts[step] = index[chosen][most], by_concept[chosen][most]
        state.add(index[chosen], value[chosen], quality[candidates[chosen]])
        left[at[chosen]] = left[remaining - 1]
    return Matched(rows, gains, concepts, parts, state.mass, state.counts)


def last_gains(features: Features, target: Floats, quality: Indices, found: Matched, *, trade_off: float) -> Floats:
    """Compute what each row would add to F after the whole selection, float64 [n]; arguments as `match_distribution`.

    The value of a selected row is what a copy of it would add.
    """
    state = _Counters(target, trade_off, found.mass, found.counts)
    gain = state.by_bin[quality]
    for start in range(0, len(gain), _ROWS):
        part = slice(start, start + _ROWS)
        value = features.value[part].astype(np.float64)
        gain[part] += state.by_concept(features.index[part], value).sum(axis=1)
    return gain


class _Counters:
    """m_i and c_l of the rows selected so far, and the gains that follow from them."""

    def __init__(
        self, target: Floats, trade_off: float, mass: Floats | None = None, counts: Floats | None = None
    ) -> None:
        self.mass = np.zeros(len(target)) if mass is None else mass
        self.counts = np.zeros(len(QUALITY_WEIGHTS)) if counts is None else counts
        self._target = target * trade_off
        self._weights = np.asarray(QUALITY_WEIGHTS) * (1 - trade_off)

    def by_concept(self, index: Indices, value: Floats) -> Floats:
        """Return λ p_i [log(1 + m_i + z_i) − log(1 + m_i)] of each entry, without the cancellation of a difference."""
        gain: Floats = self._target[index] * np.log1p(value / (1 + self.mass[index]))
        return gain

    @property
    def by_bin(self) -> Floats:
        """(1 − λ) u_l [log(2 + c_l) − log(1 + c_l)] of each bin."""
        gain: Floats = self._weights * np.log1p(1 / (1 + self.counts))
        return gain

    def add(self, index: Indices, value: Floats, quality: int) -> None:
        """Count a row."""
        active = value > 0  # an entry of 0 may repeat another's concept
        self.mass[index[active]] += value[active]
        self.counts[quality] += 1


def _hashes(seed: int, first: int, steps: int, draws: int) -> NDArray[np.uint64]:
    """Return the keyed hashes of the candidates of some steps, uint64 [steps, draws]."""
    step = np.repeat(np.arange(first, first + steps, dtype=np.uint64), draws)
    draw = np.tile(np.arange(draws, dtype=np.uint64), steps)
    return keyed_hash(seed, _APART, step, draw).reshape(steps, draws)


def _check_features(features: Features, concepts: int) -> None:
    if features.index.ndim != 2 or features.index.shape != features.value.shape:
        raise ValueError(
            f"index and value have one shape [n, k], not {features.index.shape} and {features.value.shape}"
        )
    for start in range(0, len(features.index), _ROWS):
        index, value = features.index[start : start + _ROWS], features.value[start : start + _ROWS]
        if index.size and (index.min() < 0 or index.max() >= concepts):
            raise ValueError(f"index holds concepts from 0 to {concepts - 1}; rows from {start} hold others")
        if not (np.isfinite(value).all() and (value >= 0).all()):
            raise ValueError(f"value is finite and not negative; rows from {start} hold other values")
        # Entries of 0 become distinct numbers below 0, so that only concepts with values can repeat.
        named = np.sort(np.where(value > 0, index.astype(np.int64), -1 - np.arange(index.shape[1])), axis=1)
        if (named[:, 1:] == named[:, :-1]).any():
            raise ValueError(f"the concepts of a row are distinct; a row from {start} repeats one")


def _check_arguments(
    features: Features,
    target: Floats,
    quality: Indices,
    f0: NDArray[np.uint64],
    f1: NDArray[np.uint64],
    *,
    count: int,
    trade_off: float,
    epsilon: float,
) -> None:
    n = len(f0)
    if not (len(features.index) == len(f1) == n and quality.shape == (n,)):
        raise ValueError(
            f"features, quality, f0 and f1 have one length, not {len(features.index)}, {len(quality)}, {n}, {len(f1)}"
        )
    if not (target.ndim == 1 and np.isfinite(target).all() and (target >= 0).all() and target.any()):
        raise ValueError("target is a vector of finite numbers, none below 0 and one above it")
    if not 1 <= count <= n:
        raise ValueError(f"count is from 1 to the {n} rows, not {count}")
    if quality.min() < 0 or quality.max() >= len(QUALITY_WEIGHTS):
        raise ValueError(f"quality is from 0 to {len(QUALITY_WEIGHTS) - 1}, not {quality.min()} to {quality.max()}")
    if not 0 <= trade_off <= 1 or not 0 < epsilon < 1:
        raise ValueError(f"trade_off is from 0 to 1 and epsilon between 0 and 1, not {trade_off} and {epsilon}")
