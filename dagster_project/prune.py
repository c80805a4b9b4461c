"""`clip-select prune`: delete old versions of subsets, and old runs of Dagster.

Here: what is old, and deleting it. Not here: arguments (`cli`), and the retention of ticks (`dagster.yaml`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dagster_project.tables import print_json

if TYPE_CHECKING:
    import dagster as dg

    from assets.base.context import Context

_POINTER = "dagster/input_event_pointer/"
_AT_ONCE = 500  # events in one query


def prune(
    project: "Context",
    console: Console,
    *,
    keep: int | None,
    runs_older_than: timedelta | None,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Delete old versions and runs, and print them.

    Args:
        project: the opened project.
        console: where to print.
        keep: newest versions of each recipe to keep; None for all.
        runs_older_than: how long ago a run must have ended to be deleted; None for no run.
        dry_run: print what would be deleted, and delete nothing.
        as_json: print JSON.

    Returns:
        The exit status, 0.
    """
    from dagster_project.instance import only_pass

    found: dict[str, object] = {"dry_run": dry_run}
    verb = "to be deleted" if dry_run else "deleted"
    with only_pass(project):
        if keep is not None:
            versions = _prune_versions(project, keep, dry_run=dry_run)
            found["versions"] = versions
            for recipe, names in versions.items() if not as_json else ():
                console.print(f"subset/{recipe}: {verb}: {', '.join(names) or 'none'}")
        if runs_older_than is not None:
            runs = _prune_runs(project, datetime.now(UTC) - runs_older_than, dry_run=dry_run)
            found["runs"], found["runs_kept"] = runs.unneeded, runs.needed
            if not as_json:
                console.print(
                    f"runs: {verb}: {len(runs.unneeded)}; as old, and kept for what they reported: {len(runs.needed)}",
                    highlight=False,
                )
    if as_json:
        print_json(found, console)
    return 0


def _prune_versions(project: "Context", keep: int, *, dry_run: bool) -> dict[str, list[str]]:
    """Delete all but the newest versions of every recipe's subset, and rebuild the catalog; return the deleted ones."""
    from assets.subsets.catalog import write_catalog
    from resources.lake.versions import Versions

    by_recipe = {recipe: Versions(project.lake, recipe) for recipe in project.settings.recipes}
    old = {recipe: versions.names()[:-keep] for recipe, versions in by_recipe.items()}
    if not dry_run:
        for recipe, names in old.items():
            for name in names:
                by_recipe[recipe].remove(name)
        write_catalog(project, project.catalog_path())
    return old


def _prune_runs(project: "Context", before: datetime, *, dry_run: bool) -> "OldRuns":
    from dagster_project.instance import open_instance

    with open_instance(project) as instance:
        found = old_runs(instance, before)
        for run_id in () if dry_run else found.unneeded:
            delete_run(instance, run_id)
    return found


@dataclass(frozen=True)
class OldRuns:
    """Runs that ended before some time, the oldest first.

    Attributes:
        unneeded: can be deleted.
        needed: reported what Dagster shows as the current state of an asset or a shard.
    """

    unneeded: list[str]
    needed: list[str]


def old_runs(instance: "dg.DagsterInstance", before: datetime) -> OldRuns:
    """Find the runs that ended before a time; a run that has not ended is never among them.

    Runs of a backfill that goes on count as not ended.
    """
    import dagster as dg

    ended = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    going_on = _backfills_that_go_on(instance)
    old = [
        record
        for record in instance.get_run_records(dg.RunsFilter(statuses=ended), ascending=True)
        # a run from before Dagster had this column has no end
        if (record.end_time or record.update_timestamp.timestamp()) < before.timestamp()
        and record.dagster_run.tags.get("dagster/backfill") not in going_on
    ]
    needed = set(_runs_of_current_events(instance)) if old else set()
    found = [record.dagster_run.run_id for record in old]
    return OldRuns([run for run in found if run not in needed], [run for run in found if run in needed])


def delete_run(instance: "dg.DagsterInstance", run_id: str) -> None:
    """Delete a run, its events, what its steps printed, and its file in SQLite."""
    from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage  # exported nowhere

    instance.delete_run(run_id)
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):
        file = Path(storage.path_for_shard(run_id))
        for path in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
            path.unlink(missing_ok=True)


def _backfills_that_go_on(instance: "dg.DagsterInstance") -> set[str]:
    from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus  # exported nowhere

    statuses = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
    return {found.backfill_id for found in instance.get_backfills(filters=BulkActionsFilter(statuses=statuses))}


def _runs_of_current_events(instance: "dg.DagsterInstance") -> Iterator[str]:
    """Yield the runs whose events Dagster needs to show what is materialized and up to date.

    These are the last materialization of every asset and of every shard that is in the pool, and the shards' events
    that those were computed from: Dagster compares an input's data version then with the one now. (For an input without
    shards, the last materialization itself records the version.)
    """
    import dagster as dg

    pointed: dict[dg.AssetKey, set[int]] = {}
    read_whole: set[tuple[dg.AssetKey, int]] = set()
    for asset in instance.get_asset_keys():
        for record in _records(instance, asset, _last_events(instance, asset)):
            yield record.run_id
            for dep, event in _inputs(record):
                if record.partition_key is None:
                    read_whole.add((dep, event))
                else:
                    pointed.setdefault(dep, set()).add(event)
    for dep, events in pointed.items():
        yield from (record.run_id for record in _records(instance, dep, events) if record.partition_key is not None)
    for dep, event in read_whole:
        yield from _runs_until(instance, dep, event)


def _inputs(record: "dg.EventLogRecord") -> "Iterator[tuple[dg.AssetKey, int]]":
    """Yield the inputs of a materialization, each with the id of its last event then."""
    import dagster as dg

    tags = (record.asset_materialization.tags if record.asset_materialization else None) or {}
    for tag, event in tags.items():
        if tag.startswith(_POINTER) and event.isdigit():  # else it had none
            yield dg.AssetKey.from_user_string(tag.removeprefix(_POINTER)), int(event)


def _by_shard(instance: "dg.DagsterInstance", asset: "dg.AssetKey") -> dict[str, int]:
    """Return the id of the last event of each shard that is in the pool."""
    import dagster as dg

    from assets.base.keys import SHARDS_NAME

    shards = set(instance.get_dynamic_partitions(SHARDS_NAME))
    events = instance.event_log_storage.get_latest_storage_id_by_partition(
        asset, dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    return {shard: event for shard, event in events.items() if shard in shards}


def _last_events(instance: "dg.DagsterInstance", asset: "dg.AssetKey") -> set[int]:
    last = instance.fetch_materializations(asset, limit=1).records
    return {*_by_shard(instance, asset).values(), *(record.storage_id for record in last)}


def _runs_until(instance: "dg.DagsterInstance", asset: "dg.AssetKey", event: int) -> Iterator[str]:
    """Yield the runs that had last reported the shards when an asset without shards read all of them.

    Args:
        instance: the instance.
        asset: the asset that has shards.
        event: id of its last event then. Shards without a later one are left out, and so are large pools, whose shards
            Dagster does not compare.
    """
    import dagster as dg
    from dagster._core.definitions.data_version import SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD

    by_shard = _by_shard(instance, asset)
    if len(by_shard) >= SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD:
        return
    for shard in (shard for shard, last in by_shard.items() if last > event):
        wanted = dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[shard], before_storage_id=event + 1)
        yield from (record.run_id for record in instance.fetch_materializations(wanted, limit=1).records)


def _records(
    instance: "dg.DagsterInstance", asset: "dg.AssetKey", events: Iterable[int]
) -> "Iterator[dg.EventLogRecord]":
    import dagster as dg

    ids = sorted(events)
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        wanted = dg.AssetRecordsFilter(asset_key=asset, storage_ids=some)
        yield from instance.fetch_materializations(wanted, limit=len(some)).records
