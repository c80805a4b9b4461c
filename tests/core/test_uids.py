"""Uids as text, as numbers and as DataComp's array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.uids import (
    UID_DTYPE,
    format_uids,
    parse_uids,
    subset_array,
    subset_words,
)

WORD = st.integers(0, 2**64 - 1)
PAIRS = st.lists(st.tuples(WORD, WORD), max_size=40)


def words(pairs):
    array = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@given(PAIRS)
def test_numbers_survive_the_way_through_text(pairs):
    texts = format_uids(*words(pairs))
    assert texts == [f"{f0:016x}{f1:016x}" for f0, f1 in pairs]
    f0, f1 = parse_uids(texts)
    assert f0.dtype == f1.dtype == np.uint64
    assert list(zip(f0.tolist(), f1.tolist(), strict=True)) == pairs


def test_upper_case_means_the_same_uid():
    lower = "0123456789abcdef" * 2
    assert format_uids(*parse_uids([lower.upper()])) == [lower]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "abc",
        "g" * 32,
        "0" * 31,
        "0" * 33,
        "0" * 31 + " ",
        " " * 32,
        "00 " * 10 + "00",
        "٣" * 32,
        "0" * 31 + "\0",
        "0" * 31 + "\n",
        "0x" + "0" * 30,
        "é" + "0" * 31,
    ],
)
def test_the_first_text_that_is_no_uid_is_named(bad):
    with pytest.raises(ValueError, match="position 1 is no uid: a uid is 32 hexadecimal") as error:
        parse_uids(["f" * 32, bad, "also bad"])
    assert repr(bad) in str(error.value)


def test_lengths_that_cancel_out_are_noticed():
    with pytest.raises(ValueError, match="position 0"):
        parse_uids(["0" * 31, "0" * 33])


@given(PAIRS)
def test_the_subset_array_is_sorted_and_keeps_repeats(pairs):
    pairs = pairs + pairs[:1]
    subset = subset_array(*words(pairs))
    assert subset.dtype == UID_DTYPE == np.dtype([("f0", "<u8"), ("f1", "<u8")])
    assert subset.tolist() == sorted(pairs)
    assert format_uids(*subset_words(subset)) == sorted(format_uids(*words(pairs)))


@pytest.mark.parametrize("array", [np.zeros(2, dtype=np.uint64), np.zeros((2, 2), dtype=UID_DTYPE)])
def test_an_array_of_another_kind_is_refused(array):
    with pytest.raises(ValueError, match="dtype u8,u8"):
        subset_words(array)
