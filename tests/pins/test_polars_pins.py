"""Exchange between Polars 2, DuckDB 2 and Arrow that this project needs."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from resources.lake.files import Lake, Provenance, vectors_to_column

LARGE = 2**64 - 1


def test_unsigned_words_survive_the_way_from_duckdb_and_arrow() -> None:
    with duckdb.connect() as con:
        found = con.sql(f"SELECT {LARGE}::UBIGINT AS f0").pl()
    assert found.schema == {"f0": pl.UInt64}
    assert found["f0"].to_list() == [LARGE]
    assert pl.from_arrow(pa.table({"f0": pa.array([LARGE], pa.uint64())}))["f0"].to_list() == [LARGE]


def test_a_connections_result_has_no_pl_but_a_relation_has() -> None:
    with duckdb.connect() as con:
        started = con.execute("SELECT 1")
        assert not hasattr(started, "pl")
        started.fetchall()
        assert con.sql("SELECT 1 AS one").pl()["one"].to_list() == [1]


def test_a_file_of_the_lake_reads_in_polars_as_it_was_written(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    vectors = np.arange(6, dtype=np.float16).reshape(2, 3)
    scores = pa.table({"uid": ["a", "b"], "clip_score": pa.array([0.25, -0.5], pa.float32())})
    lake.write(scores, Provenance("clip_score/b32", "00000", "1"))
    lake.write(pa.table({"image": vectors_to_column(vectors)}), Provenance("embeddings/b32", "00000", "1"))
    found = pl.read_parquet(lake.path("clip_score/b32", "00000"))
    assert found.rows() == [("a", 0.25), ("b", -0.5)]
    assert found.schema["clip_score"] == pl.Float32
    images = pl.from_arrow(lake.read("embeddings/b32", "00000"))["image"]
    np.testing.assert_array_equal(np.array(images.to_list(), np.float16), vectors)
