"""Differences between arms, paired by seed, with intervals over the seeds.

NumPy only. Here: statistics of measured values. Not here: training and measuring.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "inconclusive"]
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """How an arm differs from the baseline in one measure.

    Attributes:
        mean: mean difference over the seeds.
        low: lower end of its 95 % interval; NaN with one seed.
        high: upper end.
        spread: standard deviation of the difference over the seeds; NaN with one seed.
        verdict: `inconclusive` where the interval holds 0, or the spread is as large as the mean.
    """

    mean: float
    low: float
    high: float
    spread: float
    verdict: Verdict


def paired_difference(arm: NDArray[np.float64], baseline: NDArray[np.float64]) -> Difference:
    """Compute the mean difference of two arms with Student's interval over the seeds.

    Args:
        arm: float64 [s], one value for each seed; larger is better.
        baseline: float64 [s], those of the baseline, in the same order of seeds.

    Raises:
        ValueError: the two differ in length, are empty, or a value is not finite.
    """
    differences = np.asarray(arm, np.float64) - np.asarray(baseline, np.float64)
    if np.shape(arm) != np.shape(baseline) or differences.ndim != 1 or not len(differences):
        raise ValueError(f"one value for each seed is needed, not {np.shape(arm)} and {np.shape(baseline)}")
    if not np.isfinite(differences).all():
        raise ValueError("a value is not finite")
    seeds, mean = len(differences), float(differences.mean())
    if seeds == 1:
        return Difference(mean, math.nan, math.nan, math.nan, "inconclusive")
    spread = float(differences.std(ddof=1))
    half = t_quantile((1 + LEVEL) / 2, seeds - 1) * spread / math.sqrt(seeds)
    low, high = mean - half, mean + half
    clear = abs(mean) > max(half, spread)
    verdict: Verdict = "inconclusive" if not clear else "better" if mean > 0 else "worse"
    return Difference(mean, low, high, spread, verdict)


def t_quantile(probability: float, freedom: int) -> float:
    """Compute the quantile of Student's t distribution.

    Args:
        probability: above 0.5 and below 1.
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """Return P(T ≤ t) for t ≥ 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(freedom))
    cosine, total, term = math.cos(theta), 0.0, 1.0
    if freedom % 2:
        term = cosine
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        for k in range(0, freedom, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        inside = math.sin(theta) * total
    return 0.5 + inside / 2
