"""Target images that are also in the pool: counted by shard, and on the subset."""

import json
from pathlib import Path

import dagster as dg
import numpy as np

from tests.support.pool_factory import datacomp_shard, unit_rows
from tests.support.scenario import ROWS, SHARDS, Scenario, keep


def test_rows_that_are_target_images_are_counted_by_shard_and_on_the_subset(scenario: Scenario) -> None:
    images = {shard: unit_rows(int(shard) + 1, ROWS) for shard in SHARDS}
    images["00002"][7] = images["00002"][4]  # one target, twice in a shard
    for shard, image in images.items():
        datacomp_shard(scenario.folder / "metadata", shard, ROWS, arrays={"b32_img": image, "b32_txt": image})
    copies = [images["00000"][3], images["00002"][4], images["00002"][9]]
    np.save(scenario.folder / "features.npy", np.stack([*copies, *unit_rows(77, 5)]))
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    scenario.document["encoders"] = {"b32": {"precomputed": "b32", "temperature": 0.01}}
    scenario.document["targets"] = {"liked": {"features": {"b32": "features.npy"}}}
    scenario.document["scores"] = {"clip_score": ["b32"], "neg_clip_loss": {}}
    scenario.document["recipes"] = {
        "near": {"steps": [keep("norm_sim_inf/b32/liked", fraction=0.5)]},
        "other": {"steps": [keep("clip_score/b32", fraction=0.5)]},
    }
    assert scenario.run().failures == {}
    lake = scenario.open().lake
    summaries = [stored.summary for shard in SHARDS if (stored := lake.stored("norm_sim/b32/liked", shard))]
    assert [(s["rows_in_target"], s["targets_in_shard"]) for s in summaries] == [(1, 1), (0, 0), (3, 2)]

    version = scenario.subset("near")
    record = json.loads((Path(version.folder) / "lineage.json").read_text())
    assert record["rows_in_targets"] == {"norm_sim/b32/liked": {"rows": 4, "shards_not_counted": 0}}
    assert "rows_in_targets" not in scenario.subset("other").lineage
    event = scenario.instance.get_latest_materialization_event(dg.AssetKey(["subset", "near"]))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["rows_in_target/norm_sim/b32/liked"].value == 4
    page = (Path(version.folder) / "report" / "index.html").read_text()
    assert "norm_sim/b32/liked" in page
    assert "target images among" in page
