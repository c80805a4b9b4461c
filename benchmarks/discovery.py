"""Duration of the sensors' ticks on a pool of many shards: the first discovery, and ticks without news.

The shards are empty files and the lake's files hold no rows: ticks read only listings and provenance.

python -m benchmarks.discovery [--shards N]
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pyarrow as pa
import sqlalchemy as sa
import yaml
from dagster._core.storage.event_log.schema import (  # Dagster exports neither its tables nor a fast way to fill them
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

from assets.base.context import Context, Snapshot
from assets.base.events import DATA_VERSION_TAG
from assets.base.keys import SHARDS_NAME, asset_key
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from assets.graph import Graph, build_graph
from assets.settings import open_project
from dagster_project.definitions import build_defs

SHARDS = 10_000


def measure(shards: int = SHARDS) -> dict[str, float]:
    """Measure in a temporary folder.

    Returns:
        Seconds; `discovery` includes adding all partitions to a SQLite instance on disk.
    """
    with tempfile.TemporaryDirectory() as name, dg.DagsterInstance.local_temp(name) as instance:
        folder = Path(name)
        names = [f"{number:08d}" for number in range(shards)]
        (folder / "pool").mkdir()
        for shard in names:
            (folder / f"pool/{shard}.parquet").touch()
            (folder / f"pool/{shard}.npz").touch()
        project = open_project(_config(folder))
        graph = build_graph(project)
        ticks = Ticks(instance, build_defs(project, graph))
        found = {
            "shards": shards,
            "discovery": ticks.seconds("discover_shards"),
            "discovery_nothing_new": ticks.seconds("discover_shards"),
            "follow_all_new": ticks.seconds("follow_shards"),
        }
        _fill(project, graph, names)
        _know(instance, project, graph, names)
        found["follow_full_look"] = ticks.seconds("follow_shards")
        found["follow_nothing_new"] = ticks.seconds("follow_shards")
        ticks.seconds("refresh_subsets")
        found["subset_full_look"] = ticks.seconds("refresh_subsets")
        assert len(instance.get_dynamic_partitions(SHARDS_NAME)) == shards
        return found


class Ticks:
    """Sensors evaluated as by the daemon, with cursors and partitions kept."""

    def __init__(self, instance: dg.DagsterInstance, defs: dg.Definitions) -> None:
        self.instance = instance
        self.defs = defs
        self.cursors: dict[str, str | None] = {}

    def seconds(self, name: str) -> float:
        """Return the seconds of a tick."""
        return self.tick(name)[0]

    def tick(self, name: str) -> tuple[float, list[dg.RunRequest]]:
        """Return the seconds of a tick, and the runs that it requests."""
        started = time.perf_counter()
        context = dg.build_sensor_context(self.instance, cursor=self.cursors.get(name), definitions=self.defs)
        found = self.defs.resolve_sensor_def(name).evaluate_tick(context)
        self.cursors[name] = found.cursor
        for request in found.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(SHARDS_NAME, list(request.partition_keys))
        return time.perf_counter() - started, list(found.run_requests or [])


def _config(folder: Path) -> Path:
    path = folder / "project.yaml"
    document = {
        "name": "discovery",
        "lake": "lake",
        "pool": {"path": "pool", "format": "datacomp"},
        "encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}},
        "scores": {"neg_clip_loss": {}},
        "recipes": {"best": {"steps": [{"keep_top": {"score": "clip_score/b32", "fraction": 0.3}}]}},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def _fill(project: Context, graph: Graph, shards: list[str]) -> None:
    """Write the files that every run would have written, without rows."""
    for node in graph.nodes:
        assert isinstance(node, PartitionedAsset)
        template = node.declared.template
        assert isinstance(template, PartitionedTemplate)
        snapshot = Snapshot(project)  # which sees the files of the node before
        for shard in shards:
            wanted = node.provenance(snapshot, shard)
            for key in (*template.beside, node.key):
                project.lake.write(pa.table({"f0": pa.array([], pa.uint64())}), replace(wanted, asset=key))


def _know(instance: dg.DagsterInstance, project: Context, graph: Graph, shards: list[str]) -> None:
    """Write a materialization of every file into Dagster's tables, as far as sensors read them."""
    storage = instance.event_log_storage
    assert isinstance(storage, SqlEventLogStorage)
    project.lake.refresh()
    events, tags = [], []
    for node in graph.nodes:
        key = asset_key(node.key).to_string()
        for shard in shards:
            stored = project.lake.stored(node.key, shard)
            assert stored is not None
            event = {"id": len(events) + 1, "asset_key": key, "run_id": "", "event": "{}", "partition": shard}
            events.append(event | {"dagster_event_type": "ASSET_MATERIALIZATION", "timestamp": datetime.now(UTC)})
            tag = {"asset_key": key, "event_id": len(events), "event_timestamp": datetime.now(UTC)}
            tags.append(tag | {"key": DATA_VERSION_TAG, "value": stored.fingerprint})
    with storage.index_connection() as con:
        con.execute(sa.insert(SqlEventLogStorageTable), events)
        con.execute(sa.insert(AssetEventTagsTable), tags)
        con.commit()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=SHARDS)
    print(json.dumps({name: round(value, 3) for name, value in measure(parser.parse_args().shards).items()}, indent=1))


if __name__ == "__main__":
    main()
