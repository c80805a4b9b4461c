"""Keeping the event log's files open changes nothing but the time it takes."""

import inspect
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterEventType
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME

from dagster_project import sqlite_event_log
from dagster_project.instance import SETTINGS
from dagster_project.sqlite_event_log import KeptOpenSqliteEventLogStorage, kept_open

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of an instance with the project's dagster.yaml."""
    shutil.copy(SETTINGS, tmp_path / "dagster.yaml")
    return tmp_path


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home)) as instance:
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


@pytest.mark.parametrize("settings", ["ours", "stock"])
def test_another_process_reads_and_writes_events_meanwhile(
    instance: dg.DagsterInstance, home: Path, settings: str
) -> None:
    if settings == "stock":
        (home / "dagster.yaml").unlink()
    with kept_open(instance), dg.DagsterInstance.from_config(str(home)) as other:
        assert isinstance(other.event_log_storage, KeptOpenSqliteEventLogStorage) is (settings == "ours")
        first = run(instance)
        assert len(other.fetch_materializations(logged.key, limit=10).records) == 1
        second = run(other)
        third = run(instance)
        records = instance.fetch_materializations(logged.key, limit=10).records
        assert [record.run_id for record in records] == [third.run_id, second.run_id, first.run_id]


def test_the_web_server_sees_every_event_of_a_watched_run(instance: dg.DagsterInstance) -> None:
    with kept_open(instance):
        first = run(instance)
        watching = SqliteEventLogStorage(str(files(instance)))
        cursor = watching.get_records_for_run(first.run_id).cursor
        seen, woken = [], threading.Event()

        def callback(event: dg.EventLogEntry, _: str) -> None:
            seen.append(event.message)
            woken.set()

        watching.watch(first.run_id, cursor, callback)
        instance.report_engine_event("one more", first.dagster_run)
        assert woken.wait(20), "the watcher was not woken"
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


def test_the_files_are_closed_after_the_block(instance: dg.DagsterInstance) -> None:
    """SQLite removes its write-ahead log when the last connection closes."""
    with kept_open(instance), kept_open(instance):
        result = run(instance)
        assert (files(instance) / f"{result.run_id}.db-wal").exists()
    assert not list(files(instance).glob("*.db-wal"))
    run(instance)
    assert instance.get_latest_materialization_event(logged.key) is not None


def test_other_storages_are_left_as_they_are(tmp_path: Path) -> None:
    for instance in (dg.DagsterInstance.ephemeral(), dg.DagsterInstance.local_temp(str(tmp_path))):
        with instance, kept_open(instance):
            result = run(instance)
        assert DagsterEventType.ASSET_MATERIALIZATION in {event.event_type for event in result.all_events}
        assert not list(tmp_path.rglob("*.db-wal"))


def test_the_files_lie_where_an_instance_without_the_section_has_them(instance: dg.DagsterInstance, home: Path) -> None:
    """So an instance's history stays when the section is added to its dagster.yaml, or removed; pins Dagster's path."""
    result = run(instance)
    (home / "dagster.yaml").unlink()
    with dg.DagsterInstance.from_config(str(home)) as stock:
        assert type(stock.event_log_storage) is SqliteEventLogStorage
        assert files(stock) == files(instance)
        assert [r.run_id for r in stock.fetch_materializations(logged.key, limit=10).records] == [result.run_id]


def test_a_run_s_process_opens_the_same_storage_from_the_instance_s_reference(instance: dg.DagsterInstance) -> None:
    result = run(instance)
    with dg.DagsterInstance.from_ref(instance.get_ref()) as other:
        assert isinstance(other.event_log_storage, KeptOpenSqliteEventLogStorage)
        assert files(other) == files(instance)
        assert other.get_latest_materialization_event(logged.key) is not None
        assert [run.run_id for run in other.get_runs()] == [result.run_id]


def test_every_connection_of_the_storage_goes_through_the_two_methods_that_keep_files_open() -> None:
    """Pins the reason why overriding two public methods is enough: Dagster opens its files in one private one."""
    source = Path(inspect.getfile(SqliteEventLogStorage)).read_text(encoding="utf-8")
    assert source.count("self._connect(") == 2
    assert "return self._connect(run_id)" in inspect.getsource(SqliteEventLogStorage.run_connection)
    assert "return self._connect(INDEX_SHARD_NAME)" in inspect.getsource(SqliteEventLogStorage.index_connection)
    assert sqlite_event_log.INDEX == INDEX_SHARD_NAME
