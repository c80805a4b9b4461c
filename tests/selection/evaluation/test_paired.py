"""Paired differences and their intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection.evaluation.paired import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_the_quantiles_are_those_of_the_published_table(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    arm, baseline = np.array([0.61, 0.66, 0.58]), np.array([0.50, 0.56, 0.49])
    found = paired_difference(arm, baseline)
    # differences 0.11, 0.10, 0.09: mean 0.10, deviation 0.01; 4.30265 · 0.01 / √3 = 0.024841
    assert found.mean == pytest.approx(0.10)
    assert (found.low, found.high) == (pytest.approx(0.075159, abs=1e-5), pytest.approx(0.124841, abs=1e-5))
    assert found.verdict == "better"


def test_pairing_removes_what_the_seeds_share() -> None:
    shared = np.array([0.1, 0.3, 0.5])
    assert paired_difference(shared + np.array([0.02, 0.021, 0.019]), shared).verdict == "better"
    assert paired_difference(shared, shared + np.array([0.02, 0.021, 0.019])).verdict == "worse"


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_a_spread_above_the_difference_is_inconclusive(differences: list[float]) -> None:
    found = paired_difference(np.array(differences), np.zeros(len(differences)))
    if found.spread >= abs(found.mean) or found.low <= 0 <= found.high:
        assert found.verdict == "inconclusive"


def test_many_seeds_do_not_make_a_difference_below_its_spread_conclusive() -> None:
    noise = np.random.default_rng(0).normal(0.5, 1, 400)
    found = paired_difference(noise, np.zeros(400))
    assert found.low > 0
    assert found.verdict == "inconclusive"


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        found = paired_difference(rng.normal(0.3, 1, 3), np.zeros(3))
        held += found.low <= 0.3 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_one_seed_has_no_interval() -> None:
    found = paired_difference(np.array([0.9]), np.array([0.1]))
    assert math.isnan(found.low)
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize("arm", [[], [0.1, 0.2], [math.nan]])
def test_values_that_cannot_be_paired_are_refused(arm: list[float]) -> None:
    with pytest.raises(ValueError, match=r"seed|finite"):
        paired_difference(np.array(arm), np.array([0.1]))
