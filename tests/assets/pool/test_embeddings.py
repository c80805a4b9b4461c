"""Embeddings by several encoders in one run: images are decoded once, and results equal those of separate runs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from resources.lake.files import column_to_vectors
from resources.storage import images
from tests.support.pool_factory import TINY_CONFIG, write_clip
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

BOTH = ["embeddings/tiny", "embeddings/second"]


@pytest.fixture
def second(scenario: Scenario, tmp_path: Path) -> Path:
    """Add a second encoder, leave CLIPScore as the only score, and return the encoder's folder."""
    folder = write_clip(tmp_path / "second", TINY_CONFIG, seed=1)
    scenario.set("encoders", "second", value={"model": f"local-dir:{folder}", "workers": 0})
    scenario.set("targets", value={})
    scenario.set("scores", value={"neg_clip_loss": {}, "clip_score": ["tiny"]})
    scenario.set("recipes", value={"clip_third": {"steps": [keep("clip_score/tiny", fraction=0.34)]}})
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the size in bytes of every image that is decoded for an encoder."""
    seen: list[int] = []
    decode: Callable[..., Any] = images.picture

    def note(data: bytes, *options: Any) -> Any:
        seen.append(len(data))
        return decode(data, *options)

    monkeypatch.setattr(images, "picture", note)
    return seen


def stored(scenario: Scenario, key: str, shard: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Return a shard's fingerprint and embeddings."""
    lake = scenario.open().lake
    table, found = lake.read(key, shard), lake.stored(key, shard)
    assert found is not None
    return found.fingerprint, column_to_vectors(table["image"]), column_to_vectors(table["text"])


def without_lake(scenario: Scenario) -> None:
    shutil.rmtree(scenario.folder / "lake")
    scenario.instance.wipe()


def computed(scenario: Scenario, key: str) -> dict[str, bool]:
    """Return whether each shard's newest event marks it as computed."""
    found = {}
    for shard in SHARDS:
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(key.split("/")), asset_partitions=[shard])
        (record,) = scenario.instance.fetch_materializations(wanted, limit=1).records
        assert record.asset_materialization is not None
        found[shard] = record.asset_materialization.metadata["computed"].value
    return found


@pytest.mark.usefixtures("second")
def test_images_are_decoded_once_for_all_encoders_of_a_pass_and_each_embeds_as_if_alone(
    scenario: Scenario, decoded: list[int]
) -> None:
    scenario.execute("raw_pool", *BOTH[:1], shard=SHARDS[0])
    scenario.execute(*BOTH[1:], shard=SHARDS[0])
    alone = [stored(scenario, key, SHARDS[0]) for key in BOTH]
    assert len(decoded) == 2 * ROWS
    without_lake(scenario)
    decoded.clear()
    outcome = scenario.run()
    assert outcome.failures == {}
    assert [outcome.computed[key] for key in BOTH] == [list(SHARDS)] * 2
    assert len(decoded) == len(SHARDS) * ROWS
    for key, (fingerprint, image, text) in zip(BOTH, alone, strict=True):
        found = stored(scenario, key, SHARDS[0])
        assert found[0] == fingerprint
        assert np.array_equal(found[1], image)
        assert np.array_equal(found[2], text)
        assert computed(scenario, key) == dict.fromkeys(SHARDS, True)
    assert scenario.run().computed == {}


@pytest.mark.usefixtures("second")
def test_one_run_for_both_decodes_once_and_a_run_for_one_leaves_the_other_alone(
    scenario: Scenario, decoded: list[int]
) -> None:
    assert scenario.execute("raw_pool", "embeddings/tiny", shard=SHARDS[0]).success
    assert scenario.open().lake.stored("embeddings/second", SHARDS[0]) is None
    decoded.clear()
    assert scenario.execute("raw_pool", *BOTH, shard=SHARDS[1]).success
    assert len(decoded) == ROWS
    assert all(scenario.open().lake.stored(key, SHARDS[1]) is not None for key in BOTH)


@pytest.mark.usefixtures("second")
@pytest.mark.usefixtures("finished")
def test_a_change_of_one_encoder_computes_that_one_alone(scenario: Scenario) -> None:
    scenario.run()
    before = {key: stored(scenario, key, SHARDS[2])[0] for key in BOTH}
    scenario.set("encoders", "second", "precision", value="bf16")
    computed = scenario.run().computed
    assert computed["embeddings/second"] == list(SHARDS)
    assert "embeddings/tiny" not in computed
    after = {key: stored(scenario, key, SHARDS[2])[0] for key in BOTH}
    assert [before[key] == after[key] for key in BOTH] == [True, False]


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("there", BOTH)
def test_a_shard_that_one_encoder_has_is_embedded_for_the_other_alone(
    scenario: Scenario, decoded: list[int], there: str
) -> None:
    (other,) = set(BOTH) - {there}
    scenario.execute("raw_pool", there, shard=SHARDS[1])
    before = scenario.files()[f"{there}/{SHARDS[1]}.arrow"]
    decoded.clear()
    outcome = scenario.run()
    assert outcome.failures == {}
    assert sorted(outcome.computed[other]) == list(SHARDS)
    assert outcome.computed[there] == [SHARDS[0], SHARDS[2]]
    assert len(decoded) == len(SHARDS) * ROWS
    assert scenario.files()[f"{there}/{SHARDS[1]}.arrow"] == before


def test_an_encoder_that_cannot_be_loaded_fails_alone(scenario: Scenario, second: Path) -> None:
    (second / "open_clip_model.safetensors").write_bytes(b"not weights")
    outcome = scenario.run()
    assert list(outcome.failures) == ["embeddings/second"]
    assert "open_clip_model.safetensors is damaged or incomplete" in outcome.failures["embeddings/second"]
    assert scenario.open().lake.shards("embeddings/tiny") == list(SHARDS)
    assert scenario.open().lake.shards("embeddings/second") == []
    shutil.rmtree(second)
    scenario.set("encoders", "tiny", "precision", value="bf16")
    outcome = scenario.run()
    assert list(outcome.failures) == ["embeddings/second"]
    assert "does not exist" in outcome.failures["embeddings/second"]
    assert outcome.computed["embeddings/tiny"] == list(SHARDS)


def test_embeddings_that_a_check_refuses_are_written_by_no_other_encoders_step(
    scenario: Scenario, second: Path
) -> None:
    weights = load_file(second / "open_clip_model.safetensors")
    weights["visual.proj"] = torch.full_like(weights["visual.proj"], torch.nan)
    save_file(weights, second / "open_clip_model.safetensors")
    outcome = scenario.run()
    assert list(outcome.failures) == ["embeddings/second"]
    assert "unit_norm" in outcome.failures["embeddings/second"]
    assert scenario.open().lake.shards("embeddings/second") == []
    assert scenario.open().lake.shards("embeddings/tiny") == list(SHARDS)
