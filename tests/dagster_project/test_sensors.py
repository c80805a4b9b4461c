"""Automation with real ticks and runs: new shards are computed, subsets follow, and no run is repeated.

Every test drives rounds of ticks until nothing is requested, compares the subset with what a headless pass over
the same pool selects, and counts the runs.
"""

from collections.abc import Sequence

import dagster as dg
import pytest

from assets.base.keys import SHARDS_NAME
from dagster_project.cli import main
from dagster_project.staleness import ATTEMPTS, RANGE_END, RANGE_START, ShardsPerRunError
from tests.support.automation import ROWS, SENSORS, Automation
from tests.support.pool_factory import datacomp_shard
from tests.support.scenario import keep

SELECT = "subset/best catalog"


CHAIN = "raw_pool embeddings/b32 clip_score/b32 neg_clip_loss/b32"


def chain(shards: str) -> list[tuple[str, str]]:
    """Return the run that new shards take once there are negatives."""
    return [(CHAIN, shards)]


def test_shards_that_arrive_together_share_runs_and_end_in_one_subset(automation: Automation) -> None:
    automation.write(*range(5))
    assert automation.settle() == [
        ("raw_pool embeddings/b32 clip_score/b32", "00000–00004"),
        ("negatives/b32", ""),
        ("neg_clip_loss/b32", "00000–00004"),
        (SELECT, ""),
    ]
    assert automation.subset().name == "v0001"
    automation.assert_as_headless()


def test_a_new_shard_costs_its_own_chain_and_one_subset(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.settle()
    automation.write(3)
    assert automation.settle() == [*chain("00003"), (SELECT, "")]
    automation.assert_nothing_is_left()


def test_a_tick_with_nothing_new_requests_nothing_and_says_so(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    cursors = dict(automation.cursors)
    assert automation.round() == 0
    assert automation.cursors == cursors
    assert automation.skipped["discover_shards"].startswith("The pool's 2 shards all have a partition")
    assert automation.skipped["follow_shards"] == "Nothing has changed; everything is up to date."
    assert automation.skipped["refresh_subsets"] == "Nothing has changed; everything is up to date."


def test_lost_cursors_lose_nothing_and_repeat_nothing(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.cursors.clear()
    assert automation.settle() == []
    automation.write(2)
    automation.cursors.clear()
    assert automation.settle() == [*chain("00002"), (SELECT, "")]


def test_a_shard_that_lands_while_the_subset_is_built_is_computed_at_once_and_in_the_next_one(
    automation: Automation,
) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.write(2)
    request = until_subset(automation)
    meanwhile: list[dg.RunRequest] = []

    def land() -> None:
        automation.write(3)
        automation.tick("discover_shards")
        meanwhile.extend(automation.tick("follow_shards"))
        assert automation.tick("refresh_subsets") == []
        assert automation.skipped["refresh_subsets"].startswith("Waiting for runs to end: ")

    assert automation.execute(request, meanwhile=land)
    assert [named(run) for run in meanwhile] == chain("00003")
    assert all(automation.execute(run) for run in meanwhile)
    assert automation.settle() == [(SELECT, "")]
    assert automation.subset().name == "v0003"
    automation.assert_as_headless()


def test_a_shard_that_lands_while_others_are_computed_starts_at_once_and_no_work_is_doubled(
    automation: Automation,
) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.write(2, 3)
    automation.tick("discover_shards")
    (first,) = automation.tick("follow_shards")
    second: list[dg.RunRequest] = []

    def land() -> None:
        assert automation.tick("follow_shards") == []
        assert automation.skipped["follow_shards"].startswith("Waiting for runs to end: ")
        cursor = automation.cursors["follow_shards"]
        assert automation.tick("follow_shards") == []
        assert automation.cursors["follow_shards"] == cursor
        automation.write(4)
        automation.tick("discover_shards")
        second.extend(automation.tick("follow_shards"))
        assert automation.tick("refresh_subsets") == []

    assert automation.execute(first, meanwhile=land)
    assert [named(run) for run in second] == chain("00004")
    assert all(automation.execute(run) for run in second)
    assert automation.settle() == [(SELECT, "")]
    assert automation.subset().name == "v0002"


def test_a_shard_that_changes_while_it_is_computed_waits_for_that_run(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.write(2)
    automation.tick("discover_shards")
    (first,) = automation.tick("follow_shards")

    def change() -> None:
        automation.write(2, seed=1)
        automation.write(0, seed=1)
        (request,) = automation.tick("follow_shards")
        assert named(request) == chain("00000")[0]

    automation.execute(first, meanwhile=change)
    assert automation.settle()[-1] == (SELECT, "")
    automation.assert_nothing_is_left()


def test_a_changed_shard_waits_for_a_run_that_reads_it_and_a_new_one_does_not(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    seen: list[tuple[str, str]] = []

    def land() -> None:
        automation.write(0, seed=1)
        automation.write(2)
        automation.tick("discover_shards")
        seen.extend(map(named, automation.tick("follow_shards")))

    redraw = dg.RunRequest(asset_selection=[dg.AssetKey(["negatives", "b32"])])
    assert automation.execute(redraw, meanwhile=land)
    assert seen == [("raw_pool embeddings/b32 clip_score/b32", "00002")]


def test_a_tick_records_what_compute_wrote_and_requests_only_the_rest(automation: Automation) -> None:
    automation.write(0, 1)
    automation.tick("discover_shards")
    assert main(["compute", str(automation.folder / "project.yaml"), "--asset", "raw_pool"]) == 0
    (request,) = automation.tick("follow_shards")
    assert named(request) == ("embeddings/b32 clip_score/b32", "00000–00001")
    known = automation.instance.fetch_materializations(dg.AssetKey("raw_pool"), limit=10).records
    assert {(record.partition_key, record.run_id) for record in known} == {("00000", ""), ("00001", "")}


def test_a_sensor_and_a_backfill_give_a_run_as_many_shards_as_the_environment_says(
    automation: Automation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_SELECTION_SHARDS_PER_RUN", "2")
    automation.load()
    automation.write(*range(5))
    automation.tick("discover_shards")
    runs = [named(request)[1] for request in automation.tick("follow_shards")]
    assert runs == ["00000–00001", "00002–00003", "00004"]
    graph = automation.defs.resolve_asset_graph()
    partitioned = [graph.get(key) for key in graph.get_all_asset_keys() if graph.get(key).is_partitioned]
    assert {node.backfill_policy for node in partitioned} == {dg.BackfillPolicy.multi_run(2)}
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("CLIP_SELECTION_SHARDS_PER_RUN", wrong)
        with pytest.raises(ShardsPerRunError, match="not a number of shards"):
            automation.load()


def test_a_shard_that_lands_in_the_tick_in_which_the_subset_ends_is_in_the_next_one(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.write(2)
    assert automation.execute(until_subset(automation))
    # The subset's run has ended; its sensor sees the end and the new shard in the same tick.
    automation.write(3)
    assert automation.tick("refresh_subsets") == []
    assert automation.settle() == [*chain("00003"), (SELECT, "")]
    assert automation.subset().name == "v0003"
    automation.assert_as_headless()


def named(request: dg.RunRequest) -> tuple[str, str]:
    """Return the assets of a run, and its first and last shard."""
    ends = dict.fromkeys(filter(None, (request.tags.get(RANGE_START), request.tags.get(RANGE_END))))
    return " ".join(key.to_user_string() for key in request.asset_selection or []), "–".join(ends)


def until_subset(automation: Automation) -> dg.RunRequest:
    """Tick and execute until the subset's run is requested; return that request without executing it."""
    for _ in range(20):
        for request in [request for name in SENSORS for request in automation.tick(name)]:
            if dg.AssetKey("catalog") in (request.asset_selection or []):
                return request
            assert automation.execute(request)
    raise AssertionError("the subset was not requested")


def test_a_shard_that_fails_is_tried_a_few_times_alone_and_the_subset_goes_on_without_it(
    automation: Automation,
) -> None:
    automation.write(0, 1, 2)
    automation.spoil(1)
    runs = automation.settle()
    assert runs[0] == ("raw_pool embeddings/b32 clip_score/b32", "00000–00002")
    alone = [keys for keys, shards in runs[1:] if "00001" in shards]
    assert len(alone) == ATTEMPTS - 1
    assert {keys.split()[0] for keys in alone} == {"raw_pool"}
    assert [("embeddings/b32 clip_score/b32", shard) in runs for shard in ("00000", "00002")] == [True, True]
    assert len([keys for keys, _ in runs if keys == SELECT]) == 1
    assert list(automation.subset().lineage["shards_missing"]) == ["00001"]
    quiet = "Nothing has changed; everything is up to date, except for 1 "
    assert automation.skipped["follow_shards"].startswith(quiet)
    automation.assert_as_headless()

    assert automation.settle() == []
    automation.write(7)
    assert automation.settle() == [*chain("00007"), (SELECT, "")]

    automation.write(1)
    assert automation.settle() == [*chain("00001"), (SELECT, "")]
    assert automation.subset().lineage["shards_missing"] == {}
    automation.assert_nothing_is_left()


def test_a_run_that_fails_for_a_passing_reason_is_made_again_and_no_other(automation: Automation) -> None:
    automation.write(0, 1)
    in_the_way = automation.folder / "lake/clip_score"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    while sum("clip_score" in keys for keys, _ in automation.runs) < ATTEMPTS - 1:
        automation.round()
    in_the_way.unlink()
    automation.settle()
    computed = [keys for runs, _ in automation.runs for keys in runs.split()]
    assert computed.count("clip_score/b32") == ATTEMPTS
    assert [computed.count(keys) for keys in ("raw_pool", "embeddings/b32", "negatives/b32", "neg_clip_loss/b32")] == [
        1
    ] * 4
    assert computed.count("subset/best") == 1
    automation.assert_nothing_is_left()


def test_a_reset_cursor_tries_again_what_was_left_alone(automation: Automation) -> None:
    automation.write(0, 1)
    automation.spoil(1)
    automation.settle()
    automation.cursors.pop("follow_shards")
    assert automation.settle() == [("raw_pool embeddings/b32 clip_score/b32", "00001")] * ATTEMPTS


def test_a_removed_shard_leaves_partitions_lake_and_subset(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.settle()
    automation.remove(1)
    assert automation.settle() == [(SELECT, "")]
    assert list(automation.instance.get_dynamic_partitions(SHARDS_NAME)) == ["00000", "00002"]
    assert not list((automation.folder / "lake").rglob("*00001*"))
    assert set(automation.subset().lineage["shards"]) == {"00000", "00002"}

    automation.write(1)
    assert automation.settle() == [*chain("00001"), (SELECT, "")]
    automation.assert_nothing_is_left()


def test_what_a_run_writes_of_a_shard_after_it_was_retired_is_cleared_away(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.settle()
    late = {path: path.read_bytes() for path in (automation.folder / "lake/raw_pool").iterdir() if "00001" in path.name}
    automation.remove(1)
    automation.settle()
    for path, data in late.items():
        path.write_bytes(data)
    automation.settle()
    assert not list((automation.folder / "lake").rglob("*00001*"))


def test_a_changed_shard_is_computed_again_alone(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.settle()
    before = automation.subset().lineage["shards"]
    automation.write(1, seed=1)
    assert automation.settle() == [*chain("00001"), (SELECT, "")]
    after = automation.subset().lineage["shards"]
    assert {shard for shard in after if after[shard] != before[shard]} == {"00001"}
    automation.assert_nothing_is_left()


def test_a_changed_setting_is_followed_after_a_reload(automation: Automation) -> None:
    automation.document["recipes"]["inside"] = {"from": "best", "steps": [keep("clip_score/b32", fraction=0.5)]}
    automation.load()
    automation.write(0, 1, 2)
    automation.settle()
    automation.document["scores"]["neg_clip_loss"]["b32"]["seed"] = 5
    automation.load()
    assert automation.settle() == [
        ("negatives/b32", ""),
        ("neg_clip_loss/b32", "00000–00002"),
        ("subset/best subset/inside catalog", ""),
    ]
    automation.document["recipes"]["inside"]["steps"] = [keep("clip_score/b32", count=1)]
    automation.load()
    assert automation.settle() == [("subset/inside catalog", "")]
    automation.assert_nothing_is_left()


def test_negatives_drawn_again_by_a_click_are_followed_by_every_score(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    automation.write(2)
    automation.settle()
    assert automation.defs.resolve_job_def("redraw_negatives").execute_in_process(instance=automation.instance).success
    assert automation.settle() == [("neg_clip_loss/b32", "00000–00002"), (SELECT, "")]
    automation.assert_nothing_is_left()


def test_scores_wait_for_negatives_that_may_be_drawn_again_and_no_run_fails(automation: Automation) -> None:
    automation.document["scores"]["neg_clip_loss"]["b32"]["redraw_at_growth"] = 2
    automation.load()
    automation.write(0, 1)
    automation.settle()
    automation.write(2, 3)
    assert automation.settle() == [
        ("raw_pool embeddings/b32 clip_score/b32", "00002–00003"),
        ("negatives/b32", ""),
        ("neg_clip_loss/b32", "00000–00003"),
        (SELECT, ""),
    ]
    assert {run.status for run in automation.instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
    automation.assert_nothing_is_left()


def test_more_than_a_hundred_shards_are_followed_exactly(automation: Automation) -> None:
    automation.document["scores"] = {"clip_score": [], "neg_clip_loss": {}}
    automation.document["recipes"] = {"best": {"steps": [{"where": "original_width >= 640"}]}}
    automation.load()
    automation.write(*range(104))
    assert [keys for keys, _ in automation.settle()] == ["raw_pool embeddings/b32", "subset/best catalog"]
    assert len(automation.subset().lineage["shards"]) == 104
    automation.write(17, 103, seed=1)
    automation.write(104)
    assert automation.settle() == [
        ("raw_pool embeddings/b32", "00017"),
        ("raw_pool embeddings/b32", "00103–00104"),
        ("subset/best catalog", ""),
    ]
    assert automation.subset().lineage["source"]["rows"] == 105 * ROWS
    automation.assert_nothing_is_left()


def test_a_subset_that_fails_is_tried_a_few_times_and_the_others_go_on(automation: Automation) -> None:
    automation.document["recipes"]["none"] = {"steps": [keep("clip_score/b32", fraction=0.001)]}
    automation.load()
    automation.write(0, 1)
    runs = automation.settle()
    assert runs[-1] == ("catalog", "")
    assert sum("subset/none" in keys for keys, _ in runs) == ATTEMPTS
    assert automation.subset().name == "v0001"
    reason = automation.skipped["refresh_subsets"]
    assert "subset/none" in reason or "except for 1" in reason
    assert automation.settle() == []


def test_a_file_that_the_yaml_refers_to_and_that_is_missing_is_reported_before_all_else_is_computed(
    automation: Automation, capfd: pytest.CaptureFixture[str]
) -> None:
    automation.document["external_scores"] = {"theirs": {"files": ["absent.csv"], "columns": ["score"]}}
    automation.document["recipes"]["listed"] = {"from": "absent.npy", "steps": [keep("clip_score/b32", count=1)]}
    automation.load()
    automation.write(0)
    automation.tick("discover_shards")
    assert automation.tick("follow_shards") != []
    reported = capfd.readouterr().err  # the tick's log
    assert "absent.csv: no such file" in reported
    assert "absent.npy: no such uid list" in reported
    assert "Needed by subset/listed." in reported
    automation.settle()
    assert automation.subset().lineage["rows"] == 1
    assert "absent.csv" in automation.skipped["follow_shards"]
    assert "absent.npy" in automation.skipped["follow_shards"]


def test_a_pool_that_is_not_mounted_retires_nothing(automation: Automation) -> None:
    automation.write(0, 1)
    automation.settle()
    pool = automation.folder / "pool"
    pool.rename(automation.folder / "away")
    assert automation.settle() == []
    assert all(automation.skipped[name].startswith("PoolError: ") for name in SENSORS)
    pool.mkdir()
    assert automation.settle() == []
    assert automation.skipped["discover_shards"].startswith("PoolError: ")
    pool.rmdir()
    (automation.folder / "away").rename(pool)
    assert automation.settle() == []
    assert list(automation.instance.get_dynamic_partitions(SHARDS_NAME)) == ["00000", "00001"]
    assert len(list((automation.folder / "lake/raw_pool").iterdir())) == 2


def test_a_shard_whose_name_can_be_no_partition_fails_alone(automation: Automation) -> None:
    automation.write(0)
    datacomp_shard(automation.folder / "pool", "a|b", ROWS)
    automation.round()
    usable, unusable = automation.instance.get_dynamic_partitions(SHARDS_NAME)
    assert usable == "00000"
    assert unusable.startswith("unusable-name-a_b-")
    assert [file.name for file in (automation.folder / "lake/raw_pool").iterdir()] == ["00000.parquet"]


def test_sensors_are_stopped_until_somebody_starts_them(automation: Automation) -> None:
    found = [automation.defs.resolve_sensor_def(name) for name in SENSORS]
    assert {sensor.default_status for sensor in found} == {dg.DefaultSensorStatus.STOPPED}


def test_a_requested_run_lists_its_shards_in_a_tag_that_the_ui_shows(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.tick("discover_shards")
    (request,) = automation.tick("follow_shards")
    assert request.tags["clip_selection/shards"] == "00000 to 00002: 3 shards"


CLICK = ["raw_pool", "embeddings/b32", "clip_score/b32", "neg_clip_loss/b32", "subset/best"]


def test_a_subset_chosen_together_with_one_shards_scores_is_what_it_would_be_alone(automation: Automation) -> None:
    automation.write(0, 1, 2)
    automation.settle()
    automation.write(1, seed=1)
    assert automation.execute(click("00001", CLICK))
    assert automation.settle() == [("catalog", "")]
    assert automation.subset().name == "v0002"
    automation.assert_nothing_is_left()


def test_a_subset_chosen_with_the_first_shards_scores_names_the_others_and_is_replaced(automation: Automation) -> None:
    automation.document["recipes"] = {"best": {"steps": [keep("clip_score/b32", fraction=0.5)]}}
    automation.load()
    automation.write(0, 1, 2)
    automation.tick("discover_shards")
    assert automation.execute(click("00001", ["raw_pool", "embeddings/b32", "clip_score/b32", "subset/best"]))
    assert list(automation.subset().lineage["shards"]) == ["00001"]
    assert list(automation.subset().lineage["shards_missing"]) == ["00000", "00002"]
    automation.settle()
    automation.assert_as_headless()


def click(shard: str, assets: Sequence[str]) -> dg.RunRequest:
    """Return the run that the UI launches for a selection of all kinds of assets and one shard."""
    keys = [dg.AssetKey(key.split("/")) for key in assets]
    return dg.RunRequest(asset_selection=keys, tags={"dagster/partition": shard})
