"""Claims about going through shards one after another."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from assets.sharded import Result, each
from resources.lake import Lake, Provenance


def test_the_next_shard_is_fetched_while_one_is_computed() -> None:
    fetched, both = [], threading.Barrier(2, timeout=60)

    def fetch(shard: str) -> None:
        fetched.append(shard)
        both.wait()

    def compute(shard: str) -> Result:
        if shard != "c":  # the last one has none behind it
            both.wait()  # only passes while the next one is being fetched
        return Result(pa.table({"shard": [shard]}), {})

    found = [
        (shard, outcome.table["shard"].to_pylist()) for shard, outcome in each(compute, ahead=fetch)(["a", "b", "c"])
    ]
    assert found == [("a", ["a"]), ("b", ["b"]), ("c", ["c"])]
    assert fetched == ["b", "c"]


def test_a_file_that_can_not_be_fetched_fails_its_own_shard_alone(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    for shard in ("a", "c"):
        lake.write(pa.table({"x": [1]}), Provenance("clip_score/b32", shard, "1"))

    def compute(shard: str) -> Result:
        return Result(lake.read("clip_score/b32", shard), {})

    found = dict(each(compute, ahead=lambda shard: lake.fetch("clip_score/b32", shard))(["a", "b", "c"]))
    assert [type(found[shard]) is Result for shard in "abc"] == [True, False, True]
    assert "is not there yet" in str(found["b"])
    with pytest.raises(FileNotFoundError):
        lake.fetch("clip_score/b32", "b")
