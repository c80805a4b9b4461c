"""Recipes that drop duplicates, select by stratum, or draw, from settings to files, checks and report."""

import tarfile
from collections import Counter
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from assets.reproduction import choose_again
from assets.subsets.checks import examine_stored, examine_subset
from dagster_project.staleness import RANGE_END, RANGE_START
from resources.catalog.build import read_catalog
from tests.support.pool_factory import picture
from tests.support.reports import report_page
from tests.support.scenario import SHARDS, Scenario
from tests.support.versions import assert_same_bytes

CLIP = "clip_score/tiny"
RECIPES = {
    "unlike": {"steps": [{"deduplicate": {"by": "image", "best": CLIP}, "report": ["width", "shard"]}]},
    "strata": {"from": "unlike", "steps": [{"stratify": {"by": "shard", "score": CLIP, "fraction": 0.26}}]},
    "drawn": {
        "from": "unlike",
        "steps": [
            {"soft_cap_sample": {"score": CLIP, "fraction": 1.5, "batch": 10, "penalty": 0.2, "temperature": 0.1}}
        ],
    },
}


@pytest.fixture
def scenario(scenario: Scenario) -> Scenario:
    """Return a project of three shards that start with the same picture, and one score."""
    for shard in SHARDS:
        scenario.write_shard(shard, image=picture(7000))
    scenario.set("scores", value={"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}})
    scenario.set("recipes", value=RECIPES)
    assert scenario.run().failures == {}
    return scenario


def test_of_equal_pictures_the_best_stays_and_the_others_name_it(scenario: Scenario) -> None:
    scores = scenario.scores(CLIP)
    pool = scenario.scores("raw_pool").join(scores, on=["f0", "f1"])
    alike = pool.filter(pl.col("sha256").is_duplicated()).sort("clip_score", descending=True)
    assert len(alike) == 3
    winner, *dropped = alike["uid"].to_list()
    manifest = scenario.manifest("unlike")
    assert set(pool["uid"]) - set(manifest["uid"]) == set(dropped)
    with read_catalog(scenario.folder / "lake/catalog.duckdb") as con:
        for uid in dropped:
            told = con.execute(
                "SELECT verdict, in_favour_of FROM explain(?) WHERE recipe = 'unlike' AND step = 1", [uid]
            ).fetchall()
            assert told == [("dropped", winner)]
        reported = con.sql(
            "SELECT what, entered, kept, dropped FROM step_reports WHERE recipe = 'unlike' AND name = 'shard'"
        ).fetchall()
    kept = dict(manifest.group_by("shard").len().rows())
    assert reported == [(shard, 12.0, float(kept[shard]), 12.0 - kept[shard]) for shard in SHARDS]
    shown = report_page(scenario, "unlike")
    assert shown.sections["Alike by image"] == [winner, *sorted(dropped)]
    event = scenario.instance.get_latest_materialization_event(dg.AssetKey(["subset", "unlike"]))
    metadata = event.asset_materialization.metadata
    assert "| shard | 00000 | 12 |" in metadata["Step 1, keep one row of each image, the best by clip_score/tiny"].value


def test_each_shard_gives_its_own_best_of_what_is_left(scenario: Scenario) -> None:
    began = scenario.manifest("unlike").join(scenario.scores(CLIP), on=["f0", "f1"])
    wanted = []
    for (_,), rows in began.group_by("shard"):
        best = rows.sort("clip_score", "uid", descending=[True, False])
        wanted += best["uid"].to_list()[: len(rows) * 26 // 100]
    manifest = scenario.manifest("strata")
    assert manifest["uid"].to_list() == sorted(wanted)
    assert sorted(manifest["step1_rank"]) == sorted([1, 2] * 3 + [3] * (len(wanted) - 6))
    version = scenario.subset("strata")
    table = pl.read_parquet(Path(version.folder) / version.lineage["steps"][0]["file"])
    assert sorted(table["stratum"]) == list(SHARDS)


def test_what_was_drawn_several_times_is_so_in_the_array_and_in_the_export(scenario: Scenario) -> None:
    version = scenario.subset("drawn")
    array, manifest = scenario.array("drawn"), scenario.manifest("drawn")
    entered = version.lineage["source"]["rows"]
    assert version.samples == len(array) == manifest["copies"].sum() == entered * 3 // 2
    assert len(manifest) == version.lineage["rows"] < len(array)
    times = Counter((f0, f1) for f0, f1 in array.tolist())
    assert times == {(row["f0"], row["f1"]): row["copies"] for row in manifest.to_dicts()}
    assert (array == np.sort(array)).all()
    result = scenario.execute("export/drawn", tags={RANGE_START: SHARDS[0], RANGE_END: SHARDS[-1]})
    assert result.success
    written: dict[str, bytes] = {}
    for path in (scenario.folder / "lake/export/drawn" / version.name).glob("*.tar"):
        with tarfile.open(path) as tar:
            written |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(written) == 3 * len(array)
    for row in manifest.to_dicts():  # the copies have keys of their own
        for copy in range(1, row["copies"]):
            for suffix in ("jpg", "json", "txt"):
                assert written[f"{row['key']}_{copy}.{suffix}"] == written[f"{row['key']}.{suffix}"]
    assert manifest["copies"].max() > 2
    event = scenario.instance.get_latest_materialization_event(dg.AssetKey(["subset", "drawn"]))
    assert event.asset_materialization.metadata["samples"].value == len(array)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_such_a_version_is_chosen_again_to_the_same_bytes(scenario: Scenario, recipe: str, tmp_path: Path) -> None:
    version = scenario.subset(recipe)
    assert_same_bytes(scenario, recipe, choose_again(scenario.open().lake, version.lineage, tmp_path / "again"))
    assert not scenario.run().computed


def test_the_checks_see_an_array_that_is_not_what_was_drawn(scenario: Scenario) -> None:
    version, lake = scenario.subset("drawn"), scenario.open().lake
    assert all(finding["passed"] for finding in examine_stored(lake, version).values())
    array, manifest = scenario.array("drawn"), scenario.manifest("drawn").select("f0", "f1", "copies").to_arrow()
    found = examine_subset(version.lineage, manifest, np.unique(array), {})
    assert f"the array has {len(manifest)} rows, not {len(array)}" in found["size"]["why"]
    assert found["uids_sorted_and_unique"]["why"] == "its uids are not the manifest's"
    other = examine_subset(version.lineage, manifest, array[::-1], {})
    assert "is not above the row before it" in other["uids_sorted_and_unique"]["why"]
    strata = scenario.subset("strata")
    table = pl.read_parquet(Path(strata.folder) / strata.lineage["steps"][0]["file"])
    fewer = table.with_columns(entered=pl.lit(1)).to_arrow()
    uids = scenario.manifest("strata").select("f0", "f1").to_arrow()
    found = examine_subset(strata.lineage, uids, scenario.array("strata"), {1: fewer})
    assert f"step 1: {len(uids)} of" in found["size"]["why"]
