"""Selecting a set whose concepts are distributed as a target's (SDM)."""

from itertools import combinations
from math import e

import numpy as np
import pytest

from selection.recipes.distribution import (
    QUALITY_WEIGHTS,
    Features,
    concept_distribution,
    effective_concepts,
    kl_divergence,
    last_gains,
    match_distribution,
    objective,
)

CONCEPTS = 24


def _pool(rows, k=4, seed=0, concepts=CONCEPTS):
    """Return features, a target, quality bins and uids; common concepts of the pool are rare in the target."""
    random = np.random.default_rng(seed)
    common = 1 / np.arange(1, concepts + 1)
    drawn = common / common.sum()
    index = np.stack([random.choice(concepts, k, replace=False, p=drawn) for _ in range(rows)])
    features = Features(index, random.random((rows, k)).astype(np.float16))
    target = drawn[::-1].copy()
    uids = random.integers(0, 1 << 63, (2, rows)).astype(np.uint64)
    return features, target, random.integers(0, 3, rows), *uids


def _objective(features, target, quality, rows, trade_off):
    """Compute F from a dense matrix, term by term."""
    dense = np.zeros((len(features.index), len(target)))
    for row, (index, value) in enumerate(zip(features.index, features.value, strict=True)):
        for i, z in zip(index, value, strict=True):
            dense[row, i] += float(z)
    concepts = sum(p * np.log(1 + dense[list(rows), i].sum()) for i, p in enumerate(target))
    bins = sum(u * np.log(1 + sum(quality[j] == level for j in rows)) for level, u in enumerate(QUALITY_WEIGHTS))
    return trade_off * concepts + (1 - trade_off) * bins


@pytest.mark.parametrize("trade_off", [0.0, 0.5, 1.0])
def test_each_gain_is_the_difference_of_the_objective(trade_off):
    features, target, quality, f0, f1 = _pool(60)
    found = match_distribution(features, target, quality, f0, f1, count=20, trade_off=trade_off)
    values = [_objective(features, target, quality, found.rows[:taken], trade_off) for taken in range(21)]
    assert np.allclose(np.diff(values), found.gain, rtol=1e-9, atol=1e-12)
    assert objective(features, target, quality, found.rows, trade_off=trade_off) == pytest.approx(values[-1])
    assert (found.gain >= 0).all()
    assert len(set(found.rows.tolist())) == 20
    assert np.allclose(found.mass, features.mass(CONCEPTS, found.rows))
    last = last_gains(features, target, quality, found, trade_off=trade_off)
    for row in set(range(60)) - set(found.rows.tolist()):
        added = _objective(features, target, quality, [*found.rows, row], trade_off) - values[-1]
        assert last[row] == pytest.approx(added, abs=1e-12)


def test_the_reasons_are_the_concepts_that_added_most():
    features, target, quality, f0, f1 = _pool(30)
    found = match_distribution(features, target, quality, f0, f1, count=1, trade_off=1.0)
    (row,) = found.rows
    parts = dict(
        zip(features.index[row].tolist(), target[features.index[row]] * np.log1p(features.value[row]), strict=True)
    )
    expected = sorted(parts, key=parts.get, reverse=True)[:3]
    assert found.concepts.tolist() == [expected]
    assert found.parts[0] == pytest.approx([parts[concept] for concept in expected], rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_gains_of_one_row_never_rise_as_the_set_grows(seed):
    features, target, quality, f0, f1 = _pool(40, seed=seed)
    found = match_distribution(features, target, quality, f0, f1, count=20, seed=seed)
    for row in sorted(set(range(40)) - set(found.rows.tolist())):
        sets = [found.rows[:taken].tolist() for taken in range(21)]
        gains = [
            _objective(features, target, quality, [*some, row], 0.5) - _objective(features, target, quality, some, 0.5)
            for some in sets
        ]
        assert (np.diff(gains) <= 1e-12).all()


@pytest.mark.parametrize("seed", range(6))
def test_exact_greedy_reaches_its_bound_of_the_optimum(seed):
    features, target, quality, f0, f1 = _pool(12, seed=seed)
    found = match_distribution(features, target, quality, f0, f1, count=4, epsilon=1e-6)
    best = max(objective(features, target, quality, rows, trade_off=0.5) for rows in combinations(range(12), 4))
    reached = objective(features, target, quality, found.rows, trade_off=0.5)
    assert (1 - 1 / e) * best <= reached <= best + 1e-12
    assert (np.diff(found.gain) <= 1e-12).all(), "each step had all rows as candidates"


def test_stochastic_greedy_comes_close_to_exact_greedy():
    features, target, quality, f0, f1 = _pool(600)
    few, all_ = (
        objective(
            features,
            target,
            quality,
            match_distribution(features, target, quality, f0, f1, count=100, epsilon=epsilon).rows,
            trade_off=0.5,
        )
        for epsilon in (0.1, 1e-60)
    )
    assert 0.97 * all_ <= few <= all_ * (1 + 1e-9)


def test_the_set_is_distributed_more_like_the_target_than_a_random_one():
    features, target, quality, f0, f1 = _pool(2_000)
    found = match_distribution(features, target, quality, f0, f1, count=200, trade_off=1.0)
    random = np.random.default_rng(1).choice(2_000, 200, replace=False)
    assert kl_divergence(target, found.mass) < 0.8 * kl_divergence(target, features.mass(CONCEPTS, random))


def test_the_selected_uids_do_not_depend_on_the_order_of_rows():
    features, target, quality, f0, f1 = _pool(300)
    found = match_distribution(features, target, quality, f0, f1, count=50, seed=3)
    order = np.random.default_rng(2).permutation(300)
    shuffled = match_distribution(
        Features(features.index[order], features.value[order]),
        target,
        quality[order],
        f0[order],
        f1[order],
        count=50,
        seed=3,
    )
    assert (order[shuffled.rows] == found.rows).all()
    assert (shuffled.gain == found.gain).all()
    other = match_distribution(features, target, quality, f0, f1, count=50, seed=4)
    assert set(other.rows) != set(found.rows)


def test_the_smaller_uid_wins_ties():
    features = Features(np.zeros((8, 1), int), np.ones((8, 1), np.float16))
    f0 = np.array([5, 3, 7, 1, 0, 2, 6, 4], np.uint64)
    found = match_distribution(features, np.ones(1), np.full(8, 2), f0, np.zeros(8, np.uint64), count=8, epsilon=1e-9)
    assert f0[found.rows].tolist() == list(range(8))


def test_an_entry_of_zero_has_no_effect_on_the_concept_that_it_repeats():
    features = Features(np.array([[1, 1], [1, 0], [0, 1]]), np.array([[0.5, 0], [0.25, 0], [1, 0.5]], np.float16))
    quality, uids = np.zeros(3, int), np.arange(3, dtype=np.uint64)
    found = match_distribution(features, np.array([0.5, 0.5]), quality, uids, uids, count=3, epsilon=1e-9)
    assert found.gain.sum() == pytest.approx(_objective(features, np.array([0.5, 0.5]), quality, [0, 1, 2], 0.5))


def test_the_distribution_of_a_target_sums_the_features():
    features = Features(np.array([[0, 2], [2, 1]]), np.array([[1, 2], [4, 1]], np.float16))
    assert concept_distribution(features, 4).tolist() == [1 / 8, 1 / 8, 6 / 8, 0]
    mass = features.mass(4, np.array([1]))
    assert mass.tolist() == [0, 1, 4, 0]
    expected = 0.5 * np.log(0.5 / (4.25 / 6)) + 0.5 * np.log(0.5 / (0.25 / 6))
    assert kl_divergence(np.array([0, 0, 0.5, 0.5]), mass) == pytest.approx(expected)
    assert effective_concepts(np.array([2.0, 0, 2, 0])) == pytest.approx(2)
    with pytest.raises(ValueError, match="no row of the target has a concept"):
        concept_distribution(Features(features.index, np.zeros((2, 2), np.float16)), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is from 1 to the 30 rows, not 0"),
        ({"count": 31}, "count is from 1 to the 30 rows, not 31"),
        ({"epsilon": 1.0}, "epsilon between 0 and 1"),
        ({"trade_off": 1.5}, "trade_off is from 0 to 1"),
        ({"trade_off": float("nan")}, "trade_off is from 0 to 1"),
        ({"target": np.zeros(CONCEPTS)}, "one above it"),
        ({"target": np.ones(3)}, "index holds concepts from 0 to 2"),
        ({"quality": np.full(30, 3)}, "quality is from 0 to 2, not 3 to 3"),
        ({"quality": np.zeros(29, int)}, "have one length"),
        ({"features": Features(np.zeros((30, 2), int), np.ones((30, 2)))}, "repeats one"),
        ({"features": Features(np.zeros((30, 1), int), np.full((30, 1), np.nan))}, "finite and not negative"),
        ({"features": Features(np.zeros((30, 1), int), np.full((30, 1), -1.0))}, "finite and not negative"),
        ({"features": Features(np.zeros((30, 1), int), np.ones((30, 2)))}, "one shape"),
    ],
)
def test_an_argument_out_of_range_is_refused(change, message):
    names = ("features", "target", "quality", "f0", "f1")
    arguments = dict(zip(names, _pool(30), strict=True)) | {"count": 5} | change
    with pytest.raises(ValueError, match=message):
        match_distribution(**arguments)
