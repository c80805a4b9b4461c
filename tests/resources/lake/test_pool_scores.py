"""The table of rows and scores that a recipe starts from."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.lake.pool_scores import mark_sets, source_relation


@pytest.fixture
def con():
    with duckdb.connect() as connection:
        yield connection


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"f0": pa.uint64(), "f1": pa.uint64(), "score": pa.float32()}
    arrays = {name: pa.array(values, type=types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=2)
    return path


def pool(folder, shard, f0s):
    n = len(f0s)
    return shard, write(
        folder / f"raw_pool/{shard}.parquet",
        f0=f0s,
        f1=[2**64 - 1] * n,
        shard=[shard] * n,
        key=[f"{shard}-{i}" for i in range(n)],
        source_row=list(range(n)),
        width=[100 + f0 for f0 in f0s],
    )


def score(folder, asset, shard, f0s, values):
    path = folder / asset / f"{shard}.parquet"
    return write(path, shard=[shard] * len(f0s), f0=f0s, f1=[2**64 - 1] * len(f0s), score=values)


def test_rows_meet_their_scores(con, tmp_path):
    raw_pool = [pool(tmp_path, "00001", [9, 8, 7]), pool(tmp_path, "00000", [1, 2, 3, 4, 5])]
    files = {
        "00000": score(tmp_path, "s/x", "00000", [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]),
        "00001": score(tmp_path, "s/x", "00001", [9, 8, 7], [0.9, 0.8, 0.7]),
    }
    source = source_relation(con, "source", raw_pool=raw_pool, scores={"s/x": ("score", files)}, pool_columns=["width"])
    assert (source.rows, source.duplicates) == (8, 0)
    table = con.sql("SELECT * FROM source ORDER BY f0")
    assert table.columns == ["f0", "f1", "shard", "key", "width", "s/x"]
    for f0, f1, shard, key, width, value in table.fetchall():
        assert f1 == 2**64 - 1
        assert (shard, width) == ("00000" if f0 < 6 else "00001", 100 + f0)
        assert key == f"{shard}-{f0 - 1 if f0 < 6 else 9 - f0}"
        assert value == pytest.approx(f0 / 10)


@pytest.mark.parametrize("f0s", [[1, 3, 2], [1, 2], [1, 2, 3, 4], [1, 2, 7]])
def test_a_score_file_out_of_step_is_an_error_that_names_it(con, tmp_path, f0s):
    raw_pool = [pool(tmp_path, "00000", [1, 2, 3])]
    path = score(tmp_path, "s/x", "00000", f0s, [0.5] * len(f0s))
    with pytest.raises(ValueError, match="has other rows than") as error:
        source_relation(con, "source", raw_pool=raw_pool, scores={"s/x": ("score", {"00000": path})})
    assert str(error.value).startswith(str(path))
    assert "Remedy" in str(error.value)


def test_a_shard_without_a_score_is_an_error(con, tmp_path):
    with pytest.raises(ValueError, match="Shard 00000 has no file of s/x"):
        source_relation(
            con,
            "source",
            raw_pool=[pool(tmp_path, "00000", [1])],
            scores={"s/x": ("score", {})},
        )


def test_of_equal_uids_the_first_shard_and_row_stays(con, tmp_path):
    raw_pool = [pool(tmp_path, "00001", [2, 5, 1]), pool(tmp_path, "00000", [3, 2, 3])]
    source = source_relation(con, "source", raw_pool=raw_pool, scores={})
    assert (source.rows, source.duplicates) == (4, 2)
    rows = con.sql("SELECT f0, shard, key FROM source ORDER BY f0").fetchall()
    assert rows == [
        (1, "00001", "00001-2"),
        (2, "00000", "00000-1"),
        (3, "00000", "00000-0"),
        (5, "00001", "00001-1"),
    ]


def test_rows_know_the_sets_that_they_are_in(con, tmp_path):
    con.execute(f"CREATE TABLE listed AS SELECT unnest([2, 3, 8])::UBIGINT AS f0, {2**64 - 1}::UBIGINT AS f1")
    con.execute(
        "CREATE TABLE other AS SELECT unnest([2, 1])::UBIGINT AS f0, unnest([0, 18446744073709551615])::UBIGINT AS f1"
    )
    raw_pool = [pool(tmp_path, "00000", [1, 2, 3]), pool(tmp_path, "00001", [3, 1, 1])]
    source = source_relation(con, "source", raw_pool=raw_pool, scores={})
    mark_sets(con, "source", {"in a": "listed", "in b/c": "other"})
    assert (source.rows, source.duplicates) == (3, 3)
    rows = con.sql('SELECT f0, "in a", "in b/c" FROM source ORDER BY f0').fetchall()
    assert rows == [(1, False, True), (2, True, False), (3, True, False)]


def test_two_columns_of_one_file_and_a_folder_with_odd_characters(con, tmp_path):
    folder = tmp_path / "o'dd [x] *"
    path = write(folder / "s/00000.parquet", f0=[1], f1=[2**64 - 1], shard=["00000"], a=[1.0], b=[2.0])
    scores = {"a/x": ("a", {"00000": path}), "b/x": ("b", {"00000": path})}
    source_relation(con, "so urce", raw_pool=[pool(folder, "00000", [1])], scores=scores)
    assert con.sql('SELECT "a/x", "b/x" FROM "so urce"').fetchall() == [(1.0, 2.0)]


def test_a_table_made_before_is_replaced(con, tmp_path):
    for f0s in ([1, 2], [3]):
        source = source_relation(con, "source", raw_pool=[pool(tmp_path, "00000", f0s)], scores={})
        assert source.rows == len(f0s)
