"""A pass over a lake in an object store that fails for a while, or that is killed: the next pass resumes exactly."""

import os
import signal

import dagster as dg
import pytest

from resources.lake.versions import Versions
from tests.support.faulty_proxy import faulty_proxy
from tests.support.interrupting import data_files, start_forked_run
from tests.support.s3 import settings
from tests.support.scenario import Scenario


def test_a_pass_goes_on_without_the_shard_that_can_not_be_written_and_resumes(
    finished: Scenario, bucket: str, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = finished.folder / "lake/clip_score/tiny"
    expected = {path.name: path.read_bytes() for path in local.glob("*.parquet")}
    finished.set("lake", value=f"{bucket}/lake")
    finished.instance = dg.DagsterInstance.ephemeral()
    with faulty_proxy(s3_address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        writing = proxy.fault("PUT", "/clip_score/tiny/00001", "503")
        reading = proxy.fault("GET", "/embeddings/tiny/00002", "truncated", times=2)
        outcome = finished.run()
        assert writing.seen > 1
        assert reading.seen == 2
        assert outcome.failed_shards["clip_score/tiny"] == ["00001"]
        reason = outcome.failures["clip_score/tiny"]
        assert f"{bucket}/lake/clip_score/tiny/00001.parquet: the store failed" in reason
        assert "Remedy: " in reason
        store = finished.open().lake.store
        assert [entry.name for entry in store.files(f"{bucket}/lake/clip_score/tiny")] == [
            "00000.parquet",
            "00002.parquet",
        ]
        assert finished.subset("clip_third").lineage["shards_missing"].keys() == {"00001"}

        proxy.faults.clear()
        again = finished.run()
        found = {entry.name: store.read(entry.location) for entry in store.files(f"{bucket}/lake/clip_score/tiny")}
    assert again.failures == {}
    assert again.computed["clip_score/tiny"] == ["00001"]
    assert not {"raw_pool", "embeddings/tiny", "neg_clip_loss/tiny"} & again.computed.keys()
    assert found == expected


@pytest.mark.slow
def test_killed_at_any_request_a_run_ends_where_an_unbroken_one_does(
    finished: Scenario, bucket: str, s3_address: str
) -> None:
    expected = data_files(finished.folder / "lake")
    finished.set("lake", value=f"{bucket}/lake")
    config, store = finished.folder / "project.yaml", finished.open().lake.store
    own_folders = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    with faulty_proxy(s3_address) as proxy:
        environment = settings(proxy.address) | own_folders
        for request in ("/raw_pool/00001", "/embeddings/tiny/00002", "/clip_third/v0001/lineage.json"):
            process = start_forked_run(config, environment)
            killed = proxy.call_at("PUT", request, process.kill)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert killed.seen == 1
            assert store.stat(f"{bucket}/lake{request}.parquet") is None
            assert store.stat(f"{bucket}/lake{request}.arrow") is None
        last = start_forked_run(config, environment)
        last.join()
        assert last.exitcode == 0
    found = {
        entry.location.removeprefix(f"{bucket}/lake/"): store.read(entry.location)
        for entry in store.files(f"{bucket}/lake", deep=True)
        if entry.name.endswith((".parquet", ".arrow", ".npy"))
    }
    # The killed run's number stays taken, and nothing but the mark of that is left of its version.
    assert Versions(finished.open().lake, "clip_third").names() == ["v0002"]
    assert [e.name for e in store.files(f"{bucket}/lake/subset/clip_third/v0001", deep=True)] == [".claim"]
    renamed = {name.replace("clip_third/v0001", "clip_third/v0002"): content for name, content in expected.items()}
    assert found == renamed
