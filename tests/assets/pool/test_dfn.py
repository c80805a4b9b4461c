"""DFN: the CLIPScore of a second encoder, and recipes that take scores from both."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from assets.settings import load_settings
from tests.support.pool_factory import TINY_CONFIG, write_clip
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "dfn.yaml"


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of the scenario's shape with other weights."""
    return f"local-dir:{write_clip(tmp_path_factory.mktemp('other_clip'), TINY_CONFIG, seed=1)}"


def best(scores: pl.DataFrame, column: str, rows: int) -> pl.DataFrame:
    """Return the rows with the largest values; smaller uids win ties."""
    return scores.sort([column, "f0", "f1"], descending=[True, False, False]).head(rows)


def uids(table: pl.DataFrame) -> list[tuple[int, int]]:
    return sorted(table.select("f0", "f1").rows())


def test_one_recipe_takes_neg_clip_loss_from_one_encoder_and_norm_sim_from_another(
    scenario: Scenario, other_clip: str
) -> None:
    scenario.set("encoders", "other", value={"model": other_clip, "workers": 0})
    scenario.document["scores"] = {
        "clip_score": ["other"],
        "neg_clip_loss": {"tiny": {"batch_size": 8, "draws": 3}},
        "norm_sim": {"other": ["pets"]},
    }
    scenario.document["recipes"] = {
        "mixed": {
            "steps": [
                keep("neg_clip_loss/tiny", fraction=0.75),
                keep("norm_sim_inf/other/pets", fraction=0.5),
                keep("clip_score/other", fraction=0.25),
            ]
        }
    }
    assert scenario.run().failures == {}
    pool = ROWS * len(SHARDS)
    first = best(scenario.scores("neg_clip_loss/tiny"), "neg_clip_loss", pool * 3 // 4)
    second = scenario.scores("norm_sim/other/pets").join(first, on=["f0", "f1"], how="semi")
    third = scenario.scores("clip_score/other").join(
        best(second, "norm_sim_inf", pool // 2), on=["f0", "f1"], how="semi"
    )
    assert uids(scenario.manifest("mixed")) == uids(best(third, "clip_score", pool // 4))
    record = scenario.subset("mixed").lineage
    assert set(record["encoders"]) == {"tiny", "other"}
    assert set(record["temperatures"]) == {"tiny"}


def test_the_two_encoders_do_not_score_alike(scenario: Scenario, other_clip: str) -> None:
    scenario.set("encoders", "other", value={"model": other_clip, "workers": 0})
    scenario.document["scores"] = {"clip_score": ["tiny", "other"], "neg_clip_loss": {}, "norm_sim": {}}
    scenario.document["recipes"] = {}
    assert scenario.run().failures == {}
    ours, theirs = (scenario.scores(f"clip_score/{encoder}")["clip_score"].to_numpy() for encoder in ("tiny", "other"))
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.95


def test_the_ready_config_names_apples_model_and_is_accepted() -> None:
    settings = load_settings(EXAMPLE)
    assert settings.encoders["dfn"].model == "hf-hub:apple/DFN-public"
    assert settings.scores.clip_score == ("dfn",)


def test_every_recipe_of_the_ready_config_runs(scenario: Scenario, other_clip: str) -> None:
    document: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    tiny = scenario.document["encoders"]["tiny"]
    scenario.document = document | {
        "lake": "lake",
        "pool": {"path": "pool"},
        "encoders": {"dfn": {"model": other_clip, "workers": 0}, "l14": tiny},
        "targets": {"flickr": {"path": "pets"}},
    }
    scenario.set("scores", "neg_clip_loss", value={"l14": {"batch_size": 8, "draws": 2}})
    assert scenario.run().failures == {}
    twenty = uids(best(scenario.scores("clip_score/dfn"), "clip_score", 7))  # floor(36 * 0.20)
    assert uids(scenario.manifest("dfn_20")) == twenty
    within = uids(scenario.manifest("within_dfn_90_80"))
    assert len(within) == 5  # floor(7 * 0.80)
    assert set(within) < set(twenty)
    united = uids(scenario.manifest("dfn_or_strict"))
    assert set(twenty) <= set(united)
    assert len(united) <= 7 + 3
