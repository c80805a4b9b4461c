"""Keeping the event log's files open changes no result."""

import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterEventType
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage

from dagster_project.sqlite_event_log import kept_open

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def files(instance: dg.DagsterInstance) -> Path:
    """Return the folder of the event log."""
    assert isinstance(instance.event_log_storage, SqliteEventLogStorage)
    return Path(instance.event_log_storage.path_for_shard("index")).parent


@dg.asset(check_specs=[dg.AssetCheckSpec("holds", asset="logged")])
def logged(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    context.log.info("at work")
    return dg.MaterializeResult(metadata={"rows": 3}, check_results=[dg.AssetCheckResult(passed=True)])


def events(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    return [record.message for record in instance.all_logs(run_id) if record.user_message or record.is_dagster_event]


def run(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return dg.materialize([logged], instance=instance, run_config=QUIET)


def test_a_run_with_files_kept_open_logs_what_any_run_logs(instance: dg.DagsterInstance) -> None:
    plain = run(instance)
    with kept_open(instance):
        kept = run(instance)
    types = [[event.event_type for event in result.all_events] for result in (plain, kept)]
    assert types[0] == types[1]
    assert len(events(instance, plain.run_id)) == len(events(instance, kept.run_id)) > 10
    records = instance.fetch_materializations(logged.key, limit=10).records
    assert [record.run_id for record in records] == [kept.run_id, plain.run_id]
    checks = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(logged.key, "holds"), limit=10
    )
    assert [(check.run_id, check.status.value) for check in checks] == [
        (kept.run_id, "SUCCEEDED"),
        (plain.run_id, "SUCCEEDED"),
    ]


def test_another_process_reads_and_writes_events_meanwhile(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    with kept_open(instance), dg.DagsterInstance.local_temp(str(tmp_path)) as other:
        first = run(instance)
        assert len(other.fetch_materializations(logged.key, limit=10).records) == 1
        second = run(other)
        third = run(instance)
        records = instance.fetch_materializations(logged.key, limit=10).records
        assert [record.run_id for record in records] == [third.run_id, second.run_id, first.run_id]


def test_a_watched_run_tells_the_web_server_of_every_event(instance: dg.DagsterInstance) -> None:
    with kept_open(instance):
        first = run(instance)
        watching = SqliteEventLogStorage(str(files(instance)))
        cursor = watching.get_records_for_run(first.run_id).cursor
        seen, told = [], threading.Event()

        def callback(event: dg.EventLogEntry, _: str) -> None:
            seen.append(event.message)
            told.set()

        watching.watch(first.run_id, cursor, callback)
        instance.report_engine_event("one more", first.dagster_run)
        assert told.wait(20), "the watcher was not woken"
        watching.end_watch(first.run_id, callback)
        watching.dispose()
    assert seen == ["one more"]


def test_what_fails_leaves_no_trace_and_the_files_usable(instance: dg.DagsterInstance) -> None:
    storage = instance.event_log_storage
    assert isinstance(storage, SqliteEventLogStorage)
    with kept_open(instance):
        run(instance)
        with pytest.raises(ZeroDivisionError), storage.index_connection() as connection:
            connection.exec_driver_sql("DELETE FROM event_logs")
            raise ZeroDivisionError
        assert len(instance.fetch_materializations(logged.key, limit=10).records) == 1


def test_the_files_are_closed_behind_the_block(instance: dg.DagsterInstance) -> None:
    """SQLite removes its own log when the last connection closes."""
    with kept_open(instance), kept_open(instance):
        result = run(instance)
        assert (files(instance) / f"{result.run_id}.db-wal").exists()
    assert not list(files(instance).glob("*.db-wal"))
    run(instance)
    assert instance.get_latest_materialization_event(logged.key) is not None


def test_a_log_that_is_not_in_files_is_left_as_it_is() -> None:
    with dg.DagsterInstance.ephemeral() as instance, kept_open(instance):
        result = run(instance)
    assert DagsterEventType.ASSET_MATERIALIZATION in {event.event_type for event in result.all_events}
