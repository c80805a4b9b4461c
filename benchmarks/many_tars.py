"""Discovery of very many tars in groups, and ticks that find nothing new.

Here: `python -m benchmarks.many_tars`. Empty tars in a folder, `tars_per_shard: 10`, no shard computed.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from assets.base.context import Snapshot
from assets.base.keys import SHARDS_NAME
from assets.graph import build_graph
from assets.settings import open_project
from dagster_project.definitions import build_defs
from dagster_project.staleness import diff_partitions

TARS, IN_GROUP = 100_000, 10
END_OF_TAR = bytes(1024)


def project(folder: Path, tars: int) -> Path:
    """Write a pool and its YAML, and return the YAML's path."""
    (folder / "pool").mkdir()
    for number in range(tars):
        (folder / "pool" / f"{number:08d}.tar").write_bytes(END_OF_TAR)
    encoder = Path(__file__).parents[1] / "examples/demo/encoder"
    document = {
        "name": "many",
        "lake": "lake",
        "pool": {"path": "pool", "tars_per_shard": IN_GROUP},
        "encoders": {"tiny": {"model": f"local-dir:{encoder}"}},
        "scores": {},
        "recipes": {},
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def seconds(work: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(tars: int = TARS) -> dict[str, float]:
    """Return the seconds of discovery and of ticks without news, by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.ephemeral() as instance:
        opened = open_project(project(Path(folder), tars))
        graph = build_graph(opened)
        defs = build_defs(opened, graph)
        found: dict[str, float] = {"tars": tars, "tars_per_shard": IN_GROUP}

        def discover() -> None:
            change = diff_partitions(Snapshot(opened), graph, instance)
            instance.add_dynamic_partitions(SHARDS_NAME, change.added)

        processor = time.process_time()
        found["discover"] = seconds(discover)
        found["discover_processor"] = time.process_time() - processor
        found["shards"] = len(instance.get_dynamic_partitions(SHARDS_NAME))
        found["list_again"] = seconds(lambda: Snapshot(opened).listing)
        for name in ("discover_shards", "follow_shards"):
            sensor, cursor, quiet = defs.resolve_sensor_def(name), None, False
            while not quiet:  # `follow_shards` asks for the same runs three times; nothing runs here
                context = dg.build_sensor_context(instance=instance, cursor=cursor, definitions=defs)
                began, processor = time.perf_counter(), time.process_time()
                data = sensor.evaluate_tick(context)
                found[f"{name}_idle_tick"] = time.perf_counter() - began
                found[f"{name}_idle_tick_processor"] = time.process_time() - processor
                quiet = data.cursor == cursor
                cursor = data.cursor
        return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else TARS), indent=1))
