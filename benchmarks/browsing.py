"""Time of sorting and filtering in `clip-select browse`, on synthetic scores.

    python -m benchmarks.browsing FOLDER [SHARDS]

Each shard has 100,000 rows and two scores; two threads, as the browser uses. Here: this measurement alone.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from assets.settings import open_project
from dagster_project.browser.queries import Query, Table
from resources.lake.files import Lake, Provenance

ROWS = 100_000


def make(folder: Path, shards: int) -> Path:
    """Write a project with clip_score and neg_clip_loss of `shards` shards; return its YAML."""
    lake, rng = Lake(str(folder / "lake")), np.random.default_rng(0)
    for number in range(shards):
        uids = {name: rng.integers(0, 2**64, ROWS, np.uint64) for name in ("f0", "f1")}
        pool = {"raw_pool": f"of-shard-{number}"}
        for asset in ("clip_score", "neg_clip_loss"):
            scores = {asset: rng.random(ROWS, np.float32)}
            lake.write(pa.table({**uids, **scores}), Provenance(f"{asset}/b32", f"{number:05d}", "1", inputs=pool))
    config = folder / "project.yaml"
    document = {
        "name": "browsing",
        "lake": "lake",
        "pool": {"path": "pool", "format": "webdataset"},
        "encoders": {"b32": {"model": "local-dir:none", "batch_size": 256}},
        "recipes": {},
    }
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    return config


def main(folder: Path, shards: int) -> None:
    """Print seconds of the first and of a repeated query, and the peak memory of the process."""
    config = folder / "project.yaml"
    if not config.exists():
        config = make(folder, shards)
    query = Query(Table(open_project(config)))
    cases = {
        "sort": lambda: query.order_by("clip_score/b32").places(60),
        "filter": lambda: query.where('"clip_score/b32" > 0.9').places(60),
        "count of a filter": lambda: query.where('"clip_score/b32" > 0.9').count(),
        "filter and sort by another score": lambda: (
            query.where('"clip_score/b32" > 0.9').order_by("neg_clip_loss/b32").places(60)
        ),
    }
    for name, ask in cases.items():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            ask()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name}: first {seconds[0]:.2f} s, then {seconds[1]:.2f} s; peak memory {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
