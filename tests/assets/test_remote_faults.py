"""A pass over a lake in an object store that fails for a while: one shard fails, and the next pass resumes exactly."""

import dagster as dg
import pytest

from tests.support.faulty_proxy import faulty_proxy
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
    assert again.failures == {}
    assert again.computed["clip_score/tiny"] == ["00001"]
    assert not {"raw_pool", "embeddings/tiny", "neg_clip_loss/tiny"} & again.computed.keys()
    found = {entry.name: store.read(entry.location) for entry in store.files(f"{bucket}/lake/clip_score/tiny")}
    assert found == expected
