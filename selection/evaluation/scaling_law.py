"""How much to keep: the scaling law of data filtering (Goyal et al., CVPR 2024, arXiv 2404.07177).

NumPy only. Here: fitting the law and its best fraction. Not here: the runs.

An arm that keeps a fraction f of the pool has N = f · pool samples. Its error after n samples seen is

    y(f, n) = a · n_1^(−b(f)) · Π_{k≥2} (n_k / n_{k−1})^(−b(f) · δ^(k−1)) + d,      δ = 2^(−1/τ)

with n_k = min(k · N, n), the samples seen at the end of pass k. b is the utility of the data, which falls by half in τ
passes because repeated samples teach less. a and d, the scale and the error that no data removes, are the same for all
fractions, as in the paper. The paper fits one b for each pool; here b(f) = b_0 + b_1 · log f, so that fractions between
those trained can be compared.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALF_LIVES = np.geomspace(0.5, 64, 22)
"""Values of τ that are tried, in passes."""
FLOORS = np.linspace(0, 0.95, 20)
"""Values of d that are tried, as a part of the lowest error."""
DRAWS = 100
PARAMETERS = 5
WIDEST = 0.5
"""Part of the trained range, in log f, above which an interval of the best fraction determines nothing."""


@dataclass(frozen=True)
class Law:
    """A fitted law: its parameters, and the root mean square of its residuals in log(y − d)."""

    scale: float
    utility: float
    slope: float
    half_life: float
    floor: float
    residual: float

    def error(self, fraction: NDArray[np.float64], seen: float, pool: float) -> NDArray[np.float64]:
        """Compute y for fractions [m] after `seen` samples of a pool of `pool` rows."""
        passes = repeated_log(fraction * pool, np.full(len(fraction), seen), self.half_life)
        exponent = (self.utility + self.slope * np.log(fraction)) * passes
        found: NDArray[np.float64] = self.scale * np.exp(-exponent) + self.floor
        return found


@dataclass(frozen=True)
class BestFraction:
    """The fraction to keep for a number of samples seen.

    Attributes:
        seen: samples seen.
        fraction: the best fraction of the fitted law, within those trained; None where the runs do not determine it.
        low: lower end of its 90 % interval; NaN where there is no fit.
        high: upper end.
        why: why it is not determined; empty where it is.
    """

    seen: float
    fraction: float | None
    low: float
    high: float
    why: str = ""


def repeated_log(samples: NDArray[np.float64], seen: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    """Compute log n_1 + Σ_{k≥2} δ^(k−1) log(n_k / n_{k−1}) for arms of `samples` [m] after `seen` [m] samples."""
    decay = 2 ** (-1 / half_life)
    found = np.empty(len(samples))
    for i, (size, budget) in enumerate(zip(samples, seen, strict=True)):
        whole = min(int(budget // size), 10_000)  # later passes add nothing
        ends = np.append(np.arange(1, whole + 1) * size, budget) if whole else np.array([budget])
        gains = np.diff(np.log(ends))
        found[i] = math.log(ends[0]) + (gains * decay ** np.arange(1, len(gains) + 1)).sum()
    return found


def fit(
    fraction: NDArray[np.float64], seen: NDArray[np.float64], errors: NDArray[np.float64], *, pool: float
) -> list[Law | None]:
    """Fit the law by least squares of log(y − d), over the grids of τ and d, and keep the fit closest to y.

    For a given τ and d the law is linear in log a, b_0 and b_1.

    Args:
        fraction: float64 [m], kept by each run.
        seen: float64 [m], samples that it saw.
        errors: float64 [r, m], r sets of errors above 0, each fitted by itself.
        pool: rows of the pool.

    Returns:
        The best fit of each set; None where in every fit an error rises as more samples are seen.
    """
    sets, floors = np.arange(len(errors)), FLOORS * errors.min(axis=1, keepdims=True)
    above = errors[:, None] - floors[:, :, None]
    best: list[Law | None] = [None] * len(errors)
    lowest = np.full(len(errors), np.inf)
    for half_life in HALF_LIVES:
        passes = repeated_log(fraction * pool, seen, half_life)
        design = np.stack([np.ones(len(passes)), -passes, -np.log(fraction) * passes], axis=1)
        found = np.log(above) @ np.linalg.pinv(design).T
        left = (found @ design.T - np.log(above)) * above  # in units of y, to first order
        residual = np.sqrt((left**2).mean(axis=2))
        falls = (found[:, :, 1:2] + found[:, :, 2:3] * np.log(fraction) > 0).all(axis=2)
        residual[~falls] = np.inf
        at = residual.argmin(axis=1)
        for r in sets[residual[sets, at] < lowest]:
            log_scale, utility, slope = (float(value) for value in found[r, at[r]])
            lowest[r] = residual[r, at[r]]
            floor = float(floors[r, at[r]])
            best[r] = Law(math.exp(log_scale), utility, slope, float(half_life), floor, float(lowest[r]))
    return best


def best_fraction(
    fraction: NDArray[np.float64],
    seen: NDArray[np.float64],
    errors: NDArray[np.float64],
    *,
    pool: float,
    at: float,
    seed: int = 0,
) -> BestFraction:
    """Return the fraction with the lowest error after `at` samples seen, with its uncertainty.

    The fit is repeated with errors drawn around the measured means, by the spread over the seeds (pooled over the runs)
    and by what the law itself leaves unexplained.

    Args:
        fraction: float64 [m].
        seen: float64 [m].
        errors: float64 [m, s], one for each seed.
        pool: rows of the pool.
        at: samples seen.
        seed: seed of the draws.
    """
    lacking = _lacking(fraction, seen, errors)
    if lacking:
        return BestFraction(at, None, math.nan, math.nan, lacking)
    mean, seeds = errors.mean(axis=1), errors.shape[1]
    law = fit(fraction, seen, mean[None], pool=pool)[0]
    if law is None:
        why = "no law fits in which the error falls as more samples are seen"
        return BestFraction(at, None, math.nan, math.nan, why)
    unexplained = law.residual * math.sqrt(len(mean) / max(len(mean) - PARAMETERS, 1))
    noise = math.hypot(math.sqrt(errors.var(axis=1, ddof=1).mean() / seeds), unexplained)
    grid = np.geomspace(fraction.min(), fraction.max(), 101)
    resampled = mean + np.random.default_rng(seed).normal(0, noise, (DRAWS, len(mean)))
    fits = fit(fraction, seen, np.maximum(resampled, 1e-6), pool=pool)
    drawn = [grid[found.error(grid, at, pool).argmin()] for found in fits if found is not None]
    best = float(grid[law.error(grid, at, pool).argmin()])
    if len(drawn) < DRAWS / 2:
        return BestFraction(at, None, math.nan, math.nan, "the noise of the runs hides that the error falls")
    low, high = (float(end) for end in np.percentile(drawn, [5, 95]))
    if math.log(high / low) > WIDEST * math.log(grid[-1] / grid[0]):
        return BestFraction(at, None, low, high, "the noise of the runs allows fractions far apart")
    return BestFraction(at, best, low, high)


def _lacking(fraction: NDArray[np.float64], seen: NDArray[np.float64], errors: NDArray[np.float64]) -> str:
    if len(np.unique(fraction)) < 3:
        return "a fit needs three fractions"
    if len(np.unique(seen)) < 2:
        return "a fit needs two budgets"
    if errors.shape[1] < 2:
        return "the uncertainty needs two seeds"
    return ""
