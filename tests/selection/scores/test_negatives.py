"""The reference negatives are a fair sample that depends on the uids, the seed and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.scores.negatives import candidates, keyed_hash, membership, merge, outside


def pool(rows, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 2**64, (2, rows), dtype=np.uint64))


def uids(draws):
    return [list(zip(draw["f0"].tolist(), draw["f1"].tolist(), strict=True)) for draw in draws]


def plain_mix(h):
    """Compute the finaliser of splitmix64 in Python integers."""
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
    return h ^ h >> 31


def plain_hash(*words):
    h = 0
    for word in words:
        h = plain_mix((h + 0x9E3779B97F4A7C15) % 2**64 ^ word)
    return h


def plain_negatives(f0, f1, draws, size, seed):
    rows = sorted(set(zip(f0.tolist(), f1.tolist(), strict=True)))
    return [sorted(rows, key=lambda uid: (plain_hash(seed, k, *uid), uid))[:size] for k in range(draws)]


def test_the_hash_is_pinned():
    f0 = np.array([0, 1, 0xFFFFFFFFFFFFFFFF, 0x0123456789ABCDEF], dtype=np.uint64)
    f1 = np.array([0, 0, 0xFFFFFFFFFFFFFFFF, 0xFEDCBA9876543210], dtype=np.uint64)
    assert [f"{h:016x}" for h in keyed_hash(0, 0, f0, f1)] == [
        "2130748aaac80268",
        "62a4ed4055d278db",
        "403b7636151c5e43",
        "8826d577201af472",
    ]
    assert [f"{h:016x}" for h in keyed_hash(-7, 3, f0, f1)] == [
        "83549eb9f7102760",
        "3cb68cff9d39d300",
        "af4504155f91efb9",
        "539d898e0c9b1d70",
    ]


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    draw=st.integers(0, 1000),
    uid=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
)
def test_the_hash_is_the_documented_chain(seed, draw, uid):
    f0, f1 = (np.array([half], dtype=np.uint64) for half in uid)
    assert keyed_hash(seed, draw, f0, f1)[0] == plain_hash(seed % 2**64, draw, *uid)


def test_every_bit_of_seed_draw_and_uid_flips_half_of_the_hash():
    f0, f1 = pool(2000)
    base = keyed_hash(5, 2, f0, f1)

    def flipped(other):
        return np.bitwise_count(base ^ other).mean() / 64

    for bit in range(64):
        one = np.uint64(1 << bit)
        assert abs(flipped(keyed_hash(5, 2, f0 ^ one, f1)) - 0.5) < 0.02
        assert abs(flipped(keyed_hash(5, 2, f0, f1 ^ one)) - 0.5) < 0.02
        assert abs(flipped(keyed_hash(5 ^ (1 << bit), 2, f0, f1)) - 0.5) < 0.02
    for draw in range(3, 20):
        assert abs(flipped(keyed_hash(5, draw, f0, f1)) - 0.5) < 0.02


def test_even_consecutive_uids_fall_into_draws_evenly():
    f0, f1 = np.zeros(4000, dtype=np.uint64), np.arange(4000, dtype=np.uint64)
    drawn = candidates(f0, f1, draws=100, size=400, seed=1)
    counts = np.bincount(drawn["row"].ravel(), minlength=4000)
    assert counts.sum() == 100 * 400
    # Each count is binomial(100, 0.1): mean 10, variance 9.
    assert abs(counts.var() - 9) < 1
    assert abs(counts[:2000].sum() - 20000) < 500


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 80),
    draws=st.integers(1, 3),
    parts=st.integers(1, 6),
    repeats=st.integers(0, 10),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_negatives_are_the_smallest_hashes_however_the_pool_is_cut(rows, size, draws, parts, repeats, seed):
    generator = np.random.default_rng(seed)
    f0, f1 = pool(rows, seed)
    repeated = generator.integers(0, rows, repeats)
    f0, f1 = np.concatenate([f0, f0[repeated]]), np.concatenate([f1, f1[repeated]])
    expected = plain_negatives(f0, f1, draws, size, seed)

    order = generator.permutation(len(f0))
    cuts = np.sort(generator.integers(0, len(f0) + 1, parts - 1))
    shards = [
        candidates(f0[part], f1[part], draws=draws, size=size, seed=seed, shard=number)
        for number, part in enumerate(np.split(order, cuts))
    ]
    assert uids(merge(shards, size)) == expected
    assert np.array_equal(merge(reversed(shards), size), merge(shards, size))
    # Workers may merge what they have, and the merges be merged.
    halves = [half for half in (shards[::2], shards[1::2]) if any(s.shape[1] for s in half)]
    assert np.array_equal(merge([merge(half, size) for half in halves], size), merge(shards, size))


def test_candidates_say_where_their_rows_are():
    f0, f1 = pool(500)
    shards = [
        candidates(f0[:200], f1[:200], draws=2, size=50, seed=9, shard=0),
        candidates(f0[200:], f1[200:], draws=2, size=50, seed=9, shard=1),
    ]
    merged = merge(shards, 50)
    place = merged["row"] + 200 * merged["shard"]
    assert np.array_equal(f0[place], merged["f0"])
    assert np.array_equal(f1[place], merged["f1"])
    assert set(merged["shard"].ravel()) == {0, 1}


def test_draws_differ_and_seeds_differ():
    f0, f1 = pool(1000)
    first = candidates(f0, f1, draws=2, size=100, seed=1)
    other = candidates(f0, f1, draws=2, size=100, seed=2)
    overlaps = [len({*a} & {*b}) for a, b in [uids(first), uids(other), (uids(first)[0], uids(other)[0])]]
    assert max(overlaps) < 30  # ten expected of independent tenths


def test_as_the_pool_grows_a_row_leaves_only_when_pushed_out():
    f0, f1 = pool(3000)
    before = merge([candidates(f0[:2000], f1[:2000], draws=3, size=100, seed=1)], 100)
    after = merge([before, candidates(f0[2000:], f1[2000:], draws=3, size=100, seed=1, shard=1)], 100)
    for old, new in zip(before, after, strict=True):
        stayed = np.isin(old["hash"], new["hash"])
        entered = ~np.isin(new["hash"], old["hash"])
        assert (new["shard"][entered] == 1).all()
        assert 0 < entered.sum() == (~stayed).sum() < 100
        assert stayed[: stayed.sum()].all(), "the rows that left are those with the largest hashes"


def test_a_pool_smaller_than_the_draw_is_drawn_whole():
    f0, f1 = pool(30)
    shards = [
        candidates(f0[:10], f1[:10], draws=2, size=100, seed=1),
        candidates(f0[10:], f1[10:], draws=2, size=100, seed=1),
    ]
    merged = merge(shards, 100)
    assert merged.shape == (2, 30)
    assert {*uids(merged)[0]} == {*zip(f0.tolist(), f1.tolist(), strict=True)}


def test_an_empty_shard_changes_nothing():
    f0, f1 = pool(30)
    full = candidates(f0, f1, draws=2, size=10, seed=1)
    empty = candidates(f0[:0], f1[:0], draws=2, size=10, seed=1)
    for shards in ([empty, full], [full, empty], [full]):
        assert np.array_equal(merge(shards, 10), full)


def test_merging_is_streamed():
    """A generator is enough, and merge reads one shard at a time."""
    f0, f1 = pool(300)

    def shards():
        for part in range(3):
            yield candidates(f0[part::3], f1[part::3], draws=1, size=20, seed=1, shard=part)

    assert uids(merge(shards(), 20)) == plain_negatives(f0, f1, 1, 20, 1)


@given(rows=st.integers(1, 40), size=st.integers(1, 20), narrow=st.booleans())
@settings(deadline=None)
def test_membership_says_which_rows_are_in_which_draw(rows, size, narrow):
    f0, f1 = pool(60)
    if narrow:  # many uids that share a half
        f0, f1 = f0 % np.uint64(4), f1 % np.uint64(30)
    draws = merge([candidates(f0, f1, draws=3, size=size, seed=1)], size)
    others = pool(5, seed=7)
    some = np.concatenate([f0[:rows], others[0]]), np.concatenate([f1[:rows], others[1]])
    inside = membership(draws, *some)
    assert inside.shape == (3, rows + 5)
    assert inside.dtype == bool
    assert inside.tolist() == [
        [uid in {*draw} for uid in zip(*(x.tolist() for x in some), strict=True)] for draw in uids(draws)
    ]


def test_outside_marks_the_drawn_rows_that_are_not_among_the_given_ones():
    f0, f1 = pool(60)
    draws = merge([candidates(f0, f1, draws=3, size=20, seed=1)], 20)
    own = {*zip(f0[:25].tolist(), f1[:25].tolist(), strict=True)}
    found = outside(draws, f0[:25], f1[:25])
    assert found.tolist() == [[uid not in own for uid in draw] for draw in uids(draws)]
    assert 0 < found.sum() < found.size
    with pytest.raises(ValueError, match="f1 must be uint64"):
        outside(draws, f0, f1.astype(float))


def test_unusable_arguments_are_refused_by_name():
    f0, f1 = pool(5)
    with pytest.raises(ValueError, match="f1 must be uint64 of shape"):
        candidates(f0, f1[:4], draws=1, size=2, seed=0)
    with pytest.raises(ValueError, match="f0 must be uint64"):
        candidates(f0.astype(np.int64), f1, draws=1, size=2, seed=0)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        candidates(f0, f1, draws=0, size=2, seed=0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        candidates(f0, f1, draws=1, size=0, seed=0)
    with pytest.raises(ValueError, match="f1 must be uint64"):
        membership(candidates(f0, f1, draws=1, size=2, seed=0), f0, f1.astype(float))


def test_no_rows_and_unlike_shards_are_refused():
    f0, f1 = pool(5)
    with pytest.raises(ValueError, match="no rows"):
        merge([], 3)
    with pytest.raises(ValueError, match="no rows"):
        merge([candidates(f0[:0], f1[:0], draws=1, size=3, seed=0)], 3)
    with pytest.raises(ValueError, match="number of draws: 1 and 2"):
        merge([candidates(f0, f1, draws=k, size=3, seed=0) for k in (1, 2)], 3)
