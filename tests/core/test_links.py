"""Addresses of the pages of `clip-select browse`."""

import pytest

from core.links import asset_link, browse_link, sample_link


def test_links_have_the_default_address_and_quoted_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_SELECTION_BROWSE", raising=False)
    assert browse_link() == "http://127.0.0.1:3002/"
    assert browse_link(recipe="a b&c", version=None) == "http://127.0.0.1:3002/?recipe=a+b%26c"
    assert sample_link("../x?y") == "http://127.0.0.1:3002/sample/..%2Fx%3Fy"


def test_an_asset_leads_to_the_page_that_shows_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_SELECTION_BROWSE", "http://127.0.0.1:9/")
    assert asset_link("raw_pool", "00001") == "http://127.0.0.1:9/rejects?shard=00001"
    assert asset_link("clip_score/b32", "00001") == "http://127.0.0.1:9/?shard=00001"
    assert asset_link("subset/paper", None) == "http://127.0.0.1:9/?recipe=paper"
    assert asset_link("negatives/b32", None) == "http://127.0.0.1:9/"
