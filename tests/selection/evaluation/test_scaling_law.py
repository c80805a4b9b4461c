"""How much to keep: the law of data filtering and the fraction that it recommends."""

import itertools
import math

import numpy as np
import pytest

from selection.evaluation.scaling_law import Law, best_fraction, fit, repeated_log

POOL = 8000.0
FRACTIONS = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
# Little data is better but wears out: the best fraction rises with the budget, as in the paper.
LAW = Law(scale=2.0, utility=0.12, slope=-0.015, half_life=4.0, floor=0.1, residual=0.0)
BUDGETS = (4_000.0, 64_000.0)


def runs(noise: float, seeds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    fraction, seen = np.repeat(FRACTIONS, len(BUDGETS)), np.tile(BUDGETS, len(FRACTIONS))
    error = np.concatenate([LAW.error(np.array([f]), n, POOL) for f, n in zip(fraction, seen, strict=True)])
    return fraction, seen, error[:, None] + np.random.default_rng(0).normal(0, noise, (len(error), seeds))


@pytest.mark.parametrize(("samples", "seen"), [(100, 40), (100, 100), (100, 250), (7, 1000)])
def test_the_exponent_is_that_of_the_product_over_passes(samples: int, seen: int) -> None:
    tau, utility = 3.0, 0.2
    ends = [*range(samples, seen, samples), seen] if seen > samples else [seen]
    product = ends[0] ** -utility
    for k, (before, after) in enumerate(itertools.pairwise(ends), start=1):
        product *= (after / before) ** (-utility * 2 ** (-k / tau))
    found = repeated_log(np.array([float(samples)]), np.array([float(seen)]), tau)[0]
    assert math.exp(-utility * found) == pytest.approx(product)


def test_the_law_is_found_in_errors_without_noise() -> None:
    fraction, seen, errors = runs(noise=0)
    law = fit(fraction, seen, errors.T[:1], pool=POOL)[0]
    assert law is not None
    assert law.residual < 1e-3
    for at in (4_000.0, 32_000.0, 64_000.0):
        assert law.error(FRACTIONS, at, POOL) == pytest.approx(LAW.error(FRACTIONS, at, POOL), abs=2e-3)


def test_the_best_fraction_is_found_and_rises_with_the_budget() -> None:
    fraction, seen, errors = runs(noise=0.0003)
    grid = np.geomspace(FRACTIONS[0], FRACTIONS[-1], 101)
    found = []
    for at in (4_000.0, 64_000.0):
        best = best_fraction(fraction, seen, errors, pool=POOL, at=at)
        true = grid[LAW.error(grid, at, POOL).argmin()]
        assert best.fraction is not None
        assert best.low / 1.2 <= true <= best.high * 1.2
        found.append(best.fraction)
    assert found[0] < found[1]


def test_noise_above_the_differences_determines_nothing() -> None:
    best = best_fraction(*runs(noise=0.1), pool=POOL, at=64_000)
    assert best.fraction is None
    assert best.why


@pytest.mark.parametrize(
    ("used", "seeds", "why"),
    [(FRACTIONS[:2], 3, "three fractions"), (FRACTIONS, 1, "two seeds"), (FRACTIONS, 3, "two budgets")],
)
def test_too_few_runs_determine_nothing(used: np.ndarray, seeds: int, why: str) -> None:
    fraction, seen, errors = runs(noise=0.001, seeds=seeds)
    kept = np.isin(fraction, used) & ((seen == BUDGETS[0]) | (why != "two budgets"))
    best = best_fraction(fraction[kept], seen[kept], errors[kept], pool=POOL, at=64_000)
    assert best.fraction is None
    assert why in best.why
