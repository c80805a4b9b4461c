"""From a pool to a subset, and again after changes: which assets are computed, and which are not."""

import json
import os
import re
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import numpy as np
import polars as pl
import pytest

from assets.scores.neg_clip_loss_settings import temperature
from core.uids import UID_DTYPE
from dagster_project.staleness import RANGE_END, RANGE_START
from tests.support.history import stale
from tests.support.pool_factory import TINY_CONFIG, write_clip
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

SHARDED = ["raw_pool", "embeddings/tiny", "clip_score/tiny", "neg_clip_loss/tiny", "norm_sim/tiny/pets"]
EVERYTHING = [
    *SHARDED,
    "target_embeddings/tiny/pets",
    "negatives/tiny",
    "subset/clip_third",
    "subset/paper",
    "subset/inside",
    "catalog",
]


def test_one_pass_makes_every_asset_of_every_shard(scenario: Scenario) -> None:
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.added == list(SHARDS)
    assert set(outcome.computed) == set(EVERYTHING)
    assert all(outcome.computed[key] == list(SHARDS) for key in SHARDED)


@pytest.mark.usefixtures("finished")
def test_a_subset_holds_what_its_steps_say(scenario: Scenario) -> None:
    scenario.run()
    loss = scenario.scores("neg_clip_loss/tiny").sort("neg_clip_loss", descending=True)
    entered = loss.head(18)
    near = scenario.scores("norm_sim/tiny/pets").join(entered, on=["f0", "f1"], how="semi")
    wanted = near.sort("norm_sim_inf", descending=True).head(9)

    found = scenario.manifest("paper")
    assert set(found.select("f0", "f1").rows()) == set(wanted.select("f0", "f1").rows())
    by_rank = found.sort("step2_rank")
    np.testing.assert_array_equal(by_rank["step2_value"].to_numpy(), wanted["norm_sim_inf"].to_numpy())
    assert by_rank["step2_rank"].to_list() == list(range(1, 10))
    assert [(s["entered"], s["kept"]) for s in scenario.subset("paper").lineage["steps"]] == [(36, 18), (18, 9)]


@pytest.mark.usefixtures("finished")
def test_the_array_is_what_datacomp_reads(scenario: Scenario) -> None:
    scenario.run()
    array = scenario.array("clip_third")
    assert array.dtype == UID_DTYPE
    assert len(array) == 12  # floor(36 * 0.34)
    np.testing.assert_array_equal(array, np.unique(array))
    texts = [f"{f0:016x}{f1:016x}" for f0, f1 in array.tolist()]
    assert texts == sorted(scenario.manifest("clip_third")["uid"])


@pytest.mark.usefixtures("finished")
def test_a_recipe_may_begin_with_another(scenario: Scenario) -> None:
    scenario.run()
    inside = scenario.subset("inside").lineage
    assert inside["source"]["name"] == "clip_third"
    assert (inside["source"]["rows"], inside["rows"]) == (12, 3)
    assert set(scenario.manifest("inside")["uid"]) <= set(scenario.manifest("clip_third")["uid"])


@pytest.mark.parametrize("suffix", [".npy", ".txt"])
@pytest.mark.usefixtures("finished")
def test_a_recipe_may_begin_with_a_uid_list(scenario: Scenario, suffix: str) -> None:
    scenario.run()
    chosen = scenario.manifest("clip_third")["uid"].to_list()[:5]
    path = scenario.folder / f"list{suffix}"
    if suffix == ".npy":
        np.save(path, scenario.array("clip_third")[:5])
    else:
        path.write_text("\n".join([*chosen, chosen[0], "f" * 32]) + "\n")
    scenario.set("recipes", "listed", value={"from": f"list{suffix}", "steps": [keep("clip_score/tiny", fraction=0.6)]})
    outcome = scenario.run()
    assert outcome.failures == {}
    assert scenario.subset("listed").lineage["source"]["rows"] == 5
    assert len(scenario.manifest("listed")) == 3
    assert set(scenario.manifest("listed")["uid"]) <= set(chosen)


@pytest.mark.usefixtures("finished")
def test_nothing_is_computed_again_when_nothing_changed(scenario: Scenario) -> None:
    scenario.run()
    before = scenario.files()
    outcome = scenario.run()
    assert (outcome.computed, outcome.added, outcome.failures) == ({}, [], {})
    assert scenario.files() == before


@pytest.mark.usefixtures("finished")
def test_a_new_shard_is_computed_and_no_other(scenario: Scenario) -> None:
    scenario.run()
    before = scenario.files()
    scenario.write_shard("00007")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.added == ["00007"]
    assert {key: outcome.computed.get(key) for key in SHARDED} == {key: ["00007"] for key in SHARDED}
    assert set(outcome.computed) - set(SHARDED) == {"subset/clip_third", "subset/paper", "subset/inside", "catalog"}
    after = scenario.files()
    assert {name for name, state in before.items() if after.get(name) != state} == {
        "catalog.duckdb",
        "catalog/targets.parquet",
    }
    assert scenario.subset("paper").name == "v0002"
    assert scenario.subset("paper").lineage["source"]["rows"] == 4 * ROWS


@pytest.mark.usefixtures("finished")
def test_a_shard_that_was_only_touched_stops_at_the_pool(scenario: Scenario) -> None:
    scenario.run()
    os.utime(scenario.folder / "pool/00001.tar", ns=(1, 1))
    assert scenario.run().computed == {"raw_pool": ["00001"], "catalog": []}


@pytest.mark.usefixtures("finished")
def test_a_changed_shard_is_computed_again_with_all_that_follows(scenario: Scenario) -> None:
    scenario.run()
    scenario.write_shard("00001", text=b"another caption")
    outcome = scenario.run()
    assert {key: outcome.computed.get(key) for key in SHARDED} == {key: ["00001"] for key in SHARDED}
    assert "negatives/tiny" not in outcome.computed


@pytest.mark.usefixtures("finished")
def test_a_removed_shard_leaves_the_subsets_and_the_lake(scenario: Scenario) -> None:
    scenario.run()
    (scenario.folder / "pool/00001.tar").unlink()
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.removed == ["00001"]
    assert set(outcome.computed) == {"subset/clip_third", "subset/paper", "subset/inside", "catalog"}
    assert scenario.subset("clip_third").lineage["source"]["rows"] == 2 * ROWS
    assert not any("00001" in name for name in scenario.files())


@pytest.mark.parametrize(
    ("path", "value", "recomputed"),
    [
        (
            ["scores", "neg_clip_loss", "tiny", "temperature"],
            0.05,
            {"neg_clip_loss/tiny", "subset/paper", "catalog"},
        ),
        (
            ["scores", "neg_clip_loss", "tiny", "seed"],
            1,
            {"negatives/tiny", "neg_clip_loss/tiny", "subset/paper", "catalog"},
        ),
        (
            ["recipes", "clip_third", "steps"],
            [keep("clip_score/tiny", fraction=0.5)],
            {"subset/clip_third", "subset/inside", "catalog"},
        ),
        (["encoders", "tiny", "batch_size"], 7, {"catalog"}),
        (["pool", "min_side"], 20, {"raw_pool", "catalog"}),
    ],
)
@pytest.mark.usefixtures("finished")
def test_a_changed_setting_recomputes_just_what_depends_on_it(
    scenario: Scenario, path: list[str], value: Any, recomputed: set[str]
) -> None:
    scenario.run()
    scenario.set(*path, value=value)
    outcome = scenario.run()
    assert outcome.failures == {}
    assert set(outcome.computed) == recomputed


@pytest.mark.usefixtures("finished")
def test_another_target_image_is_embedded_and_norm_sim_follows(scenario: Scenario) -> None:
    scenario.run()
    (scenario.folder / "pets/cat/extra.jpg").write_bytes(
        (scenario.folder / "pets/dog").glob("*").__next__().read_bytes()
    )
    outcome = scenario.run()
    assert set(outcome.computed) == {
        "target_embeddings/tiny/pets",
        "norm_sim/tiny/pets",
        "subset/paper",
        "subset/inside",
        "catalog",
    }


@pytest.mark.usefixtures("finished")
def test_drawing_again_is_asked_for_and_then_every_score_follows(scenario: Scenario) -> None:
    scenario.run()
    scenario.write_shard("00003")
    assert "negatives/tiny" not in scenario.run().computed
    outcome = scenario.run(redraw=True)
    assert set(outcome.computed) == {"negatives/tiny", "neg_clip_loss/tiny", "subset/paper", "catalog"}
    assert outcome.computed["neg_clip_loss/tiny"] == [*SHARDS, "00003"]
    assert scenario.run().computed == {}


@pytest.mark.usefixtures("finished")
def test_negatives_are_drawn_again_at_the_chosen_growth_of_the_pool(scenario: Scenario) -> None:
    scenario.set("scores", "neg_clip_loss", "tiny", "redraw_at_growth", value=1.5)
    assert set(scenario.run().computed) <= {"catalog"}
    scenario.write_shard("00003")
    assert scenario.run().computed["neg_clip_loss/tiny"] == ["00003"]  # 48 rows of 36
    scenario.write_shard("00004", rows=6)
    outcome = scenario.run()  # 54 rows
    assert outcome.failures == {}
    assert "negatives/tiny" in outcome.computed
    assert set(outcome.computed["neg_clip_loss/tiny"]) == {*SHARDS, "00003", "00004"}
    stored = scenario.open().lake.stored("negatives/tiny")
    assert stored is not None
    assert stored.summary["shards_drawn_from"] == 5
    assert scenario.run().computed == {}


def test_negatives_follow_a_pool_that_was_too_small_for_them(scenario: Scenario) -> None:
    scenario.set("scores", "neg_clip_loss", "tiny", "batch_size", value=40)
    scenario.run()
    stored = scenario.open().lake.stored("negatives/tiny")
    assert stored is not None
    assert stored.summary["batch_size"] == 3 * ROWS
    assert "fewer than 40" in stored.summary["notes"]
    scenario.write_shard("00003")
    assert scenario.run().computed["neg_clip_loss/tiny"] == [*SHARDS, "00003"]
    assert scenario.run().computed == {}


@pytest.mark.usefixtures("finished")
def test_the_papers_estimator_completes_its_batches_from_the_same_negatives(scenario: Scenario) -> None:
    scenario.set("scores", "neg_clip_loss", "tiny", "estimator", value="random_partitions")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert "negatives/tiny" not in outcome.computed
    assert outcome.computed["neg_clip_loss/tiny"] == list(SHARDS)
    assert (scenario.scores("neg_clip_loss/tiny")["neg_clip_loss"] <= 0).all()


@pytest.mark.usefixtures("finished")
def test_another_arithmetic_scores_again_against_the_same_negatives(scenario: Scenario) -> None:
    scenario.run()
    exact = scenario.scores("neg_clip_loss/tiny")["neg_clip_loss"]
    scenario.set("scores", "neg_clip_loss", "tiny", "arithmetic", value="bfloat16")
    computed = scenario.run().computed
    assert computed["neg_clip_loss/tiny"] == [*SHARDS]
    assert not {"embeddings/tiny", "negatives/tiny", "clip_score/tiny"} & set(computed)
    rounded = scenario.scores("neg_clip_loss/tiny")["neg_clip_loss"]
    assert 0 < (rounded - exact).abs().max() < 0.01


def test_a_bad_shard_stops_nobody_and_is_named(scenario: Scenario) -> None:
    (scenario.folder / "pool/00001.tar").write_bytes(b"")
    outcome = scenario.run()
    assert set(outcome.failures) == {"raw_pool"}
    assert "00001.tar" in outcome.failures["raw_pool"]
    lineage = scenario.subset("paper").lineage
    assert set(lineage["shards"]) == {"00000", "00002"}
    assert set(lineage["shards_missing"]) == {"00001"}
    assert lineage["source"]["rows"] == 2 * ROWS

    scenario.write_shard("00001")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert scenario.subset("paper").lineage["shards_missing"] == {}
    assert scenario.subset("paper").lineage["source"]["rows"] == 3 * ROWS


def test_a_sample_in_two_shards_is_selected_once(scenario: Scenario) -> None:
    (scenario.folder / "pool/00007.tar").write_bytes((scenario.folder / "pool/00000.tar").read_bytes())
    scenario.run()
    source = scenario.subset("clip_third").lineage["source"]
    assert (source["rows"], source["duplicates"]) == (3 * ROWS, ROWS)
    assert scenario.manifest("clip_third")["uid"].is_unique().all()
    assert "00007" not in set(scenario.manifest("clip_third")["shard"])


def test_negatives_are_not_drawn_from_a_part_of_the_pool(scenario: Scenario) -> None:
    assert scenario.execute("raw_pool", "embeddings/tiny", shard="00000").success
    result = scenario.execute("negatives/tiny")
    assert not result.success
    failure = next(event for event in result.all_events if event.is_step_failure).step_failure_data
    assert "1 of the pool's 3 shards" in str(failure.user_failure_data.description)


@pytest.mark.parametrize("one", ["00001", None])
@pytest.mark.usefixtures("finished")
def test_shards_may_go_through_many_assets_in_one_run(scenario: Scenario, one: str | None) -> None:
    scenario.run()
    for shard in SHARDS:
        scenario.write_shard(shard, text=b"new words")
    tags = None if one else {RANGE_START: "00000", RANGE_END: "00002"}
    assert scenario.execute(shard=one, tags=tags).success
    done = [one] if one else list(SHARDS)
    for key in SHARDED:
        for shard in done:
            assert latest(scenario, key, shard) == scenario.open().lake.stored(key, shard).fingerprint
    left = [shard for shard in SHARDS if shard not in done]
    assert scenario.run().computed.get("embeddings/tiny", []) == left


def latest(scenario: Scenario, key: str, shard: str) -> str | None:
    record = scenario.instance.get_latest_data_version_record(dg.AssetKey(key.split("/")), partition_key=shard)
    assert record is not None
    assert record.asset_materialization is not None
    return (record.asset_materialization.tags or {}).get("dagster/data_version")


def test_every_shard_keeps_its_own_events_in_a_run_that_covers_many(scenario: Scenario) -> None:
    scenario.write_shard("00001", rows=5)
    scenario.run()
    for key in SHARDED:
        for shard in SHARDS:
            stored = scenario.open().lake.stored(key, shard)
            assert stored is not None
            asset = dg.AssetKey(key.split("/"))
            record = scenario.instance.get_latest_data_version_record(asset, partition_key=shard)
            assert record is not None
            event = record.asset_materialization
            assert event is not None
            assert event.metadata["dagster/partition_row_count"].value == (5 if shard == "00001" else ROWS)
            assert (event.tags or {})["dagster/data_version"] == stored.fingerprint
    assert len(scenario.instance.get_runs()) == len(EVERYTHING)


def test_dagster_calls_nothing_stale_after_a_pass_and_the_changed_shard_after_a_change(scenario: Scenario) -> None:
    scenario.run()
    assert not any(stale(scenario).values())
    scenario.write_shard("00001", text=b"other words")
    assert scenario.execute("raw_pool", shard="00001").success
    assert stale(scenario)["embeddings/tiny"] == {"00001"}


@pytest.mark.usefixtures("finished")
def test_the_lineage_record_names_what_the_subset_was_made_from(scenario: Scenario) -> None:
    scenario.run()
    lineage = scenario.subset("paper").lineage
    project = scenario.open()
    assert lineage["encoders"]["tiny"] == json.loads(json.dumps(project.models.encoder("tiny").identity()))
    assert lineage["temperatures"]["tiny"] == temperature(project, "tiny")
    assert lineage["inputs"]["negatives/tiny"]["seed"] == 0
    assert set(lineage["inputs"]) == {"negatives/tiny", "target_embeddings/tiny/pets"}
    for shard in SHARDS:
        for asset in ("raw_pool", "neg_clip_loss/tiny", "norm_sim/tiny/pets"):
            assert lineage["shards"][shard][asset] == project.lake.stored(asset, shard).fingerprint
    assert lineage["packages"]["duckdb"] == duckdb.__version__


def test_two_encoders_work_side_by_side(scenario: Scenario) -> None:
    tiny = scenario.document["encoders"]["tiny"]
    scenario.set("encoders", "other", value={**tiny, "precision": "bf16"})
    scenario.set("scores", value={"neg_clip_loss": {"tiny": {"batch_size": 8, "draws": 2}}})
    scenario.set(
        "recipes",
        "mixed",
        value={"steps": [keep("neg_clip_loss/tiny", fraction=0.5), keep("norm_sim_inf/other/pets", fraction=0.2)]},
    )
    outcome = scenario.run()
    assert outcome.failures == {}
    assert {"embeddings/other", "clip_score/other", "norm_sim/other/pets"} <= set(outcome.computed)
    assert len(scenario.manifest("mixed")) == 7
    assert set(scenario.subset("mixed").lineage["encoders"]) == {"tiny", "other"}


@pytest.mark.usefixtures("finished")
def test_the_catalog_explains_every_sample(scenario: Scenario) -> None:
    scenario.run()
    selected = set(scenario.manifest("paper")["uid"])
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        uids = [uid for (uid,) in con.execute("SELECT uid FROM pool").fetchall()]
        assert len(uids) == 3 * ROWS
        for uid in uids:
            verdicts = con.execute(
                "SELECT verdict FROM explain(?) WHERE recipe = 'paper' ORDER BY step", [uid]
            ).fetchall()
            assert (verdicts[-1] == ("kept",)) == (uid in selected)


def test_the_same_inputs_give_the_same_bytes(scenario: Scenario, tmp_path: Path) -> None:
    scenario.run()

    def contents() -> dict[str, bytes]:
        lake = scenario.folder / "lake"
        return {
            str(path.relative_to(lake)): path.read_bytes()
            for path in sorted(lake.rglob("*"))
            if path.suffix in (".parquet", ".arrow", ".npy") and ".dagster" not in path.parts
        }

    first = contents()
    assert len(first) > 20
    (scenario.folder / "lake").rename(tmp_path / "old")
    scenario.set("encoders", "tiny", "workers", value=2)
    scenario.run()
    assert contents() == first


def test_a_graph_has_the_keys_and_partitions_of_the_design(scenario: Scenario) -> None:
    _, graph = scenario.open_graph()
    found = {
        spec.key.to_user_string(): spec.partitions_def is not None
        for definition in graph.definitions
        for spec in definition.specs
    }
    exports = {"export/clip_third", "export/inside", "export/paper"}
    assert found == {key: key in SHARDED for key in EVERYTHING} | dict.fromkeys(exports, True)


@pytest.mark.usefixtures("finished")
def test_scores_lie_within_their_bounds(scenario: Scenario) -> None:
    scenario.run()
    loss, near = scenario.scores("neg_clip_loss/tiny"), scenario.scores("norm_sim/tiny/pets")
    assert (loss["neg_clip_loss"] <= 0).all()
    assert (scenario.scores("clip_score/tiny")["clip_score"].abs() <= 1.001).all()
    assert near["norm_sim_inf"].is_between(0, 1.001).all()
    assert near["nearest_target"].is_between(0, 5).all()
    assert isinstance(near, pl.DataFrame)


def test_a_changed_sample_that_is_in_a_draw_is_scored_against_its_own_pair(scenario: Scenario) -> None:
    """The draw holds the sample's old pair; the oracle adds the new one to the other rows of the draw."""
    scenario.set("scores", "neg_clip_loss", "tiny", value={"batch_size": 30, "draws": 1, "temperature": 0.05})
    scenario.run()
    scenario.write_shard("00001", text=b"words that were never there before")
    assert "negatives/tiny" not in scenario.run().computed

    lake = scenario.open().lake
    draws = pl.from_arrow(lake.read("negatives/tiny"))
    rows = pl.from_arrow(lake.read("embeddings/tiny", "00001"))
    assert rows.select("f0", "f1").row(0) in set(draws.select("f0", "f1").rows()[:-1])
    changed, first = np.array(rows["text"].to_list()), np.array(rows["image"].to_list())
    v, t = first[0].astype(np.float64), changed[0].astype(np.float64)
    drawn = {side: np.array(draws[side].to_list(), np.float64)[:-1] for side in ("image", "text")}
    own = v @ t
    columns = np.append(drawn["text"] @ v, own) / 0.05
    across = np.append(drawn["image"] @ t, own) / 0.05
    wanted = own - 0.05 / 2 * (np.logaddexp.reduce(columns) + np.logaddexp.reduce(across))
    found = scenario.scores("neg_clip_loss/tiny", ["00001"])["neg_clip_loss"][0]
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.usefixtures("finished")
def test_scores_do_not_join_an_encoder_with_the_targets_of_another(scenario: Scenario, tmp_path: Path) -> None:
    scenario.run()
    other = write_clip(tmp_path / "other_clip", TINY_CONFIG, seed=1)
    scenario.set("encoders", "tiny", "model", value=f"local-dir:{other}")
    for image in (scenario.folder / "pets").rglob("*.jpg"):
        image.write_bytes(b"no picture")
    outcome = scenario.run()
    assert "target_embeddings/tiny/pets" in outcome.failures
    assert "norm_sim/tiny/pets" not in outcome.computed
    assert scenario.subset("paper").name == "v0001"
    assert scenario.subset("clip_third").name == "v0002"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.npy", b"", "not a uid list.*Remedy"),
        ("list.npy", b"PK\x03\x04 a zip", "not a uid list.*Remedy"),
        ("list.txt", b"zz\n", "not a uid list.*'zz'.*Remedy"),
        ("list.txt", b"\n", "this uid list is empty"),
    ],
)
def test_a_bad_uid_list_is_named_with_the_remedy_and_stops_no_other_recipe(
    scenario: Scenario, name: str, content: bytes, message: str
) -> None:
    (scenario.folder / name).write_bytes(content)
    scenario.set("recipes", value={"good": {"steps": []}, "bad": {"from": name, "steps": []}})
    outcome = scenario.run()
    assert set(outcome.failures) == {"subset/bad"}
    assert re.search(rf"{re.escape(str(scenario.folder / name))}: {message}", outcome.failures["subset/bad"])
    assert len(scenario.manifest("good")) == 3 * ROWS
