"""The samples that an arm draws."""

import numpy as np

from selection.evaluation.draws import hash_order


def uids(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.integers(0, 2**64, n, np.uint64), rng.integers(0, 2**64, n, np.uint64)


def test_a_draw_does_not_depend_on_the_order_of_the_rows() -> None:
    f0, f1 = uids(500)
    copies = np.random.default_rng(0).integers(1, 4, 500)
    order = hash_order(f0, f1, copies, seed=3)
    mixed = np.random.default_rng(1).permutation(500)
    other = hash_order(f0[mixed], f1[mixed], copies[mixed], seed=3)
    assert (f0[order] == f0[mixed][other]).all()


def test_every_sample_comes_as_often_as_the_arm_has_it() -> None:
    f0, f1 = uids(100)
    copies = np.arange(100) % 4
    order = hash_order(f0, f1, copies, seed=0)
    assert np.bincount(order, minlength=100).tolist() == copies.tolist()


def test_copies_of_a_row_are_drawn_independently() -> None:
    f0, f1 = uids(2000)
    half = hash_order(f0, f1, np.full(2000, 2), seed=0)[:2000]
    drawn = np.bincount(half, minlength=2000)
    assert abs((drawn == 2).mean() - 0.25) < 0.03


def test_a_draw_from_part_of_the_rows_keeps_the_order_of_the_whole() -> None:
    f0, f1 = uids(300)
    ones = np.ones(300, np.int64)
    order = hash_order(f0, f1, ones, seed=9)
    part = hash_order(f0[:100], f1[:100], ones[:100], seed=9)
    assert part.tolist() == [row for row in order.tolist() if row < 100]


def test_seeds_draw_differently_and_uniformly() -> None:
    f0, f1 = uids(400)
    first = np.zeros(400)
    for seed in range(200):
        first[hash_order(f0, f1, np.ones(400, np.int64), seed=seed)[:100]] += 1
    # each row is drawn with probability 1/4: 50 of 200 times, with a deviation of 6.1
    assert abs(first.mean() - 50) < 1e-9
    assert 4.5 < first.std() < 7.8
