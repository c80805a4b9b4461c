"""Records of files: how many requests they cost, and when a cached one counts."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from resources.lake import records
from resources.lake.files import Lake, Provenance
from resources.lake.records import RecordCache
from resources.storage.stores import cache_folder
from tests.support.faulty_proxy import Proxy, faulty_proxy

SHARDS = [f"{number:05d}" for number in range(12)]


@pytest.fixture
def proxy(s3_address: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty_proxy(s3_address) as proxy:
        fill(Lake(f"{bucket}/lake"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


def fill(lake: Lake, value: int = 1) -> None:
    for shard in SHARDS:
        lake.write(pa.table({"x": [value]}), Provenance("clip_score/b32", shard, str(value)))


def versions(lake: Lake) -> set[str]:
    found = [lake.stored("clip_score/b32", shard) for shard in SHARDS]
    return {stored.provenance.code_version for stored in found if stored is not None}


def test_records_cost_a_listing_and_one_request_each_and_later_a_listing(bucket: str, proxy: Proxy) -> None:
    assert versions(Lake(f"{bucket}/lake")) == {"1"}
    kinds = [method if "list-type" not in path else "list" for method, path in proxy.requests]
    assert sorted(kinds) == ["GET"] * len(SHARDS) + ["list"]
    proxy.requests.clear()
    assert versions(Lake(f"{bucket}/lake")) == {"1"}
    assert ["list-type" in path for _, path in proxy.requests] == [True]


def test_a_file_that_is_replaced_after_it_was_listed_has_its_new_record(bucket: str, proxy: Proxy) -> None:
    lake = Lake(f"{bucket}/lake")
    assert lake.stored("clip_score/b32", "99999") is None  # which lists the folder
    fill(Lake(f"{bucket}/lake"), 22)
    assert versions(lake) == {"22"}
    assert not lake.damaged
    table = lake.read("clip_score/b32", SHARDS[0])
    assert table["x"].to_pylist() == [22]
    assert len(proxy.requests) > len(SHARDS)


def test_a_record_that_can_not_be_read_ahead_is_an_error_in_its_own_turn(bucket: str, proxy: Proxy) -> None:
    proxy.fault("GET", f"/clip_score/b32/{SHARDS[3]}", "500")
    lake = Lake(f"{bucket}/lake")
    assert lake.stored("clip_score/b32", SHARDS[0]) is not None
    assert lake.stored("clip_score/b32", SHARDS[4]) is not None
    with pytest.raises(OSError, match=f"{SHARDS[3]}.parquet: the store failed"):
        lake.stored("clip_score/b32", SHARDS[3])
    proxy.faults.clear()
    assert lake.stored("clip_score/b32", SHARDS[3]) is not None


def test_a_cached_record_counts_while_the_file_is_the_same(tmp_path: Path) -> None:
    root = str(tmp_path / "lake")
    fill(Lake(root))
    assert versions(Lake(root)) == {"1"}
    lake, cache = Lake(root), RecordCache(cache_folder(root) / "records.sqlite")
    entry = lake.store.stat(lake.path("clip_score/b32", SHARDS[0]))
    assert entry is not None
    record = cache.get(entry.location, entry.tag)
    assert record is not None
    cache.put([(entry.location, entry.tag, {**record, "rows": 77})])
    stored = lake.stored("clip_score/b32", SHARDS[0])
    assert stored is not None
    assert stored.rows == 77
    fill(Lake(root))
    stored = lake.stored("clip_score/b32", SHARDS[0])
    assert stored is not None
    assert stored.rows == 1


def test_a_lake_can_be_passed_to_another_process(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    fill(lake)
    assert versions(lake) == {"1"}
    assert versions(pickle.loads(pickle.dumps(lake))) == {"1"}


def test_a_cache_returns_what_was_written_after_its_records_were_fetched_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "AHEAD", 3)
    path = tmp_path / "records.sqlite"
    locations = [f"/lake/{folder}/{number}" for folder in ("a", "b") for number in range(4)]
    mine, other = RecordCache(path), RecordCache(path)
    mine.put([(location, "old", {"of": location}) for location in locations[1:]])
    assert [mine.get(location, "old") for location in locations] == [None, *({"of": one} for one in locations[1:])]
    other.put([(locations[0], "new", {"rows": 1}), (locations[1], "new", {"rows": 2})])
    mine.put([(locations[2], "old", {"rows": 3})])
    found = [mine.get(*asked) for asked in zip(locations, ["new", "new", "old", "old"], strict=False)]
    assert found == [{"rows": 1}, {"rows": 2}, {"rows": 3}, {"of": locations[3]}]
    assert mine.get(locations[1], "old") is None
    assert [other.get(location, "old") for location in reversed(locations[4:])] == [
        {"of": location} for location in reversed(locations[4:])
    ]
