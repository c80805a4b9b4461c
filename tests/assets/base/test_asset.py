"""The metadata of a file's materialization."""

import pytest

from assets.base.asset import event_metadata
from resources.lake.files import Provenance, Stored


def test_a_shard_with_rejects_links_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_SELECTION_BROWSE", raising=False)

    def metadata(**summary: int):
        return event_metadata(Stored(Provenance("raw_pool", "00001", "1"), "f", 3, summary), True, 1.0)

    assert metadata(rejected=2)["browse"].value == "http://127.0.0.1:3002/rejects?shard=00001"
    assert "browse" not in metadata(rejected=0)
