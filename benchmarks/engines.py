"""Engines: the speed of two single-threaded workers as a multiple of one, and the overhead per shard.

Workers are started and warmed before. A shared machine slows both engines, so figures are the best of several turns.

python -m benchmarks.engines [--ray] [--shards N]
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from assets.base.asset import Step
from assets.base.context import Context, Snapshot
from assets.base.engines import Engine, InProcess
from assets.base.partitioned import PartitionedAsset
from assets.graph import build_graph
from assets.settings import open_project
from benchmarks.overhead import write_project
from dagster_project.engines.processes import Processes

SHARDS, ROWS = 8, 32
TINY_SHARDS = 200
MOST_WORKERS = 4
TURNS = 3
ENCODER = Path(__file__).resolve().parents[1] / "examples/demo/encoder"

Make = Callable[[int], Engine]


def measure(shards: int = TINY_SHARDS, make: Make = Processes) -> dict[str, Any]:
    """Measure one kind of engine.

    Args:
        shards: number of tiny shards.
        make: opens an engine with a number of workers.
    """
    return speed(make) | overhead(shards, make)


def speed(make: Make) -> dict[str, float | None]:
    """Return the speed of two single-threaded workers as a multiple of that of one, in embedding; None on one core."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # of the workers, which are new processes
    try:
        with tempfile.TemporaryDirectory() as folder:
            project = open_project(_pictures(Path(folder)))
            compute(project, "raw_pool", InProcess())
            engines = {workers: make(workers) for workers in (1, 2)}
            took: dict[int, list[float]] = {1: [], 2: []}
            try:
                for turn in range(TURNS + 1):
                    for workers, engine in engines.items():
                        seconds = compute(project, "embeddings/tiny", engine)
                        if turn:  # the first one loads the models
                            took[workers].append(seconds)
            finally:
                for engine in engines.values():
                    engine.close()
    finally:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            del os.environ[name]
    ratio = max(one / two for one, two in zip(took[1], took[2], strict=True))
    return {
        "pairs_per_second_one_worker": SHARDS * ROWS / min(took[1]),
        "two_workers_of_one": ratio if len(os.sched_getaffinity(0)) > 1 else None,
    }


def overhead(shards: int, make: Make) -> dict[str, float]:
    """Return what a shard costs beside its computation, in milliseconds.

    With one worker, the time of all shards less the worker's own; with one and four, the processor time of the main
    process, which limits how many workers it can keep busy.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        project = open_project(write_project(Path(folder), shards))
        for key in ("raw_pool", "embeddings/b32"):
            compute(project, key, InProcess())
        for workers in (1, 4):
            engine = make(workers)
            try:
                compute(project, "clip_score/b32", engine)  # starts the workers, which import torch
                own = _own_seconds(engine)
                turns = []
                for _ in range(TURNS):
                    own.clear()
                    began = time.process_time()
                    seconds = compute(project, "clip_score/b32", engine)
                    turns.append((seconds - sum(own), time.process_time() - began))
            finally:
                engine.close()
            if workers == 1:
                found["overhead_ms_per_shard"] = 1000 * min(turn[0] for turn in turns) / shards
            found[f"main_process_ms_per_shard_{workers}_workers"] = 1000 * min(turn[1] for turn in turns) / shards
    return found


def _own_seconds(engine: Any) -> list[float]:
    """Return a list to which the engine adds the seconds that a worker took for each shard."""
    seconds: list[float] = []
    wait = engine.wait

    def noted(busy: Any) -> Any:
        ended = wait(busy)
        seconds.extend(done.seconds for _, done in ended if done is not None)
        return ended

    engine.wait = noted
    return seconds


def compute(project: Context, key: str, engine: Engine) -> float:
    """Compute all shards of an asset, also those that are up to date, and return the seconds.

    Raises:
        Exception: a shard failed.
    """
    node = next(node for node in build_graph(project).nodes if node.key == key)
    assert isinstance(node, PartitionedAsset)
    project.lake.refresh()
    snapshot = Snapshot(project)
    wanted = {shard: node.provenance(snapshot, shard) for shard in sorted(snapshot.listing)}
    step = Step(node, snapshot, dict(wanted))
    started = time.perf_counter()
    for _, outcome in engine.compute(node, step, list(wanted)):
        if isinstance(outcome, Exception):
            raise outcome
    return time.perf_counter() - started


def _pictures(folder: Path) -> Path:
    """Write a pool of noise as JPEG and a project over it, and return the path of the YAML."""
    (folder / "pool").mkdir()
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"pool/{shard:05d}.tar", "w") as tar:
            for row in range(ROWS):
                picture = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (256, 256, 3), np.uint8)).save(picture, "JPEG")
                for suffix, data in (("jpg", picture.getvalue()), ("txt", f"noise {shard} {row}".encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{row:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    document = {
        "name": "engines",
        "lake": "lake",
        "pool": {"path": "pool", "format": "webdataset"},
        "encoders": {"tiny": {"model": f"local-dir:{ENCODER}", "workers": 0}},
    }
    config = folder / "project.yaml"
    config.write_text(yaml.safe_dump(document))
    return config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=TINY_SHARDS)
    parser.add_argument("--ray", action="store_true", help="measure the engine `ray`, on a local Ray")
    arguments = parser.parse_args()
    if arguments.ray:
        from dagster_project.engines.ray_cluster import RayCluster

        whole = RayCluster(MOST_WORKERS)
        whole.open()  # a Ray that has room for two engines at once
        try:
            found = measure(arguments.shards, RayCluster)
        finally:
            whole.close()
    else:
        found = measure(arguments.shards, Processes)
    print(json.dumps({name: value and round(value, 2) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
