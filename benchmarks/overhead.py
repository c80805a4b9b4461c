"""The overhead of Dagster and of our bookkeeping.

Here: many tiny shards through one asset in one run, the event log alone, and the start of a run's process. Growth of
the cost with the pool: `benchmarks.growth`.

python -m benchmarks.overhead
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from dagster._core.code_pointer import ModuleCodePointer  # what starts a run's process is exported nowhere
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.utils import make_new_run_id
from dagster._grpc.types import ExecuteRunArgs

from assets.base.asset import Step
from assets.base.context import Context, Snapshot
from assets.base.keys import SHARDS_NAME
from assets.base.partitioned import PartitionedAsset
from assets.base.results import Result
from assets.graph import build_graph
from assets.settings import open_project
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET, materialize
from dagster_project.instance import SETTINGS, open_instance
from dagster_project.location import CONFIG_VARIABLE
from dagster_project.sqlite_event_log import kept_open

SHARDS = 100
ROWS = 4
WIDTH = 8
EVENTS = 50


def measure(shards: int = SHARDS) -> dict[str, Any]:
    """Time a pass over `shards` tiny shards, and the work of the same assets without Dagster."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_project(Path(folder), shards)
        project = open_project(config)
        with open_instance(project) as instance:
            seconds = materialize(project, build_graph(project), instance, notice=lambda _: None).seconds
            started = time.perf_counter()
            materialize(project, build_graph(project), instance, notice=lambda *_: None)
            idle = time.perf_counter() - started
        own = _own_work(open_project(config), "clip_score/b32")
    plain, kept = _events(kept=False), _events(kept=True)
    return {
        "shards": shards,
        "pass_ms_per_shard_and_asset": 1000 * seconds["clip_score/b32"] / shards,
        "own_work_ms_per_shard": 1000 * own / shards,
        "overhead_ms_per_shard_and_asset": 1000 * (seconds["clip_score/b32"] - own) / shards,
        "own_work_of_pass": own / seconds["clip_score/b32"],
        "idle_pass_ms_per_shard": 1000 * idle / shards,
        "ms_per_event": 1000 * kept,
        "event_log_kept_open_speedup": plain / kept,
        "run_start_seconds": run_start(),
    }


def run_start() -> float:
    """Return the seconds from starting a run's process, as the web server's launcher does, to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_project(Path(folder), 1)
        project = open_project(config)
        with open_instance(project) as instance:
            shards = sorted(project.pool.list_shards())
            instance.add_dynamic_partitions(SHARDS_NAME, shards)
            job = build_defs(project).resolve_implicit_global_asset_job_def()
            code = ModuleCodePointer("dagster_project.definitions", "defs")
            origin = JobPythonOrigin(job.name, RepositoryPythonOrigin(sys.executable, code))
            run = instance.create_run_for_job(
                job,
                run_id=make_new_run_id(),
                asset_selection={dg.AssetKey("raw_pool")},
                tags={"dagster/partition": shards[0]},
                job_code_origin=origin,
            )
            started = time.time()
            subprocess.run(
                ExecuteRunArgs(origin, run.run_id, instance.get_ref(), True).get_command_args(),
                check=True,
                capture_output=True,
                env={**os.environ, CONFIG_VARIABLE: str(config)},
            )
            steps = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_START).records
            return steps[0].event_log_entry.timestamp - started


def _events(*, kept: bool) -> float:
    """Return the seconds per event, in a run that logs nothing else."""

    @dg.asset(output_required=False)
    def logger(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        yield from ()
        started = time.perf_counter()
        for number in range(EVENTS):
            context.log_event(dg.AssetMaterialization("logger", metadata={"number": number}))
        seconds.append((time.perf_counter() - started) / EVENTS)

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SETTINGS, folder)
        with dg.DagsterInstance.from_config(folder) as instance, kept_open(instance) if kept else nullcontext():
            dg.materialize([logger], instance=instance, run_config=QUIET)
    return seconds[0]


def _own_work(project: Context, key: str) -> float:
    """Compute and write an asset again without Dagster."""
    node = next(node for node in build_graph(project).nodes if node.key == key)
    if not isinstance(node, PartitionedAsset):
        raise TypeError(f"{key} is not an asset of shards")
    started = time.perf_counter()
    snapshot = Snapshot(project)
    wanted = {shard: node.provenance(snapshot, shard) for shard in sorted(snapshot.listing)}
    for shard, outcome in node.compute(Step(node, snapshot, dict(wanted)), list(wanted)):
        if not isinstance(outcome, Result):
            raise outcome
        project.lake.write(outcome.table, wanted[shard], summary=outcome.summary)
    return time.perf_counter() - started


def write_shard(pool: Path, number: int) -> None:
    """Write a shard of DataComp metadata with stored embeddings."""
    uids = [f"{number:016x}{row:016x}" for row in range(ROWS)]
    vectors = np.random.default_rng(number).standard_normal((2, ROWS, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    pq.write_table(pa.table({"uid": uids, "text": uids, "url": uids}), pool / f"{number:05d}.parquet")
    image, text = vectors.astype(np.float16)
    np.savez(pool / f"{number:05d}.npz", b32_img=image, b32_txt=text)


def write_project(folder: Path, shards: int, recipes: dict[str, Any] | None = None) -> Path:
    """Write a pool of tiny shards and a project over it, and return the path of the YAML."""
    (folder / "pool").mkdir()
    for number in range(shards):
        write_shard(folder / "pool", number)
    config = folder / "project.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "overhead",
                "lake": "lake",
                "pool": {"path": "pool", "format": "datacomp"},
                "encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}},
                "scores": {"neg_clip_loss": {}},
                "recipes": recipes or {},
            }
        )
    )
    return config


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:46} {figure:,.2f}")
