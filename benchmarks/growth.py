"""The cost of adding one shard to a pool of N: whether it grows with the pool, and where.

Here: sensors' ticks and the runs they request, and the headless pass, part by part, in pools of tiny shards that are up
to date. Not here: the work on a shard of real size.

python -m benchmarks.growth [--shards N N]
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg

from assets.graph import build_graph
from assets.settings import open_project
from benchmarks.discovery import Ticks
from benchmarks.overhead import write_project, write_shard
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET, materialize
from dagster_project.instance import open_instance
from dagster_project.sqlite_event_log import kept_open

SHARDS = (10, 1000)
SHORT = (10, 100)
RECIPES = {"best": {"steps": [{"keep_top": {"score": "clip_score/b32", "fraction": 0.3}}]}}
FOLLOW = 6  # ticks; the graph is three steps deep


def measure(shards: tuple[int, int] = SHORT) -> dict[str, Any]:
    """Measure in temporary folders, for a small and a large pool.

    Returns:
        `PART/N`: seconds; `PART/small_of_large`: the small pool's seconds over the large one's, 1 if the size of the
        pool does not matter.
    """
    small, large = (_one_more(count) for count in shards)
    found: dict[str, Any] = {}
    for part in small:
        found[f"{part}/{shards[0]}"] = small[part]
        found[f"{part}/{shards[1]}"] = large[part]
        found[f"{part}/small_of_large"] = small[part] / large[part]
    return found


def _one_more(count: int) -> dict[str, float]:
    """Return the seconds of each part when a shard is added to a pool of `count`, first by sensors, then by a pass."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_project(Path(folder), count, RECIPES)
        project = open_project(config)
        graph = build_graph(project)
        with open_instance(project) as instance:
            materialize(project, graph, instance, notice=lambda *_: None)
            ticks = Ticks(instance, build_defs(project, graph))
            _settle(ticks, [])
            write_shard(config.parent / "pool", count)
            found = _by_sensors(ticks)
            write_shard(config.parent / "pool", count + 1)
            return found | _by_pass(config, instance)


def _by_sensors(ticks: Ticks) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    found["tick_discover"] = ticks.seconds("discover_shards")
    steps: list[tuple[str, float]] = []
    found["ticks_follow"], found["ticks_subset"] = _settle(ticks, steps)
    for key, seconds in steps:
        found[key if key in {"catalog", "subset__best"} else "assets_of_the_shard"] += seconds
    return dict(found)


def _settle(ticks: Ticks, steps: list[tuple[str, float]]) -> tuple[float, float]:
    """Tick and run until nothing is requested; return the seconds of both sensors' ticks, and add the steps'."""
    spent = {"follow_shards": 0.0, "refresh_subsets": 0.0}
    for name in spent:
        for _ in range(FOLLOW):
            seconds, requests = ticks.tick(name)
            spent[name] += seconds
            for request in requests:
                steps.extend(_run(ticks, request))
    return spent["follow_shards"], spent["refresh_subsets"]


def _run(ticks: Ticks, request: dg.RunRequest) -> list[tuple[str, float]]:
    """Execute a run; return each step's name and seconds, the first including the start of the run."""
    started = time.time()
    with kept_open(ticks.instance):
        result = ticks.defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=ticks.instance, asset_selection=list(request.asset_selection or []), tags=request.tags,
            run_config=QUIET,
        )  # fmt: skip
    ends = [
        (record.event_log_entry.step_key or "", record.event_log_entry.timestamp)
        for record in ticks.instance.get_records_for_run(
            result.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS
        ).records
    ]
    return [(key, after - before) for (_, before), (key, after) in pairwise([("", started), *ends])]


def _by_pass(config: Path, instance: dg.DagsterInstance) -> dict[str, float]:
    """Time a headless pass that finds one new shard, and one that finds nothing."""
    project = open_project(config)
    began: list[tuple[str, float]] = [("pass_looking", time.perf_counter())]
    materialize(
        project, build_graph(project), instance, notice=lambda stage: began.append((stage.asset, time.perf_counter()))
    )
    began.append(("", time.perf_counter()))
    found = {"pass": began[-1][1] - began[0][1]}
    started = time.perf_counter()
    materialize(project, build_graph(project), instance, notice=lambda *_: None)
    found["pass_nothing_new"] = time.perf_counter() - started
    apart = sum(after - at for (key, at), (_, after) in pairwise(began) if key in {"catalog", "subset/best"})
    return found | {"pass_but_subset_and_catalog": found["pass"] - apart}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs=2, default=SHARDS)
    found = measure(tuple(parser.parse_args().shards))
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
