"""Statistics that compare scores: AUC for known faults with its bootstrap, rank correlation, overlap of the best rows.

NumPy only. Here: statistics of score columns. Not here: the sources of scores and labels, and pages that show them.
NaN marks a row without the score.
"""

import math

import numpy as np
from numpy.typing import NDArray

_CELLS = 4_000_000  # counts of resampled rows in memory


def auc(better: NDArray[np.floating], worse: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the exact probability that a row of `better` scores above a row of `worse`; ties count half.

    It is the Mann–Whitney U statistic divided by the number of pairs (Mann and Whitney 1947).

    Args:
        better: [n, s], s scores of the rows to keep.
        worse: [m, s], the same scores of the rows to drop.

    Returns:
        float64 [s]; NaN where one side has no row with the score.

    Raises:
        ValueError: the two differ in their number of scores.
    """
    _check_sides(better, worse)
    everyone = [np.ones((1, len(side)), np.int64) for side in (better, worse)]
    return np.array([_weighted(better[:, s], worse[:, s], *everyone)[0] for s in range(better.shape[1])])


def bootstrap_auc(
    better: NDArray[np.floating], worse: NDArray[np.floating], *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Compute `auc` of resamples with replacement, drawn from each side separately.

    All scores of a resample use the same rows, so differences between columns are paired.

    Args:
        better: [n, s], as in `auc`.
        worse: [m, s], as in `auc`.
        resamples: number of resamples R.
        seed: seed of the resampling.

    Returns:
        float64 [R, s]; NaN where one side of a resample has no row with the score.

    Raises:
        ValueError: as in `auc`, or a side has no rows.
    """
    _check_sides(better, worse)
    if not len(better) or not len(worse):
        raise ValueError(f"a bootstrap needs rows on both sides, not {len(better)} and {len(worse)}")
    found = np.empty((resamples, better.shape[1]))
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // (len(better) + len(worse)))
    for start in range(0, resamples, step):
        at = slice(start, min(start + step, resamples))
        counts = [_resampled(generator, at.stop - at.start, len(side)) for side in (better, worse)]
        for s in range(better.shape[1]):
            found[at, s] = _weighted(better[:, s], worse[:, s], *counts)
    return found


def spearman(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute Spearman's rank correlation of every two scores, over the rows that have both; ties get their mean rank.

    Args:
        values: [n, s].

    Returns:
        float64 [s, s]; NaN where fewer than two rows have both scores, or one score is constant on them.
    """
    count = values.shape[1]
    found = np.full((count, count), math.nan)
    have = ~np.isnan(values)
    for i in range(count):
        for j in range(i + 1):
            both = have[:, i] & have[:, j]
            ranks = [_ranks(values[both, column]) for column in (i, j)]
            spread = [r - r.mean() for r in ranks] if both.any() else []
            scale = math.sqrt(math.prod(float(d @ d) for d in spread)) if spread else 0.0
            if scale > 0:
                found[i, j] = found[j, i] = float(spread[0] @ spread[1]) / scale
    return found


def best_overlap(a: NDArray[np.floating], b: NDArray[np.floating], fraction: float) -> float:
    """Return the share of the best rows by `a` that are among the best by `b`; both [n], without NaN.

    The best are the top floor(n·fraction) rows; of equal scores the earlier row is better.

    Raises:
        ValueError: floor(n·fraction) is 0.
    """
    size = math.floor(len(a) * fraction)
    if not size:
        raise ValueError(f"{fraction} of {len(a)} rows is no row")
    first, second = (set(np.argsort(-values, kind="stable")[:size].tolist()) for values in (a, b))
    return len(first & second) / size


def _weighted(
    better: NDArray[np.floating],
    worse: NDArray[np.floating],
    better_counts: NDArray[np.int64],
    worse_counts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Compute the AUC of one score, [R], with every row counted as often as counts [R, n] and [R, m] state."""
    has = ~np.isnan(better)
    order = np.argsort(worse, kind="stable")[: np.count_nonzero(~np.isnan(worse))]  # NaN sorts last
    below, through = (np.searchsorted(worse[order], better[has], side) for side in ("left", "right"))
    first = better_counts[:, has]
    cumulated = np.zeros((len(worse_counts), len(order) + 1), np.int64)
    np.cumsum(worse_counts[:, order], axis=1, out=cumulated[:, 1:])
    # A pair counts 2 if `better` is above, 1 if equal: integers stay exact.
    twice = (first * (cumulated[:, below] + cumulated[:, through])).sum(1)
    pairs = (first.sum(1) * cumulated[:, -1]).astype(float)
    return np.divide(twice, 2 * pairs, out=np.full(len(pairs), math.nan), where=pairs > 0)


def _resampled(generator: np.random.Generator, resamples: int, rows: int) -> NDArray[np.int64]:
    """Return how often each row occurs in R resamples of `rows` draws with replacement: [R, rows]."""
    drawn = generator.integers(0, rows, (resamples, rows)) + np.arange(resamples)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows)


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _check_sides(better: NDArray[np.floating], worse: NDArray[np.floating]) -> None:
    if better.ndim != 2 or worse.ndim != 2 or better.shape[1] != worse.shape[1]:
        raise ValueError(f"better and worse must be [n, s] and [m, s], not {list(better.shape)}, {list(worse.shape)}")
