"""Estimates: from recorded runs, from a calibration, and as JSON and a job."""

import json

import dagster as dg
import pytest

from assets.base.engines import InProcess
from dagster_project.cli import main
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET
from dagster_project.plan.recorded import Deployment, fitted
from dagster_project.plan.report import Plan, document, make_plan
from tests.support.cascading import POOL, UPPER
from tests.support.scenario import ROWS, SHARDS, Scenario, keep


def plan(scenario: Scenario, *, calibration: bool = False) -> Plan:
    project, graph = scenario.open_graph()
    return make_plan(project, graph, scenario.instance, InProcess(), calibration=calibration)


def empty(scenario: Scenario) -> None:
    """Remove the lake's files; Dagster's records are elsewhere."""
    (scenario.folder / "lake").rename(scenario.folder / "earlier")


def test_what_is_fixed_and_the_rate_are_told_apart() -> None:
    rows = [100, 200, 50, 150]
    assert fitted(rows, [3 + 1.0, 2.0, 0.5, 1.5], 1) == pytest.approx((3.0, 0.01))
    # two workers: shards end in pairs
    assert fitted([100] * 6, [3 + 2.0, 0.0, 2.0, 0.0, 2.0, 0.0], 2) == pytest.approx((3.0, 0.01))
    assert fitted([100], [4.0], 1) == (0.0, 0.04)


def test_the_same_work_is_estimated_at_the_time_that_it_took(finished: Scenario) -> None:
    (run,) = finished.instance.get_run_records(
        dg.RunsFilter(tags={"clip_selection/by": "clip-select"}), limit=1, order_by="id", ascending=True
    )
    assert run.start_time is not None
    assert run.end_time is not None
    empty(finished)
    found = {estimate.work.asset: estimate for estimate in plan(finished).assets}
    assert {estimate.basis for estimate in found.values()} == {"recorded"}
    assert found["raw_pool"].seconds == pytest.approx(run.end_time - run.start_time, abs=0.01)
    assert found["raw_pool"].rows == ROWS * len(SHARDS)


def test_rates_of_changed_settings_are_not_used(finished: Scenario) -> None:
    finished.set("scores", "neg_clip_loss", value={"tiny": {"batch_size": 8, "draws": 2}})
    found = {estimate.work.asset: estimate for estimate in plan(finished).assets if estimate.work.due}
    assert found["neg_clip_loss/tiny"].seconds is None
    assert found["subset/paper"].seconds is not None


def test_an_encoder_of_a_subset_has_only_the_rows_that_it_keeps(
    computed_cascade: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(computed_cascade.document["encoders"]["large"], "precision", "amp_bf16")
    found = {estimate.work.asset: estimate for estimate in plan(computed_cascade).assets}
    assert found["embeddings/large"].rows == UPPER
    assert found["clip_score/large"].rows == POOL
    recipe = {"steps": [keep("clip_score/small", fraction=0.25)]}
    monkeypatch.setitem(computed_cascade.document["recipes"], "quarter", recipe)
    monkeypatch.setitem(computed_cascade.document["encoders"]["large"], "of", "subset/quarter")
    found = {estimate.work.asset: estimate for estimate in plan(computed_cascade).assets}
    assert found["embeddings/large"].rows == POOL // 4  # no version yet: as its recipe asks


def test_operations_and_bytes(finished: Scenario) -> None:
    rows = ROWS * len(SHARDS)
    finished.set("scores", "neg_clip_loss", value={"tiny": {"batch_size": 8, "draws": 2}})
    found = {estimate.work.asset: estimate for estimate in plan(finished).assets}
    project = finished.open()
    stored = project.lake.stored("embeddings/tiny", SHARDS[0])
    assert stored is not None
    dimensions = stored.summary["dimensions"]
    assert found["neg_clip_loss/tiny"].operations == 2 * 2 * rows * 2 * 8 * dimensions
    assert found["neg_clip_loss/tiny"].bytes_written == sum(
        (finished.folder / "lake/neg_clip_loss/tiny" / f"{shard}.parquet").stat().st_size for shard in SHARDS
    )


def test_a_calibration_measures_every_asset_and_leaves_the_lake_alone(scenario: Scenario) -> None:
    found = plan(scenario, calibration=True)
    assert found.sources.calibrated is not None
    assert found.sources.calibrated.failed == {}
    assert {estimate.basis for estimate in found.assets} == {"calibrated", "arithmetic"}
    assert found.sources.pool.total == ROWS * len(SHARDS)
    assert found.seconds.keys() == {Deployment()}
    assert not (scenario.folder / "lake").exists()


def test_a_pool_that_cannot_be_read_has_no_estimate_and_the_reason(scenario: Scenario) -> None:
    for shard in SHARDS:
        (scenario.folder / "pool" / f"{shard}.tar").write_bytes(b"")
    found = {estimate.work.asset: estimate for estimate in plan(scenario, calibration=True).assets}
    assert found["embeddings/tiny"].seconds is None
    assert found["raw_pool"].work.due


def test_the_json_document(finished: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    finished.write_shard("00003")
    finished.open()
    assert main(["plan", str(finished.folder / "project.yaml"), "--no-calibration", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_asset = {asset["asset"]: asset for asset in found["assets"]}
    assert by_asset["raw_pool"]["shards"] == ["00003"]
    assert by_asset["raw_pool"]["rows"] == pytest.approx(ROWS, abs=2)
    assert found["pool"]["rows_are_estimated"] is True


def test_the_job_shows_the_plan_in_the_ui(finished: Scenario) -> None:
    empty(finished)
    project, graph = finished.open_graph()
    job = build_defs(project, graph).resolve_job_def("plan")
    result = job.execute_in_process(instance=finished.instance, run_config=QUIET)
    (output,) = (event for event in result.all_events if event.is_successful_output)
    metadata = output.event_specific_data.metadata
    assert document(plan(finished))["bytes_read"] == metadata["plan"].value["bytes_read"]
    assert "| raw_pool | 3 of 3 |" in metadata["assets"].value
