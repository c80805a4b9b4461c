"""Time of sorting and filtering in `clip-select browse`, on synthetic scores; and its server, on a finished project.

    python -m benchmarks.browsing FOLDER [SHARDS]
    python -m benchmarks.browsing CONFIG.yaml [SECONDS]

Each shard has 100,000 rows and two scores; two threads, as the browser uses. Two recipes have a version each, selected
by the project's own code in 6 GB of memory. With a YAML: the first page of a new process, filter and sort, images a
second, and 20 users who scroll for some seconds. Both: seconds of *What if*, *Compare* and the grid's filters by
subset, and the peak memory of the server. Here: these measurements alone.
"""

import http.client
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from assets.base.context import Context, Snapshot
from assets.base.selection_table import CachedTable, open_selection
from assets.graph import Node, build_graph
from assets.settings import open_project
from assets.subsets.lineage import lineage_record
from assets.subsets.subset import CODE_VERSION, SubsetAsset, manifest
from dagster_project.browser.queries import Query, Table
from resources.lake.versions import Versions
from resources.pools.base import RAW_POOL_SCHEMA, REJECTS_SCHEMA

ROWS = 100_000
SCORES = ("external_scores/clip", "external_scores/neg")
RECIPES = {
    "both": {
        "steps": [
            {"keep_top": {"score": SCORES[0], "fraction": 0.3}},
            {"keep_top": {"score": SCORES[1], "fraction": 0.2}},
        ]
    },
    "one": {"steps": [{"keep_top": {"score": SCORES[1], "fraction": 0.2}}]},
}


def make(folder: Path, shards: int) -> Path:
    """Write a project with two scores of `shards` shards and a version of each recipe; return its YAML."""
    config = folder / "project.yaml"
    files = {name.split("/")[1]: {"files": ["scores.parquet"], "columns": "value"} for name in SCORES}
    document = {
        "name": "browsing",
        "lake": "lake",
        "pool": {"path": "pool", "format": "webdataset"},
        "encoders": {"b32": {"model": "local-dir:none", "batch_size": 256}},
        "external_scores": files,
        "recipes": RECIPES,
    }
    (folder / "pool").mkdir(parents=True)
    for number in range(shards):
        (folder / f"pool/{number:05d}.tar").touch()
    pq.write_table(pa.table({"uid": ["0" * 32], "value": [0.5]}), folder / "scores.parquet")
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    context = open_project(config)
    graph, snapshot, rng = build_graph(context), Snapshot(context), np.random.default_rng(0)
    nodes = {node.key: node for node in graph.nodes}
    for name in files:
        context.lake.write(pa.table({"file": [""]}), nodes[f"external_files/{name}"].provenance(snapshot))
    keys = pa.array([f"{row:05d}" for row in range(ROWS)])
    for shard in snapshot.listing:
        uids = {name: rng.integers(0, 2**64, ROWS, np.uint64) for name in ("f0", "f1")}
        columns = {**uids, "shard": pa.array([shard] * ROWS), "key": keys}
        rows = [pa.array(columns[f.name]) if f.name in columns else pa.nulls(ROWS, f.type) for f in RAW_POOL_SCHEMA]
        origin = nodes["raw_pool"].provenance(snapshot, shard)
        context.lake.write(REJECTS_SCHEMA.empty_table(), replace(origin, asset="rejects"))
        context.lake.write(pa.table(rows, schema=RAW_POOL_SCHEMA), origin)
        for name in SCORES:
            scores = pa.table({**uids, "value": rng.random(ROWS, np.float32)})
            context.lake.write(scores, nodes[name].provenance(snapshot, shard))
    with closing(CachedTable(memory="6GB")) as cached:
        for subset in graph.subsets:
            write_version(context, subset, nodes, cached)
    return config


def write_version(context: Context, subset: SubsetAsset, nodes: Mapping[str, Node], cached: CachedTable) -> None:
    """Select a version as a run does, without its report."""
    inputs = subset.inputs(Snapshot(context))
    opened = open_selection(context.lake, subset.recipe, subset.model, subset.scores, inputs.shards, {}, cached)
    with opened as (selection, duplicates):
        lineage = lineage_record(
            context,
            subset.recipe,
            selection,
            assets=nodes,
            shards=inputs.shards,
            missing=inputs.missing,
            source=inputs.source,
            sets={},
            duplicates=duplicates,
            fingerprint=inputs.fingerprint(subset.model),
            code_version=CODE_VERSION,
        )
        Versions(context.lake, subset.recipe).write(manifest(selection), lineage, lambda _: None)


def main(folder: Path, shards: int) -> None:
    """Print seconds of the first and of a repeated query, and the peak memory of the process."""
    config = folder / "project.yaml"
    if not config.exists():
        config = make(folder, shards)
    query = Query(Table(open_project(config)))
    cases = {
        "sort": lambda: query.order_by("external_scores/clip").places(60),
        "filter": lambda: query.where('"external_scores/clip" > 0.9').places(60),
        "count of a filter": lambda: query.where('"external_scores/clip" > 0.9').count(),
        "filter and sort by another score": lambda: (
            query.where('"external_scores/clip" > 0.9').order_by("external_scores/neg").places(60)
        ),
    }
    for name, ask in cases.items():
        seconds, busy = [], []
        for _ in range(3):
            start, cpu = time.perf_counter(), time.process_time()
            ask()
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - cpu)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{name}: first {seconds[0]:.2f} s ({busy[0]:.2f} s of CPU), then {min(seconds[1:]):.2f} s "
            f"({min(busy[1:]):.2f} s of CPU); "
            f"peak memory {peak:.2f} GB",
            flush=True,
        )
    try_out(config)


def try_out(config: Path) -> None:
    """Print seconds of the pages that run recipes, each of a first and of a repeated kind; and the server's memory."""
    context = open_project(config)
    name, other = sorted(context.settings.recipes, key=lambda one: -len(context.settings.recipes[one].steps))[:2]
    version = Versions(context.lake, name).current()
    assert version is not None
    threshold, last = version.lineage["steps"][0]["threshold"], len(version.lineage["steps"])
    with browser(config) as (port, cookie, process):
        user = User(port, cookie)

        def timed(text: str, path: str, *asked: dict[str, object]) -> None:
            seconds = []
            for one in asked:
                start = time.perf_counter()
                user.get(path, **one)
                seconds.append(time.perf_counter() - start)
            status = Path(f"/proc/{process}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e6  # type: ignore[index]
            then = f", then {max(seconds[1:]):.2f} s at most" if seconds[1:] else ""
            print(f"{text}: {seconds[0]:.2f} s{then}; peak memory {peak:.2f} GB", flush=True)

        near = {"recipe": name, "member": "near", "step": 1}
        moved = [{"recipe": name, "limit1": f"threshold:{threshold * (1 + part / 100)!r}"} for part in range(1, 6)]
        parts = [{"recipe": name, f"limit{last}": f"fraction:{part / 100}"} for part in range(15, 20)]
        timed("grid, kept", "/api/rows", *[{"recipe": name, "where": f"key <> '{n}'"} for n in range(3)])
        timed("grid, kept, counted", "/api/count", {"recipe": name})
        timed("what if, first trial", "/api/trial", {"recipe": name})
        timed("what if, another threshold of the first step", "/api/trial", *moved)
        timed("what if, another fraction of the last step", "/api/trial", *parts)
        timed("compare", "/compare", *[{"left": name, "right": other}] * 2)
        timed("grid, dropped at step 1", "/api/rows", {**near, "member": "dropped"})
        timed("grid, near step 1", "/api/rows", *[{**near, "where": f"key <> '{n}'"} for n in range(3)])


@contextmanager
def browser(config: Path) -> Iterator[tuple[int, str, int]]:
    """Start `clip-select browse`, and yield its port, its cookie and the number of its process."""
    command = [sys.executable, "-m", "dagster_project.cli", "browse", str(config), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/\?token=(\S+)", process.stdout.readline())
        assert found is not None
        yield int(found[1]), f"browse-{found[1]}={found[2]}", process.pid
    finally:
        process.terminate()
        process.wait()


class User:
    """A connection that stays open, as a browser's."""

    def __init__(self, port: int, cookie: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.cookie = cookie

    def get(self, path: str, **asked: object) -> bytes:
        """Return the body of an answer."""
        self.connection.request("GET", f"{path}?{urlencode(asked)}", headers={"Cookie": self.cookie})
        answer = self.connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    def rows(self, **asked: object) -> list[dict[str, str]]:
        """Return a part of the grid."""
        return list(json.loads(self.get("/api/rows", **asked))["rows"])

    def image(self, row: dict[str, str]) -> int:
        """Return the size of a row's image, 1 for one that is loaded."""
        return len(self.get(f"/image/{row['shard']}/{row['row']}")) > 0


def scroll(port: int, cookie: str, seed: int, seconds: float) -> int:
    """Scroll as one user for some seconds; return the number of images."""
    user, images, start, offset = User(port, cookie), 0, time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        rows = user.rows(sort="random", seed=seed, offset=offset)
        images += sum(user.image(row) for row in rows)
        offset = offset + len(rows) if rows else 0
    return images


def serve(config: Path, seconds: float) -> None:
    """Print the figures of the server on a project."""

    def timed(name: str, *asked: dict[str, object]) -> None:
        start = time.perf_counter()
        for one in asked:
            user.rows(**one)
        print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)

    with browser(config) as (port, cookie, _):
        user = User(port, cookie)
        start = time.perf_counter()
        user.get("/")
        rows = user.rows()
        print(f"first page of a new process: {time.perf_counter() - start:.2f} s", flush=True)
        score = next(name for name in re.findall(r"<option>([^<]+/[^<]+)", user.get("/").decode()))
        timed("first sort", {"sort": score})
        timed("first filter and sort", {"sort": score, "where": "width > 20"})
        timed("filter and sort again", {"sort": score, "where": "width > 21"})
        rows = [row for offset in range(0, 600, 60) for row in user.rows(sort="random", offset=offset)]
        parts, start = [rows[at::8] for at in range(8)], time.perf_counter()
        with ThreadPoolExecutor(8) as threads:

            def load(part: list[dict[str, str]]) -> int:
                one = User(port, cookie)
                return sum(one.image(row) for row in part)

            loaded = sum(threads.map(load, parts))
        print(f"{loaded / (time.perf_counter() - start):.0f} images/s over 8 connections", flush=True)
        with ThreadPoolExecutor(20) as threads:
            images = sum(threads.map(lambda seed: scroll(port, cookie, seed, seconds), range(20)))
        print(f"20 users for {seconds:.0f} s: {images:,} images, no error", flush=True)
    try_out(config)


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if given.suffix == ".yaml":
        serve(given, float(sys.argv[2]) if len(sys.argv) > 2 else 60)
    else:
        main(given, int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
