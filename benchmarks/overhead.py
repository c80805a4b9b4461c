"""What Dagster and our bookkeeping cost beside the work itself: many tiny shards through one asset in one run.

python -m benchmarks.overhead
"""

import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from assets.graph import build_graph
from assets.project import Project, open_project
from assets.sharded import Result, ShardAsset
from dagster_project import command
from dagster_project.headless import materialize

SHARDS = 100
ROWS = 4
WIDTH = 8


def measure(shards: int = SHARDS) -> dict[str, Any]:
    """Time a pass over `shards` tiny shards, and the same assets' own work without Dagster."""
    with tempfile.TemporaryDirectory() as folder:
        config = _project(Path(folder), shards)
        began: list[tuple[str, float]] = []
        project = open_project(config)
        with command.open_instance(project) as instance:
            materialize(
                project, build_graph(project), instance, notice=lambda key, _: began.append((key, time.perf_counter()))
            )
            began.append(("", time.perf_counter()))
            seconds = {key: after - at for (key, at), (_, after) in pairwise(began)}
            started = time.perf_counter()
            materialize(project, build_graph(project), instance, notice=lambda *_: None)
            idle = time.perf_counter() - started
        own = _own_work(open_project(config), "clip_score/b32")
    return {
        "shards": shards,
        "pass_ms_per_shard_and_asset": 1000 * seconds["clip_score/b32"] / shards,
        "own_work_ms_per_shard": 1000 * own / shards,
        "overhead_ms_per_shard_and_asset": 1000 * (seconds["clip_score/b32"] - own) / shards,
        "idle_pass_ms_per_shard": 1000 * idle / shards,
    }


def _own_work(project: Project, key: str) -> float:
    """Compute and write an asset again without Dagster."""
    node = next(node for node in build_graph(project).nodes if node.key == key)
    if not isinstance(node, ShardAsset):
        raise TypeError(f"{key} is not an asset of shards")
    started = time.perf_counter()
    for shard, outcome in node.compute(sorted(project.listing())):
        if not isinstance(outcome, Result):
            raise outcome
        project.lake.write(outcome.table, node.provenance(shard), summary=outcome.summary)
    return time.perf_counter() - started


def _project(folder: Path, shards: int) -> Path:
    pool = folder / "pool"
    pool.mkdir()
    generator = np.random.default_rng(0)
    for number in range(shards):
        uids = [f"{number:016x}{row:016x}" for row in range(ROWS)]
        vectors = generator.standard_normal((2, ROWS, WIDTH))
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        pq.write_table(pa.table({"uid": uids, "text": uids, "url": uids}), pool / f"{number:05d}.parquet")
        image, text = vectors.astype(np.float16)
        np.savez(pool / f"{number:05d}.npz", b32_img=image, b32_txt=text)
    config = folder / "project.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "overhead",
                "lake": "lake",
                "pool": {"path": "pool", "format": "datacomp"},
                "encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}},
                "scores": {"neg_clip_loss": {}},
            }
        )
    )
    return config


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:46} {figure:,.2f}")
