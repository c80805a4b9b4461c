"""Checks before a file is written: what they find, what a failure stops, and the results in Dagster."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml

from assets.base.checks import Tables
from assets.base.context import Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.shard import Shard
from assets.scores.clip_score import clip_score
from assets.scores.drift import rank_correlation, sides
from assets.settings import ConfigError, open_project
from assets.subsets.checks import examine_subset
from core.uids import UID_DTYPE
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET
from dagster_project.resources import build_resources
from dagster_project.staleness import RANGE_END, RANGE_START
from resources.lake.files import column_to_vectors, vectors_to_column
from tests.support.corruption import Spoil, put, swapped
from tests.support.pool_factory import datacomp_shard, sample
from tests.support.scenario import ROWS, SHARDS, Scenario
from tests.support.steps import checks_of, findings, node_of

ALL = {RANGE_START: SHARDS[0], RANGE_END: SHARDS[-1]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """A project with every asset computed, for tests that change nothing."""
    scenario = Scenario(tmp_path_factory.mktemp("made"), tiny_clip)
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


def statuses(instance: dg.DagsterInstance, asset: str, check: str) -> dict[str | None, str]:
    """Return a check's latest status by partition."""
    key = dg.AssetCheckKey(dg.AssetKey(asset.split("/")), check)
    records = instance.event_log_storage.get_asset_check_execution_history(key, limit=50)
    return {record.partition: record.status.value for record in reversed(records)}


def evaluation(instance: dg.DagsterInstance, asset: str, check: str) -> dg.AssetCheckEvaluation:
    """Return a check's latest result."""
    key = dg.AssetCheckKey(dg.AssetKey(asset.split("/")), check)
    (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    assert record.event is not None
    return record.event.dagster_event.asset_check_evaluation_data


def launch_checks(scenario: Scenario, asset: str, *names: str, shard: str | None = None) -> bool:
    """Run checks without their asset, as the UI's button does."""
    project, graph = scenario.open_graph()
    keys = {dg.AssetCheckKey(dg.AssetKey(asset.split("/")), name) for name in names}
    job = build_defs(project, graph).resolve_implicit_global_asset_job_def()
    result = job.get_subset(asset_selection=set(), asset_check_selection=keys).execute_in_process(
        instance=scenario.instance, partition_key=shard, run_config=QUIET
    )
    return result.success


def stretched(column: str, factor: float) -> Spoil:
    def spoil(table: pa.Table) -> pa.Table:
        vectors = column_to_vectors(table[column]).copy()
        vectors[3] *= np.float16(factor)
        return table.set_column(table.column_names.index(column), column, vectors_to_column(vectors))

    return spoil


def without_first(table: pa.Table) -> pa.Table:
    return table.slice(1)


def repeating(table: pa.Table) -> pa.Table:
    return table.take([0, 0, *range(2, table.num_rows)])


# What Dagster does; the design relies on it


SHARDS_OF_PINS = dg.DynamicPartitionsDefinition(name="pins")


@pytest.fixture
def pinned() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("pins", ["a", "b", "c"])
        yield instance


@pytest.mark.filterwarnings("ignore::dagster.PreviewWarning", "ignore::dagster.BetaWarning")
def test_a_declared_check_may_stay_without_result_in_a_subsettable_asset_alone(pinned: dg.DagsterInstance) -> None:
    spec = dg.AssetCheckSpec("fine", asset="x", partitions_def=SHARDS_OF_PINS)
    policy = dg.BackfillPolicy.single_run()

    @dg.asset(key="x", check_specs=[spec], partitions_def=SHARDS_OF_PINS, backfill_policy=policy, output_required=False)
    def plain() -> Iterator[dg.MaterializeResult]:
        yield from ()

    @dg.multi_asset(
        specs=[dg.AssetSpec("x", skippable=True)],
        check_specs=[spec],
        can_subset=True,
        partitions_def=SHARDS_OF_PINS,
        backfill_policy=policy,
    )
    def subsettable() -> Iterator[dg.MaterializeResult]:
        yield from ()

    tags = {RANGE_START: "a", RANGE_END: "c"}
    for body, succeeds in ((plain, False), (subsettable, True)):
        job = dg.Definitions(assets=[body]).resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(instance=pinned, tags=tags, run_config=QUIET, raise_on_error=False)
        assert result.success is succeeds


def test_the_absent_result_of_a_blocking_check_holds_nothing_back_and_a_failed_one_does(
    pinned: dg.DagsterInstance,
) -> None:
    @dg.asset(check_specs=[dg.AssetCheckSpec("fine", asset="failing", blocking=True)])
    def failing() -> dg.MaterializeResult:
        return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=False)])

    @dg.multi_asset(
        specs=[dg.AssetSpec("logging", skippable=True)],
        check_specs=[dg.AssetCheckSpec("fine", asset="logging", blocking=True)],
        can_subset=True,
    )
    def logging(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        yield dg.MaterializeResult()
        context.log_event(dg.AssetCheckEvaluation(dg.AssetKey("logging"), "fine", passed=False, blocking=True))

    @dg.asset(deps=["failing"])
    def after_failing() -> None: ...

    @dg.asset(deps=["logging"])
    def after_logging() -> None: ...

    defs = dg.Definitions(assets=[failing, logging, after_failing, after_logging])
    job = defs.resolve_implicit_global_asset_job_def()
    assert not job.execute_in_process(instance=pinned, run_config=QUIET, raise_on_error=False).success
    assert pinned.get_latest_materialization_event(dg.AssetKey("after_logging")) is not None
    assert pinned.get_latest_materialization_event(dg.AssetKey("after_failing")) is None


def test_dagster_is_told_which_checks_block(made: Scenario) -> None:
    _, graph = made.open_graph()
    specs = [spec for definition in graph.definitions for spec in definition.check_specs]
    assert {spec.name for spec in specs if not spec.blocking} == {"drift", "uids_unique_across_shards"}
    assert {spec.name for spec in specs if spec.blocking} == {
        "draws_complete",
        "rows_aligned",
        "rows_and_rejects",
        "size",
        "uids_sorted_and_unique",
        "uids_unique",
        "unit_norm",
        "within_bounds",
    }


# What each check finds


@pytest.mark.parametrize(
    ("asset", "check", "spoil"),
    [
        ("raw_pool", "rows_and_rejects", without_first),
        ("raw_pool", "rows_and_rejects", put("source_row", 4, 3)),
        ("raw_pool", "uids_unique", repeating),
        ("raw_pool", "uids_unique", put("uid", 5, "f" * 32)),
        ("embeddings/tiny", "rows_aligned", swapped),
        ("embeddings/tiny", "rows_aligned", without_first),
        ("embeddings/tiny", "unit_norm", stretched("image", 1.1)),
        ("embeddings/tiny", "unit_norm", stretched("text", float("nan"))),
        ("clip_score/tiny", "rows_aligned", swapped),
        ("clip_score/tiny", "within_bounds", put("clip_score", 2, 1.01)),
        ("clip_score/tiny", "within_bounds", put("clip_score", 2, float("nan"))),
        ("neg_clip_loss/tiny", "within_bounds", put("neg_clip_loss", 0, 0.001)),
        ("neg_clip_loss/tiny", "within_bounds", put("neg_clip_loss", 0, float("-inf"))),
        ("norm_sim/tiny/pets", "within_bounds", put("norm_sim_inf", 1, -0.01)),
        ("norm_sim/tiny/pets", "within_bounds", put("norm_sim_2", 1, 100.0)),
        ("norm_sim/tiny/pets", "within_bounds", put("nearest_target", 1, 10_000)),
    ],
)
def test_a_spoiled_shard_fails_its_check_and_the_true_one_passes(
    made: Scenario, asset: str, check: str, spoil: Spoil
) -> None:
    project = made.open()
    table = project.lake.read(asset, SHARDS[0])
    assert all(found["passed"] for found in findings(project, asset, SHARDS[0]).values())
    found = findings(project, asset, SHARDS[0], {asset: spoil(table)})[check]
    assert not found["passed"]
    assert found["why"]


@pytest.mark.parametrize(
    ("check", "spoil"),
    [
        ("draws_complete", without_first),
        ("draws_complete", repeating),
        ("draws_complete", swapped),
        ("unit_norm", stretched("text", 0.9)),
    ],
)
def test_spoiled_negatives_fail_their_check(made: Scenario, check: str, spoil: Spoil) -> None:
    project = made.open()
    table = project.lake.read("negatives/tiny")
    assert all(found["passed"] for found in findings(project, "negatives/tiny", None).values())
    assert not findings(project, "negatives/tiny", None, {"negatives/tiny": spoil(table)})[check]["passed"]


def test_clip_scores_far_from_the_pools_own_warn(tmp_path: Path) -> None:
    datacomp_shard(tmp_path / "pool", rows=6)
    (tmp_path / "project.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "imported",
                "lake": "lake",
                "pool": {"path": "pool", "format": "datacomp"},
                "encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}},
            }
        )
    )
    project = open_project(tmp_path / "project.yaml")
    rows = project.pool.read_shard("00000").rows
    own = rows["clip_b32_similarity_score"].to_numpy()
    (check,) = [c for c in checks_of(project, "clip_score/b32") if c.name == "near_the_pools_own"]
    for off, passed in ((0.019, True), (0.021, False)):
        scores = own.copy()
        scores[2] += np.float32(off)
        table = pa.table({"clip_score": scores})
        new = {"raw_pool": rows, "clip_score/b32": table}
        found = check.run(Tables(Snapshot(project), "clip_score/b32", "00000", new))
        assert (found.passed, found.figures["rows_compared"]) == (passed, 6)
        assert found.figures["largest_difference"] == pytest.approx(off, abs=1e-5)
    assert not check.blocking


def subset_of(made: Scenario, recipe: str) -> tuple[dict[str, Any], pa.Table, np.ndarray]:
    return made.subset(recipe).lineage, made.manifest(recipe).select("f0", "f1").to_arrow(), made.array(recipe)


def test_a_subset_passes_its_checks(made: Scenario) -> None:
    for recipe in ("clip_third", "paper", "inside"):
        assert all(found["passed"] for found in examine_subset(*subset_of(made, recipe), {}).values())
        for check in ("size", "uids_sorted_and_unique", "uids_unique_across_shards"):
            assert statuses(made.instance, f"subset/{recipe}", check) == {None: "SUCCEEDED"}


def test_a_step_that_kept_one_row_less_than_the_floor_rule_fails_the_size(made: Scenario) -> None:
    lineage, manifest, uids = subset_of(made, "paper")
    steps = [lineage["steps"][0], lineage["steps"][1] | {"kept": 8}]
    found = examine_subset(lineage | {"steps": steps, "rows": 8}, manifest.slice(1), uids[1:], {})
    assert "8 of 18 rows kept, not 9 of 18" in found["size"]["why"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda uids: uids[::-1], "row 1 is not above"),
        (lambda uids: np.concatenate([uids[:1], uids[:-1]]), "row 1 is not above"),
        (lambda uids: uids[:-1], "not the manifest's"),
        (lambda uids: uids.astype([("f0", "i8"), ("f1", "i8")]), "dtype"),
    ],
)
def test_an_array_that_the_resharder_would_misread_fails(
    made: Scenario, spoil: Callable[[np.ndarray], np.ndarray], why: str
) -> None:
    lineage, manifest, uids = subset_of(made, "clip_third")
    assert uids.dtype == UID_DTYPE
    assert why in examine_subset(lineage, manifest, spoil(uids), {})["uids_sorted_and_unique"]["why"]


def test_a_uid_in_two_shards_warns_and_blocks_nothing(scenario: Scenario) -> None:
    scenario.write_shard("00001", meta=sample(0, "00000").meta)
    assert scenario.run().failures == {}
    found = evaluation(scenario.instance, "subset/clip_third", "uids_unique_across_shards")
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.metadata["duplicates_left_out"].value == 1


# What Dagster hears


def test_every_shard_of_a_run_has_its_own_results(made: Scenario) -> None:
    for asset in ("raw_pool", "embeddings/tiny", "clip_score/tiny", "neg_clip_loss/tiny", "norm_sim/tiny/pets"):
        for check in checks_of(made.open(), asset):
            assert statuses(made.instance, asset, check.name) == dict.fromkeys(SHARDS, "SUCCEEDED")
    assert evaluation(made.instance, "raw_pool", "rows_and_rejects").metadata["samples_seen"].value == ROWS


def test_each_result_is_about_its_shards_latest_materialization(made: Scenario) -> None:
    keys = [dg.AssetCheckKey(dg.AssetKey(["clip_score", "tiny"]), name) for name in ("rows_aligned", "within_bounds")]
    found = made.instance.event_log_storage.get_asset_check_partition_info(keys)
    assert {(info.check_key.name, info.partition_key) for info in found} == {(k.name, s) for k in keys for s in SHARDS}
    assert all(info.is_current and info.latest_target_materialization_storage_id for info in found)


@pytest.mark.usefixtures("finished")
def test_a_fresh_shard_tells_its_results_again(scenario: Scenario) -> None:
    scenario.run()
    before = scenario.files()
    assert scenario.execute("clip_score/tiny", shard=SHARDS[1]).success
    assert statuses(scenario.instance, "clip_score/tiny", "within_bounds") == dict.fromkeys(SHARDS, "SUCCEEDED")
    assert scenario.files() == before


@pytest.mark.usefixtures("finished")
def test_a_shard_that_fails_a_check_is_not_written_and_the_others_are(scenario: Scenario) -> None:
    scenario.run()
    project = scenario.open()
    project.lake.remove("clip_score/tiny", SHARDS[1])

    @partitioned(
        key="clip_score/{encoder}",
        deps=["embeddings/{encoder}"],
        columns=clip_score.columns,
        checks=clip_score.checks,
        code_version="broken",
        group_name="scores",
        kinds=set(),
        description="An encoder that has gone wrong in one shard.",
    )
    def broken(shard: Shard) -> Result:
        scores = np.full(shard.embeddings.num_rows, 7.0 if shard.name == SHARDS[1] else 0.5, np.float32)
        return shard.scores(clip_score=scores)

    assets = {"embeddings/tiny": node_of(project, "embeddings/tiny")}
    asset = broken.build(broken.declare(project.settings, encoder="tiny"), project, assets)
    resources = build_resources(project.settings)
    job = dg.Definitions(assets=[asset.definition], resources=resources).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=scenario.instance, tags=ALL, run_config=QUIET, raise_on_error=False)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "within_bounds: clip_score: 12 rows" in failure.step_failure_data.user_failure_data.description
    assert statuses(scenario.instance, "clip_score/tiny", "within_bounds") == {
        SHARDS[0]: "SUCCEEDED",
        SHARDS[1]: "FAILED",
        SHARDS[2]: "SUCCEEDED",
    }
    assert project.lake.shards("clip_score/tiny") == [SHARDS[0], SHARDS[2]]


@pytest.mark.usefixtures("finished")
def test_a_check_launched_by_itself_looks_at_the_file_that_is_there(scenario: Scenario) -> None:
    scenario.run()
    lake = scenario.open().lake
    stored = lake.stored("clip_score/tiny", SHARDS[0])
    table = put("clip_score", 2, 1.5)(lake.read("clip_score/tiny", SHARDS[0]))
    lake.write(table, stored.provenance, summary=stored.summary)
    before = scenario.files()
    assert launch_checks(scenario, "clip_score/tiny", "within_bounds", shard=SHARDS[0])
    assert statuses(scenario.instance, "clip_score/tiny", "within_bounds")[SHARDS[0]] == "FAILED"
    assert set(scenario.files().items()) - set(before.items()) == {
        (name, mark)
        for name, mark in scenario.files().items()
        if name == f"checks/clip_score/tiny/{SHARDS[0]}/within_bounds.json"
    }


# Drift of the negatives


def test_no_pass_measures_drift(made: Scenario) -> None:
    assert "SUCCEEDED" not in statuses(made.instance, "negatives/tiny", "drift").values()
    assert "FAILED" not in statuses(made.instance, "negatives/tiny", "drift").values()


def test_a_pool_that_has_not_changed_has_not_drifted(made: Scenario) -> None:
    assert launch_checks(made, "negatives/tiny", "drift")
    found = evaluation(made.instance, "negatives/tiny", "drift")
    figures = {name: value.value for name, value in found.metadata.items()}
    assert found.passed
    assert figures == {
        "growth": 1.0,
        "limit/rank_correlation": 0.98,
        "limit/changed": 0.02,
        "probe_rows": 8,
        "rank_correlation": 1.0,
        "mean_shift": 0.0,
        "largest_change": 0.0,
        "draws_replaced": 0.0,
        "changed_sides/paper/step1": 0,
        "overlap/paper/step1": 1.0,
        "verdict": "The pool has 1.00 times the rows that the negatives were drawn from. A fresh draw would score "
        "almost the same: rank correlation 1.000 (limit 0.98), 0.0% of the probe rows change sides at a threshold "
        "(limit 2.0%), selection overlap 100.0%. Nothing to do.",
    }


def test_drift_says_what_drawing_again_would_change_and_warns_past_its_limit(scenario: Scenario) -> None:
    scenario.set("scores", "neg_clip_loss", "tiny", value={"batch_size": 24, "draws": 2})  # enough rows to change ranks
    scenario.run()
    before = scenario.open().lake.stored("negatives/tiny")
    for shard in ("00003", "00004", "00005"):
        scenario.write_shard(shard)
    scenario.run()
    scenario.set("scores", "drift", value={"rank_correlation": 1.0, "changed": 0.1, "probe": 20})
    assert launch_checks(scenario, "negatives/tiny", "drift")
    found = evaluation(scenario.instance, "negatives/tiny", "drift")
    figures = {name: value.value for name, value in found.metadata.items()}
    assert scenario.open().lake.stored("negatives/tiny") == before
    assert figures["probe_rows"] == 20
    assert -1 <= figures["rank_correlation"] < 1
    assert 0 < figures["draws_replaced"] < 1

    uids = pl.from_arrow(scenario.open().lake.read("negatives/tiny").select(["draw", "f0", "f1"]))
    old = scenario.scores("neg_clip_loss/tiny", [*SHARDS, "00003", "00004", "00005"])
    scenario.run(redraw=True)
    again = pl.from_arrow(scenario.open().lake.read("negatives/tiny").select(["draw", "rank", "f0", "f1"]))
    new = scenario.scores("neg_clip_loss/tiny", [*SHARDS, "00003", "00004", "00005"])
    probe = again.filter((pl.col("draw") == 0) & (pl.col("rank") < 20)).select("f0", "f1")
    pair = probe.join(old, on=["f0", "f1"]).join(new, on=["f0", "f1"], suffix="_new")
    moved = (pair["neg_clip_loss_new"] - pair["neg_clip_loss"]).to_numpy()
    assert figures["mean_shift"] == pytest.approx(moved.mean(), abs=1e-6)
    assert figures["largest_change"] == pytest.approx(np.abs(moved).max(), abs=1e-6)
    kept = again.join(uids, on=["draw", "f0", "f1"], how="semi").height / again.height
    assert figures["draws_replaced"] == pytest.approx(1 - kept)
    assert not found.passed
    assert "Remedy: draw again" in found.metadata["why"].value
    assert found.metadata["browse"].value == "http://127.0.0.1:3002/"
    assert found.severity is dg.AssetCheckSeverity.WARN


@pytest.mark.usefixtures("finished")
def test_the_yaml_says_when_drift_warns_and_no_result_depends_on_it(scenario: Scenario) -> None:
    scenario.run()
    scenario.set("scores", "drift", value={"changed": 0.5})
    assert scenario.run().computed.keys() == {"catalog"}  # it is built again whenever the YAML was touched
    scenario.set("scores", "drift", value={"changed": 1.1})
    with pytest.raises(ConfigError, match=r"scores\.drift\.changed"):
        scenario.open()


def test_rank_correlation_is_spearmans() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(a, np.array([1.0, 3.0, 2.0, 5.0, 4.0])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # equal values share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3
    tied = rank_correlation(np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 2.0]))
    assert tied == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])


def test_a_common_shift_moves_nobody_across_a_ranks_threshold_but_across_a_fixed_one() -> None:
    before = np.array([-0.1, -0.2, -0.3, -0.4])
    for after, ranked, changed in (
        (before - 0.15, True, 0),
        (before - 0.15, False, 1),
        (before[[0, 2, 1, 3]], True, 2),
    ):
        kept, again = sides(before, after, -0.25, ranked=ranked)
        assert kept.tolist() == [True, True, False, False]
        assert (kept != again).sum() == changed
