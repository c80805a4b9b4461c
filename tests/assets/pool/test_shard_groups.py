"""Groups of tars: `tars_per_shard` makes several tars one shard, for good, and every sample keeps its place."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from assets.reproduction import rebuild
from dagster_project.browser.queries import Table
from dagster_project.browser.samples import describe
from resources.pools.base import PoolError, place_in_tar
from resources.pools.groups import ShardGroups, grouped
from resources.pools.webdataset import WebdatasetPool
from resources.storage.by_location import open_store
from tests.support.scenario import ROWS, Scenario


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """Yield a computed project of three tars, of which the first two are one shard; a key comes in both."""
    scenario = Scenario(tmp_path_factory.mktemp("groups"), tiny_clip)
    scenario.set("pool", "tars_per_shard", value=2)
    scenario.set("recipes", value={"all": {"steps": [{"where": "true"}]}})
    scenario.write_shard("00001", key="00000/000000000")
    scenario.write_shard("00000", key="00000/000000000")
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


def members(tar: Path) -> dict[int, bytes]:
    with tarfile.open(tar) as file:
        return {member.offset_data: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]


def test_consecutive_tars_are_one_shard_and_the_last_may_be_smaller(tars: Scenario) -> None:
    project = tars.open()
    assert list(project.pool.list_shards()) == ["00000-00001", "00002"]
    rows = project.lake.read("raw_pool", "00000-00001")
    assert rows.num_rows == 2 * ROWS
    assert rows["source_row"].to_pylist() == list(range(2 * ROWS))
    assert rows["key"].to_pylist().count("00000/000000000") == 2


def test_an_image_is_found_in_its_tar(tars: Scenario) -> None:
    project = tars.open()
    rows = project.lake.read("raw_pool", "00000-00001")
    images = project.pool.read_images("00000-00001", rows)
    contents = [members(tars.folder / "pool" / f"{tar}.tar") for tar in ("00000", "00001")]
    for image, offset in zip(images, rows["image_offset"].to_pylist(), strict=True):
        number, byte = place_in_tar(offset)
        assert image == contents[number][byte]


def test_sql_and_the_browser_show_the_tar_and_the_byte(tars: Scenario) -> None:
    project = tars.open()
    with duckdb.connect(str(project.catalog_path()), read_only=True) as con:
        places = con.sql("SELECT uid, tar, image_offset, image_size FROM image_places").fetchall()
    assert len(places) == 3 * ROWS
    assert {tar for _, tar, _, _ in places} == {"00000", "00001", "00002"}
    for uid, tar, offset, size in places[::7]:
        assert len(members(tars.folder / "pool" / f"{tar}.tar")[offset]) == size
        assert describe(Table(project), uid)["tar"] == (f"{tars.folder}/pool/{tar}.tar", offset)


def test_an_export_has_the_samples_of_all_tars(tars: Scenario) -> None:
    result = tars.execute("export/all", shard="00000-00001")
    assert result.success
    written = next((tars.folder / "lake/export/all").glob("v*/00000-00001.tar"))
    sources = [members(tars.folder / "pool" / f"{tar}.tar") for tar in ("00000", "00001")]
    assert sorted(members(written).values()) == sorted([*sources[0].values(), *sources[1].values()])
    keys = pq.read_table(written.with_suffix(".parquet"))["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 2 * ROWS


def test_lineage_names_the_tars_and_a_version_is_reproduced_from_it(tars: Scenario, tmp_path: Path) -> None:
    version = tars.subset("all")
    assert version.lineage["shard_groups"] == {"00000-00001": ["00000", "00001"]}
    again = rebuild(version.lineage, tmp_path)
    assert (again / "subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_a_group_is_stale_when_one_of_its_tars_changes_and_never_changes_itself(tars: Scenario) -> None:
    before = tars.open().pool.list_shards()
    tars.write_shard("00003")
    tars.write_shard("00001", text=b"another caption")
    tars.set("pool", "tars_per_shard", value=3)
    outcome = tars.run()
    assert outcome.failures == {}
    assert sorted(outcome.computed["raw_pool"]) == ["00000-00001", "00003"]
    after = tars.open().pool.list_shards()
    assert {shard for shard in before if before[shard] != after[shard]} == {"00000-00001"}
    tars.set("pool", value={"path": "pool"})
    assert tars.open().pool.list_shards() == after
    assert tars.run().computed.keys() == {"catalog"}  # which is older than the YAML


def test_shards_that_are_there_stay_single_tars(finished: Scenario) -> None:
    finished.set("pool", "tars_per_shard", value=2)
    assert finished.run().computed.keys() == {"catalog"}  # which is older than the YAML
    for tar in ("00003", "00004"):
        finished.write_shard(tar)
    assert finished.run().added == ["00003-00004"]


def test_two_processes_record_one_grouping(tmp_path: Path) -> None:
    first, second = ShardGroups(str(tmp_path)), ShardGroups(str(tmp_path))
    assert first.record({"a-b": ["a", "b"]})
    assert not second.record({"a": ["a"]})
    assert second.recorded() == first.recorded() == {"a-b": ["a", "b"]}


def test_names_are_grouped_in_order() -> None:
    assert grouped(["a", "b", "c", "d", "e"], 2, {"b"}) == {"b": ["b"], "a-c": ["a", "c"], "d-e": ["d", "e"]}


def test_a_damaged_record_is_one_error_with_the_file(tmp_path: Path) -> None:
    groups = ShardGroups(str(tmp_path))
    groups.record({"a-b": ["a", "b"]})
    (tmp_path / "shard_groups/00000001.json").write_text(json.dumps([1]))
    with pytest.raises(PoolError, match=r"00000001\.json: damaged.*Remedy"):
        ShardGroups(str(tmp_path)).recorded()


def test_groups_of_a_pool_in_an_object_store_are_read_tar_by_tar(tars: Scenario, bucket: str, tmp_path: Path) -> None:
    for file in (tars.folder / "pool").iterdir():
        open_store(bucket).put(f"{bucket}/pool/{file.name}", file)
    local, remote = (
        WebdatasetPool(tars.open().settings.pool.model_copy(update={"path": path, "tars_per_shard": 2}))
        for path in (str(tars.folder / "pool"), f"{bucket}/pool")
    )
    local.groups, remote.groups = ShardGroups(str(tmp_path / "lake")), ShardGroups(f"{bucket}/lake")
    for pool in (local, remote):
        pool.record_groups()
    assert "00000-00001" in remote.list_shards()
    assert list(remote.list_shards()) == list(local.list_shards())
    for shard in remote.list_shards():
        rows = remote.read_shard(shard).rows
        assert rows.equals(local.read_shard(shard).rows)
        assert remote.read_images(shard, rows) == local.read_images(shard, rows)
