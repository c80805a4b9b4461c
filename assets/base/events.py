"""Materializations of shards' files as Dagster's event log has them, each with its exact data and input versions.

Here: events of a run, and of files that were written without Dagster (`clip-select compute`). Not here: when files are
written (`assets.base.partitioned`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.base.asset import FileAsset, event_metadata
from assets.base.checks import EventContext, findings_of, log_checks
from assets.base.engines import Engine, measured_with
from assets.base.keys import asset_key
from resources.lake.files import Lake, Stored

# Tags by which Dagster decides what is stale; it exports no names for them.
DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"
INPUT_DATA_VERSION_TAG = "dagster/input_data_version/{}"
INPUT_EVENT_POINTER_TAG = "dagster/input_event_pointer/{}"


@dataclass(frozen=True)
class Runless:
    """Logs events that belong to no run."""

    instance: dg.DagsterInstance

    def log_event(self, event: Any) -> None:
        """Log a materialization or the result of a check."""
        self.instance.report_runless_asset_event(event)


@dataclass(frozen=True)
class Record:
    """A shard's file as the event log records it.

    Attributes:
        shard: the shard.
        stored: the record of its file.
        computed: whether this run computed it.
        seconds: time that this took.
    """

    shard: str
    stored: Stored
    computed: bool
    seconds: float = 0.0


class EventLog:
    """Writes one materialization event a shard, and the results of its checks.

    Args:
        context: where they go.
        asset: a `PartitionedAsset`.
        lake: the lake.
        engine: computes the files of this run, whose events state it beside their time.
    """

    def __init__(self, context: EventContext, asset: FileAsset, lake: Lake, engine: Engine | None = None) -> None:
        self.context, self.asset, self.lake = context, asset, lake
        self._measured = measured_with(engine) if engine else {}
        self._pointers: dict[str, Mapping[str, int]] = {}

    def write(self, records: Iterable[Record]) -> None:
        """Write the events of files."""
        for record in records:
            self.context.log_event(
                dg.AssetMaterialization(
                    asset_key=asset_key(self.asset.key),
                    partition=record.shard,
                    metadata=event_metadata(record.stored, record.computed, record.seconds)
                    | (self._measured if record.seconds else {}),
                    tags=self._tags(record),
                )
            )
            log_checks(self.context, self.asset.key, record.shard, findings_of(self.lake, record.stored))

    def _tags(self, record: Record) -> dict[str, str]:
        tags = {
            DATA_VERSION_TAG: record.stored.fingerprint,
            CODE_VERSION_TAG: record.stored.provenance.code_version,
        }
        for dep in self.asset.deps:
            version = record.stored.provenance.inputs.get(dep)
            pointer = self._pointer(dep, record.shard)
            if version is not None and pointer is not None:
                tags[INPUT_DATA_VERSION_TAG.format(dep)] = version
                tags[INPUT_EVENT_POINTER_TAG.format(dep)] = str(pointer)
        return tags

    def _pointer(self, dep: str, shard: str) -> int | None:
        """Return the id of the latest event of an input: the shard's, or the unpartitioned asset's."""
        if dep not in self._pointers:
            key = asset_key(dep)
            latest = self.context.instance.event_log_storage.get_latest_storage_id_by_partition(
                key, dg.DagsterEventType.ASSET_MATERIALIZATION
            )
            if not latest:
                event = self.context.instance.get_latest_materialization_event(key)
                records = self.context.instance.fetch_materializations(key, limit=1).records if event else []
                latest = {"": records[0].storage_id} if records else {}
            self._pointers[dep] = latest
        return self._pointers[dep].get(shard, self._pointers[dep].get(""))


def record_files(
    instance: dg.DagsterInstance,
    assets: Iterable[FileAsset],
    lake: Lake,
    shards: Sequence[str],
    *,
    wanted: Callable[[str, str], bool] = lambda _key, _shard: True,
    most: int | None = None,
) -> int:
    """Record the files of shards that Dagster knows no materialization of, and return how many those were.

    `clip-select compute` writes such files, and another instance's runs do. Their events belong to no run.

    Args:
        instance: where events are recorded.
        assets: `PartitionedAsset`s, upstream first.
        lake: the lake.
        shards: the shards that have a partition.
        wanted: checks whether a file, by the key of its asset and its shard, is to be recorded.
        most: number of files to record at most.
    """
    count = 0
    for asset in assets:
        known = instance.event_log_storage.get_latest_tags_by_partition(
            asset_key(asset.key), dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG]
        )
        log = EventLog(Runless(instance), asset, lake)
        for shard in shards:
            stored = lake.stored(asset.key, shard)
            if stored is None or known.get(shard, {}).get(DATA_VERSION_TAG) == stored.fingerprint:
                continue
            if count == most:
                return count
            if wanted(asset.key, shard):
                log.write([Record(shard, stored, computed=False)])
                count += 1
    return count
