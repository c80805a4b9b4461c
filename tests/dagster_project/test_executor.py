"""Runs started from a terminal: one process, recorded as runs of the project's code location."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import REPOSITORY_LABEL_TAG

from dagster_project.executor import REPOSITORY, execute, one_process
from dagster_project.instance import SETTINGS

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    shutil.copy(SETTINGS, tmp_path / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


@dg.asset
def works(context: dg.AssetExecutionContext) -> None:
    context.add_output_metadata({"run": context.run.run_id})


@dg.asset
def fails() -> None:
    raise ZeroDivisionError


@pytest.fixture
def defs() -> dg.Definitions:
    return dg.Definitions(assets=[works, fails], executor=one_process)


def start(defs: dg.Definitions, instance: dg.DagsterInstance, *keys: str) -> dg.JobExecutionResult:
    job = defs.resolve_implicit_global_asset_job_def()
    return execute(
        job,
        instance,
        location="flowers",
        asset_selection=[dg.AssetKey(key) for key in keys],
        run_config=QUIET,
        tags={"by": "terminal"},
    )


def test_a_run_belongs_to_the_code_location_so_that_the_timeline_shows_it(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    result = start(defs, instance, "works")
    assert result.success
    filters = dg.RunsFilter(tags={REPOSITORY_LABEL_TAG: f"{REPOSITORY}@flowers"})
    (run,) = instance.get_runs(filters)
    assert run.run_id == result.run_id
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert run.tags["by"] == "terminal"
    assert run.remote_job_origin is not None
    assert run.remote_job_origin.location_name == "flowers"
    assert run.asset_selection == {works.key}


def test_the_only_repository_of_a_code_location_has_the_name_that_runs_are_recorded_under(defs: dg.Definitions) -> None:
    """Pins a constant of Dagster that no public name has."""
    assert defs.get_repository_def().name == REPOSITORY


def test_a_run_logs_the_events_that_dagsters_own_way_to_execute_a_job_logs(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    """Pins the private function that executes a run which has a code location."""
    ours = start(defs, instance, "works")
    job = defs.resolve_implicit_global_asset_job_def()
    dagsters = job.execute_in_process(instance=instance, asset_selection=[works.key], run_config=QUIET)
    assert [event.event_type for event in ours.all_events] == [event.event_type for event in dagsters.all_events]
    event = instance.fetch_materializations(works.key, limit=2).records[1].asset_materialization
    assert event is not None
    assert event.metadata["run"].value == ours.run_id


def test_a_failed_asset_raises_nothing_and_the_run_has_failed(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    result = start(defs, instance, "fails", "works")
    assert not result.success
    assert [event.step_key for event in result.all_events if event.is_step_failure] == ["fails"]
    assert instance.get_latest_materialization_event(works.key) is not None
    (run,) = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.FAILURE


def test_a_run_leaves_neither_a_lock_nor_an_open_file(
    defs: dg.Definitions, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert start(defs, instance, "works").success
    assert not list((tmp_path / "processes").iterdir())
    assert not list(tmp_path.rglob("*.db-wal"))
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before


def test_an_instance_in_memory_is_enough(defs: dg.Definitions) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert start(defs, instance, "works").success
