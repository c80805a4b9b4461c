"""A project whose sensors tick, and whose runs execute, in the test's own process.

Here: the project, its ticks and comparisons with a headless pass. Not here: the expected requests.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import yaml

from assets.base.keys import SHARDS_NAME
from assets.graph import build_graph
from assets.settings import open_project
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET, Outcome, materialize
from dagster_project.staleness import RANGE_END, RANGE_START
from resources.lake.versions import Version, Versions
from tests.support.pool_factory import datacomp_shard, unit_rows
from tests.support.scenario import keep

SENSORS = ("discover_shards", "follow_shards", "refresh_subsets")


ROWS = 2


class Automation:
    """A project of tiny precomputed shards, its code location, and a stand-in for the daemon.

    Attributes:
        folder: holds `pool`, `project.yaml` and `lake`.
        instance: Dagster's records.
        runs: assets, and first and last shard if any, of every run in order.
        skipped: for each sensor, its latest skip message.
        cursors: for each sensor, its cursor.
        document: the YAML as `load` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instance = dg.DagsterInstance.ephemeral()
        self.runs: list[tuple[str, str]] = []
        self.skipped: dict[str, str] = {}
        self.cursors: dict[str, str | None] = {}
        self.document: dict[str, Any] = {
            "name": "automation",
            "lake": "lake",
            "pool": {"path": "pool", "format": "datacomp"},
            "encoders": {"b32": {"precomputed": "b32", "temperature": 0.1}},
            "scores": {"neg_clip_loss": {"b32": {"batch_size": 4, "draws": 2}}},
            "recipes": {"best": {"steps": [keep("neg_clip_loss/b32", fraction=0.5)]}},
        }
        self.load()

    def load(self) -> None:
        """Write the YAML and load the code location from it."""
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(self.document))
        self.project = open_project(path)
        self.graph = build_graph(self.project)
        self.defs = build_defs(self.project, self.graph)

    def write(self, *shards: int, seed: int = 0) -> None:
        """Write shards into the pool; their content depends on the seed."""
        for number in shards:
            vectors = {"b32_img": unit_rows(2 * number + 1000 * seed, ROWS)}
            vectors["b32_txt"] = unit_rows(2 * number + 1 + 1000 * seed, ROWS)
            datacomp_shard(self.folder / "pool", f"{number:05d}", ROWS, arrays=vectors)

    def spoil(self, shard: int) -> None:
        """Overwrite a shard with bytes that are no Parquet file."""
        (self.folder / f"pool/{shard:05d}.parquet").write_bytes(b"not a parquet")

    def remove(self, shard: int) -> None:
        """Delete a shard from the pool."""
        for path in (self.folder / "pool").glob(f"{shard:05d}.*"):
            path.unlink()

    def tick(self, name: str) -> Sequence[dg.RunRequest]:
        """Evaluate a sensor as the daemon does: keep its cursor, apply partition requests, return run requests."""
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursors.get(name), definitions=self.defs)
        found = self.defs.resolve_sensor_def(name).evaluate_tick(context)
        self.cursors[name] = found.cursor
        self.skipped[name] = found.skip_message or ""
        for request in found.dynamic_partitions_requests or []:
            if isinstance(request, dg.AddDynamicPartitionsRequest):
                self.instance.add_dynamic_partitions(SHARDS_NAME, request.partition_keys)
            else:
                for key in request.partition_keys:
                    self.instance.delete_dynamic_partition(SHARDS_NAME, key)
        return found.run_requests or []

    def execute(self, request: dg.RunRequest, meanwhile: Callable[[], None] | None = None) -> bool:
        """Execute a run in this process and return whether it succeeded.

        Args:
            request: a sensor's run request.
            meanwhile: called once, when the run's first step has started.
        """
        keys = [key.to_user_string() for key in request.asset_selection or []]
        shards = "–".join(dict.fromkeys(filter(None, (request.tags.get(RANGE_START), request.tags.get(RANGE_END)))))
        self.runs.append((" ".join(keys), shards))
        run_id = str(uuid.uuid4()) if meanwhile else None
        waiting = [meanwhile] if meanwhile else []

        def on_event(event: Any) -> None:
            if waiting and event.is_dagster_event and event.dagster_event.is_step_start:
                waiting.pop()()

        if run_id:
            self.instance.add_event_listener(run_id, on_event)
        result = self.defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=list(request.asset_selection or []),
            tags=dict(request.tags),
            run_config=QUIET,
            raise_on_error=False,
            run_id=run_id,
        )
        assert not waiting
        return bool(result.success)

    def round(self) -> int:
        """Tick every sensor once, execute its requests, and return the number of runs."""
        before = len(self.runs)
        for name in SENSORS:
            for request in self.tick(name):
                self.execute(request)
        return len(self.runs) - before

    def settle(self) -> list[tuple[str, str]]:
        """Tick until two rounds in a row request nothing, and return the runs."""
        before = len(self.runs)
        idle = 0
        for _ in range(40):
            idle = 0 if self.round() else idle + 1
            if idle == 2:
                return self.runs[before:]
        raise AssertionError(f"still requesting runs after 40 rounds: {self.runs[before:]}")

    def subset(self, recipe: str = "best") -> Version:
        """Read a recipe's newest version."""
        version = Versions(self.project.lake, recipe).current()
        assert version is not None
        return version

    def assert_nothing_is_left(self) -> None:
        """Check that a headless pass over the same lake adds, removes and computes nothing."""
        assert materialize(self.project, self.graph, self.instance, notice=lambda *_: None) == Outcome()

    def assert_as_headless(self) -> None:
        """Check every subset against a headless pass over a fresh lake that holds this lake's negatives only."""
        shutil.copytree(self.folder / "lake/negatives", self.folder / "fresh/negatives", dirs_exist_ok=True)
        path = self.folder / "fresh.yaml"
        path.write_text(yaml.safe_dump({**self.document, "lake": "fresh"}))
        project = open_project(path)
        with dg.DagsterInstance.ephemeral() as instance:
            materialize(project, build_graph(project), instance, notice=lambda *_: None)
        for recipe in self.document["recipes"]:
            wanted = Versions(project.lake, recipe).current()
            assert wanted is not None
            np.testing.assert_array_equal(np.load(self.subset(recipe).uids), np.load(wanted.uids))
            assert self.subset(recipe).lineage["shards"] == wanted.lineage["shards"]
            assert set(self.subset(recipe).lineage["shards_missing"]) == set(wanted.lineage["shards_missing"])


@pytest.fixture
def automation(tmp_path: Path) -> Iterator[Automation]:
    """Yield an empty project with its sensors."""
    automation = Automation(tmp_path)
    yield automation
    automation.instance.dispose()
