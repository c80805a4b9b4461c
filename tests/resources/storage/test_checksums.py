"""Every byte of a sealed file is covered, and other readers of Parquet and Arrow see the same file."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.storage.checksums import BLOCK, Checked, ChecksumError, seal

TABLE = pa.table({"x": np.random.default_rng(0).standard_normal(30_000)})  # four blocks


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(TABLE, path, bloom_filter_options={"x": {"ndv": 1000, "fpp": 0.1}})
    else:
        with pa.ipc.new_file(str(path), TABLE.schema) as writer:
            writer.write_table(TABLE)
    return path


def checked(content: bytes) -> Checked:
    return Checked(lambda start, stop: content[start:stop], len(content))


@pytest.fixture(params=["a.parquet", "a.arrow"])
def sealed(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = write(tmp_path / request.param)
    seal(path)
    return path


def test_other_readers_see_the_table(sealed: Path) -> None:
    if sealed.suffix == ".parquet":
        assert pq.read_table(sealed).equals(TABLE)
        assert pl.read_parquet(sealed).to_arrow().equals(TABLE)
        with duckdb.connect() as con:
            assert con.sql("FROM read_parquet($path)", params={"path": str(sealed)}).to_arrow_table().equals(TABLE)
    else:
        with pa.memory_map(str(sealed)) as source:
            assert pa.ipc.open_file(source).read_all().equals(TABLE)
        assert pl.read_ipc(sealed).to_arrow().equals(TABLE)


def test_a_flipped_bit_anywhere_is_found(sealed: Path) -> None:
    content = sealed.read_bytes()
    checked(content).verify()
    rng = np.random.default_rng(1)
    places = [*rng.integers(0, len(content), 150), *range(len(content) - 60, len(content)), 0, BLOCK - 1, BLOCK]
    unnoticed = []
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            found = checked(bytes(damaged))
            found.verify()
        except ChecksumError:
            continue
        if found.sealed:
            unnoticed.append(place)
    assert unnoticed == []


def test_only_the_blocks_of_a_range_are_verified(sealed: Path) -> None:
    content = bytearray(sealed.read_bytes())
    content[2 * BLOCK + 5] ^= 1
    found = checked(bytes(content))
    found.verify(0, 2 * BLOCK)
    found.verify(3 * BLOCK)
    with pytest.raises(ChecksumError, match="bytes 131,072 to 196,607 do not have their checksum"):
        found.verify(2 * BLOCK + 100, 2 * BLOCK + 101)


def test_a_file_from_before_checksums_passes_unverified(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        found = checked(write(tmp_path / name).read_bytes())
        found.verify()
        assert not found.sealed


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text that is no table at all"])
def test_a_file_of_another_kind_is_an_error(content: bytes) -> None:
    with pytest.raises(ChecksumError):
        checked(content)
