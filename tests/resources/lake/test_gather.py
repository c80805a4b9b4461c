"""Rows chosen by shard and position: the right vectors in the order asked for, each shard read once."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.lake.files import Lake, LakeError, Provenance, vectors_to_column
from resources.lake.gather import gather

SIZES = {"a": 5, "b": 0, "c": 3}
ASSET = "embeddings/tiny"


def vectors(shard: str) -> np.ndarray:
    """A shard's vectors `[n, 4]`: every number names its shard, row and column."""
    start = 100 * list(SIZES).index(shard)
    return (start + np.arange(SIZES[shard] * 4).reshape(-1, 4)).astype(np.float16)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with three shards, one of them empty."""
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    for shard in SIZES:
        found = vectors(shard)
        table = pa.table({"image": vectors_to_column(found), "text": vectors_to_column(-found)})
        lake.write(table, Provenance(ASSET, shard, "1"))
    return lake


@settings(deadline=None)
@given(st.lists(st.one_of(st.tuples(st.just(0), st.integers(0, 4)), st.tuples(st.just(2), st.integers(0, 2)))))
def test_rows_come_in_the_order_asked_for_repeats_included(lake: Lake, chosen: list[tuple[int, int]]) -> None:
    numbers, rows = (np.array([pair[side] for pair in chosen], dtype=np.int64) for side in (0, 1))
    image, text = gather(lake, ASSET, ["image", "text"], list(SIZES), numbers, rows)
    wanted = [vectors(list(SIZES)[number])[row] for number, row in chosen]
    assert image.dtype == text.dtype == np.float16
    assert image.shape == (len(chosen), 4)
    np.testing.assert_array_equal(image, np.array(wanted, np.float16).reshape(-1, 4))
    np.testing.assert_array_equal(text, -image)


def test_a_shard_without_a_chosen_row_is_not_read(lake: Lake) -> None:
    (image,) = gather(lake, ASSET, ["image"], ["absent", "c"], np.array([1, 1]), np.array([2, 0]))
    np.testing.assert_array_equal(image, vectors("c")[[2, 0]])
    with pytest.raises(LakeError, match="absent"):
        gather(lake, ASSET, ["image"], ["absent", "c"], np.array([0]), np.array([0]))


def test_rows_and_shards_that_do_not_exist_are_errors(lake: Lake) -> None:
    with pytest.raises(IndexError):
        gather(lake, ASSET, ["image"], ["a"], np.array([0]), np.array([5]))
    with pytest.raises(IndexError):
        gather(lake, ASSET, ["image"], ["a"], np.array([1]), np.array([0]))
    with pytest.raises(ValueError, match="no shards"):
        gather(lake, ASSET, ["image"], [], np.array([0]), np.array([0]))
