"""Day-to-day operation: killed runs, concurrency pools, old versions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus, PartitionBackfill

import dagster_project
from assets.base.keys import SHARDS_NAME
from dagster_project import cli
from dagster_project.dead_runs import at_work, close_dead_runs
from dagster_project.definitions import build_defs
from dagster_project.location import CONFIG_VARIABLE
from dagster_project.prune import old_runs
from dagster_project.staleness import RANGE_END, RANGE_START
from resources.catalog.build import read_catalog
from resources.lake.files import LakeError
from resources.lake.versions import Versions
from tests.support.history import age_runs, stale
from tests.support.scenario import SHARDS, Scenario, keep

OURS = Path(dagster_project.__file__).with_name("dagster.yaml")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the folder of an instance with the project's settings."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(OURS, home / "dagster.yaml")
    return home


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


def launch(scenario: Scenario, home: Path, shard: str) -> subprocess.Popen[bytes]:
    """Run every asset of one shard in another process, as the UI's launcher does."""
    dagster = Path(sys.executable).parent / "dagster"
    arguments = ["job", "execute", "-m", "dagster_project.definitions", "-j", "process_shards"]
    return subprocess.Popen(
        [dagster, *arguments, "--tags", json.dumps({RANGE_START: shard, RANGE_END: shard})],
        env={**os.environ, "DAGSTER_HOME": str(home), CONFIG_VARIABLE: str(scenario.folder / "project.yaml")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def holding_a_pool(instance: dg.DagsterInstance) -> set[str]:
    """Return the runs that have a place in a pool."""
    storage = instance.event_log_storage
    return {run for pool in storage.get_concurrency_keys() for run in storage.get_concurrency_info(pool).active_run_ids}


def is_finished(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether Dagster counts a run as ended."""
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.is_finished


def tick(scenario: Scenario, instance: dg.DagsterInstance, sensor: str = "follow_shards") -> dg.SensorResult:
    project, graph = scenario.open_graph()
    defs = build_defs(project, graph)
    return defs.resolve_sensor_def(sensor).evaluate_tick(dg.build_sensor_context(instance, definitions=defs))


@pytest.mark.slow
def test_a_run_from_the_ui_that_is_killed_is_ended_by_the_next_tick_and_holds_up_nothing(
    scenario: Scenario, home: Path, instance: dg.DagsterInstance
) -> None:
    scenario.open()
    scenario.write_shard("00003", rows=400)
    instance.add_dynamic_partitions(SHARDS_NAME, [*SHARDS, "00003"])
    process = launch(scenario, home, "00003")
    while not (holders := holding_a_pool(instance)):
        assert process.poll() is None, "the run ended by itself"
    (run,) = instance.get_runs()
    assert holders == {run.run_id}

    meanwhile = tick(scenario, instance)
    assert {request.tags[RANGE_END] for request in meanwhile.run_requests or ()} == {SHARDS[-1]}  # the others
    assert not is_finished(instance, run)

    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    requested = tick(scenario, instance)
    assert "00003" in {request.tags.get(RANGE_END) or request.partition_key for request in requested.run_requests or ()}
    assert is_finished(instance, run)
    assert not holding_a_pool(instance)
    assert not list((home / "processes").iterdir())


def test_a_run_that_another_machine_may_be_making_is_left_alone(instance: dg.DagsterInstance) -> None:
    elsewhere, here = (instance.create_run_for_job(dg.job(name=name)(lambda: None)) for name in ("elsewhere", "here"))
    with at_work(instance, here.run_id):
        close_dead_runs(instance)
    assert not is_finished(instance, elsewhere)
    assert not is_finished(instance, here)


def test_what_reads_whole_shards_and_what_computes_with_vectors_are_in_pools_of_one_step(
    scenario: Scenario, instance: dg.DagsterInstance
) -> None:
    project, graph = scenario.open_graph()
    nodes = {node.key: node.definition.op.pool for node in graph.nodes}
    nodes |= {key.to_user_string(): d.op.pool for d in graph.definitions for key in d.keys if key.path[0] == "export"}
    assert {key: pool for key, pool in nodes.items() if pool != "gpu"} == {
        "raw_pool": "cpu",
        **{f"export/{recipe}": "cpu" for recipe in project.settings.recipes},
    }
    assert {"embeddings/tiny", "neg_clip_loss/tiny", "negatives/tiny"} <= nodes.keys()
    assert instance.global_op_concurrency_default_limit == 1
    assert instance.get_concurrency_config().pool_config.pool_granularity.value == "op"


def test_dagster_gives_back_what_an_ended_run_holds_of_a_pool(instance: dg.DagsterInstance) -> None:
    assert instance.run_monitoring_enabled
    assert instance.run_monitoring_settings["free_slots_after_run_end_seconds"] == 60


# What is kept


def test_ticks_are_kept_as_long_as_the_page_says(instance: dg.DagsterInstance) -> None:
    kept = instance.get_tick_retention_settings(InstigatorType.SENSOR)
    assert {status.value: days for status, days in kept.items() if days > 0} == {
        "SKIPPED": 7,
        "SUCCESS": 90,
        "FAILURE": 90,
    }


def test_pruning_runs_deletes_those_whose_reports_are_superseded_and_nothing_becomes_stale(
    scenario: Scenario,
    instance: dg.DagsterInstance,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    scenario.instance = instance
    assert scenario.run().failures == {}
    first = {run.run_id for run in instance.get_runs()}
    every_shard = {RANGE_START: SHARDS[0], RANGE_END: SHARDS[-1]}
    # The first report of these is superseded, but embeddings were computed from the one, and subsets from the other.
    assert scenario.execute("raw_pool", tags=every_shard).success
    scenario.set("recipes", "inside", "steps", value=[keep("norm_sim_2/tiny/pets", count=1)])
    unpartitioned = ["negatives/tiny", "subset/clip_third", "subset/paper", "subset/inside", "catalog"]
    assert scenario.execute(*unpartitioned).success
    assert scenario.execute("clip_score/tiny", tags=every_shard).success
    assert not any(stale(scenario).values())
    failed, under_way = (instance.create_run_for_job(dg.job(name="any")(lambda: None)) for _ in range(2))
    instance.report_run_failed(failed)
    everything = {run.run_id for run in instance.get_runs()}
    arguments = ["prune", str(scenario.folder / "project.yaml"), "--runs-older-than", "30d"]

    age_runs(instance, timedelta(days=29))
    assert cli.main(arguments) == 0
    assert "runs: deleted: 0; as old, and kept for what they reported: 0\n" in capsys.readouterr().out
    age_runs(instance, timedelta(days=2))
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {run.run_id for run in instance.get_runs()} == everything

    assert cli.main(arguments) == 0
    assert not any(stale(scenario).values())
    kept = {run.run_id for run in instance.get_runs()}
    assert found == {"dry_run": True, "runs": found["runs"], "runs_kept": found["runs_kept"]}
    assert set(found["runs"]) == everything - kept
    assert set(found["runs_kept"]) == kept - {under_way.run_id}
    assert failed.run_id not in kept
    assert len(first - kept) == len(unpartitioned)
    assert everything - first - kept == {failed.run_id}
    for run in everything - kept:
        assert not list(home.glob(f"**/{run}*"))
    assert scenario.run().computed.keys() <= {"catalog"}


def test_runs_of_a_removed_shard_can_be_pruned(scenario: Scenario, instance: dg.DagsterInstance) -> None:
    scenario.instance = instance
    for shard in SHARDS[:2]:
        assert scenario.execute("raw_pool", shard=shard).success
    instance.delete_dynamic_partition(SHARDS_NAME, SHARDS[0])
    second, first = (run.run_id for run in instance.get_runs())
    found = old_runs(instance, datetime.now(UTC) + timedelta(minutes=1))
    assert (found.unneeded, found.needed) == ([first], [second])


@pytest.mark.parametrize("status", list(BulkActionStatus))
def test_runs_of_a_backfill_are_pruned_when_it_has_ended(
    instance: dg.DagsterInstance, status: BulkActionStatus
) -> None:
    backfill = PartitionBackfill("b", status, from_failure=False, tags={}, backfill_timestamp=0.0)
    instance.add_backfill(backfill)
    run = instance.create_run_for_job(dg.job(name="any")(lambda: None), tags={"dagster/backfill": "b"})
    instance.report_run_failed(run)
    ended = status in BULK_ACTION_TERMINAL_STATUSES or status is BulkActionStatus.COMPLETED_FAILED
    found = old_runs(instance, datetime.now(UTC) + timedelta(minutes=1))
    assert found.unneeded == ([run.run_id] if ended else [])


def test_pruning_deletes_old_versions_and_never_the_newest_and_the_catalog_forgets_them(
    scenario: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (3, 2, 1):
        scenario.set("recipes", "inside", "steps", value=[keep("norm_sim_2/tiny/pets", count=count)])
        # the last by itself, so that the catalog still tells of the one before
        assert scenario.run().failures == {} if count > 1 else scenario.execute("subset/inside").success
    project, config = scenario.open(), str(scenario.folder / "project.yaml")
    versions = Versions(project.lake, "inside")
    assert versions.names() == ["v0001", "v0002", "v0003"]
    files = scenario.files()
    assert cli.main(["prune", config, "--keep", "1", "--dry-run"]) == 0
    assert "subset/inside: to be deleted: v0001, v0002\n" in capsys.readouterr().out
    assert files.items() <= scenario.files().items()

    assert cli.main(["prune", config, "--keep", "1"]) == 0
    assert versions.names() == ["v0003"]
    gone = {path for path in files if path.startswith(("subset/inside/v0001/", "subset/inside/v0002/"))}
    assert scenario.files().keys() == files.keys() - gone
    with read_catalog(project.catalog_path()) as con:
        assert con.sql("SELECT version FROM versions('inside')").fetchall() == [("v0003",)]
        uid = scenario.manifest("inside")["uid"][0]
        said = con.sql("SELECT version FROM explain($uid) WHERE recipe = 'inside'", params={"uid": uid}).fetchall()
        assert set(said) == {("v0003",)}
    assert scenario.run().computed == {}
    scenario.set("recipes", "inside", "steps", value=[keep("norm_sim_2/tiny/pets", count=4)])
    scenario.run()
    assert versions.names() == ["v0003", "v0004"]

    with pytest.raises(LakeError, match="the newest version stays"):
        versions.remove("v0004")
    assert cli.main(["prune", config, "--keep", "0"]) == 2
