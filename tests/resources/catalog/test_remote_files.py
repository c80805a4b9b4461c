"""DuckDB reads a lake in a bucket: patterns, hidden files, small files and large ones."""

import gc
import glob
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.catalog.remote_files import COPIED, remote_files
from resources.storage.by_location import open_store
from resources.storage.stores import Store


def write(store: Store, location: str, values: list[int], folder: Path) -> None:
    pq.write_table(pa.table({"a": values}), folder / "file", compression="none", use_dictionary=False)
    store.put(location, folder / "file")


def test_files_of_a_bucket_are_found_by_patterns_and_read_whole_or_in_ranges(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/la[k]e"
    store = open_store(root)
    write(store, f"{root}/x/00.parquet", [1] * 200_000, tmp_path)
    assert store.files(f"{root}/x")[0].size > COPIED
    for number in range(1, 12):
        write(store, f"{root}/x/{number:02d}.parquet", [number + 1] * 3, tmp_path)
    write(store, f"{root}/x/.hidden.parquet", [99], tmp_path)
    with duckdb.connect() as con:
        con.register_filesystem(remote_files(root))
        read = f"FROM read_parquet('{glob.escape(root)}/x/[!.]*.parquet', filename = true)"
        assert con.sql(f"SELECT sum(a), count(DISTINCT filename) {read}").fetchall() == [(200_000 + 3 * 77, 12)]
        assert con.sql(f"SELECT DISTINCT filename {read} WHERE a = 8").fetchall() == [(f"{root}/x/07.parquet",)]
        with pytest.raises(duckdb.IOException):
            con.sql(f"FROM read_parquet('{glob.escape(root)}/no/*.parquet')")
    gc.collect()  # an unclosed file is a warning, and warnings are errors
