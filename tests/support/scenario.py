"""The project that tests of the asset graph share: three shards of twelve samples, one target, three recipes."""

import copy
import gc
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from assets.base.context import Context, Progress
from assets.base.keys import SHARDS_NAME
from assets.graph import Graph, build_graph
from assets.scores import KINDS
from assets.settings import Kinds, open_project
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET, Outcome, materialize
from resources.lake.versions import Version, Versions
from tests.support.pool_factory import class_folders, sample, write_shard

ROWS = 12
SHARDS = ("00000", "00001", "00002")


class Scenario:
    """A project in its own folder. Every pass opens it again, as a new process would.

    Attributes:
        folder: holds `pool`, `pets`, `project.yaml` and `lake`.
        instance: an ephemeral Dagster instance.
        kinds: the kinds of scores that the project knows.
        document: the YAML, written before each pass.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.instance = dg.DagsterInstance.ephemeral()
        self.kinds: Kinds = KINDS
        folder.mkdir(exist_ok=True)
        for shard in SHARDS:
            self.write_shard(shard)
        class_folders(folder / "pets")
        self.document: dict[str, Any] = {
            "name": "scenario",
            "lake": "lake",
            "pool": {"path": "pool"},
            "encoders": {"tiny": {"model": f"local-dir:{model}", "batch_size": 5, "workers": 0}},
            "targets": {"pets": {"path": "pets"}},
            "scores": {"neg_clip_loss": {"tiny": {"batch_size": 8, "draws": 3}}},
            "recipes": {
                "clip_third": {"steps": [keep("clip_score/tiny", fraction=0.34)]},
                "paper": {
                    "steps": [keep("neg_clip_loss/tiny", fraction=0.5), keep("norm_sim_inf/tiny/pets", fraction=0.25)]
                },
                "inside": {"from": "clip_third", "steps": [keep("norm_sim_2/tiny/pets", count=3)]},
            },
        }

    def write_shard(self, shard: str, rows: int = ROWS, **changed: Any) -> None:
        """Write a shard of the pool; `changed` replaces fields of its first `Sample`."""
        first = int(shard) * 100
        samples = [sample(first + i, shard, **(changed if i == 0 else {})) for i in range(rows)]
        write_shard(self.folder / "pool", samples, shard)

    def set(self, *path: str, value: Any) -> None:
        """Set one field of the YAML."""
        place = self.document
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    def open(self) -> Context:
        """Open the project from its YAML."""
        path = self.folder / "project.yaml"
        text = yaml.safe_dump(copy.deepcopy(self.document))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return open_project(path, self.kinds)

    def open_graph(self) -> tuple[Context, Graph]:
        """Open the project and build its assets."""
        project = self.open()
        return project, build_graph(project)

    def run(self, *, redraw: bool = False, progress: Progress | None = None) -> Outcome:
        """Compute everything that is missing or stale, as `clip-select run` does."""
        project, graph = self.open_graph()
        return materialize(project, graph, self.instance, notice=lambda *_: None, progress=progress, redraw=redraw)

    def execute(
        self, *assets: str, shard: str | None = None, tags: dict[str, str] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Materialize assets in one run, as the UI's button does; by default every asset that has shards."""
        project, graph = self.open_graph()
        defs = build_defs(project, graph)
        job = defs.resolve_implicit_global_asset_job_def() if assets else defs.resolve_job_def("process_shards")
        self.instance.add_dynamic_partitions(SHARDS_NAME, list(SHARDS))
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(key.split("/")) for key in assets] or None,
            partition_key=shard,
            tags=tags,
            run_config=QUIET,
            raise_on_error=False,
        )

    def subset(self, recipe: str) -> Version:
        """Read a recipe's newest version."""
        version = Versions(self.open().lake, recipe).current()
        assert version is not None
        return version

    def manifest(self, recipe: str) -> pl.DataFrame:
        """Read the manifest of a recipe's newest version."""
        return pl.read_parquet(self.subset(recipe).manifest)

    def scores(self, asset: str, shards: Sequence[str] = SHARDS) -> pl.DataFrame:
        """Read a score asset's files as one table."""
        lake = self.open().lake
        return pl.concat([pl.from_arrow(lake.read(asset, shard)) for shard in shards])

    def files(self) -> dict[str, tuple[int, int]]:
        """Return modification time and inode of every file in the lake but locks; a rewrite changes them."""
        lake = self.folder / "lake"
        return {
            str(path.relative_to(lake)): (path.stat().st_mtime_ns, path.stat().st_ino)
            for path in lake.rglob("*")
            if path.is_file() and ".dagster" not in path.parts and path.suffix != ".lock"
        }

    def array(self, recipe: str) -> np.ndarray:
        """Load the uid array of a recipe's newest version."""
        return np.load(self.subset(recipe).uids, allow_pickle=False)


def keep(score: str, **limit: float) -> dict[str, Any]:
    """Return a `keep_top` step."""
    return {"keep_top": {"score": score, **limit}}


class FinishedPass:
    """The scenario after its first pass: computed once per test process, and copied for each test that starts from it.

    Provenance holds absolute paths, so every copy is put back at the path where the pass ran.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self._kept = folder / "kept"
        self._finished = Scenario(folder / "project", model)
        assert self._finished.run().failures == {}
        shutil.copytree(self._finished.folder, self._kept)  # with times, which provenance holds too

    def restore(self, scenario: Scenario) -> None:
        """Turn a fresh scenario into a finished one, with the same files and Dagster records."""
        gc.collect()  # DuckDB gives an open database of the same path again, so those of the last test must be closed
        shutil.rmtree(self._finished.folder)
        shutil.copytree(self._kept, self._finished.folder)
        scenario.folder = self._finished.folder
        for storage in ("event_log_storage", "run_storage"):
            source, target = (getattr(owner.instance, storage) for owner in (self._finished, scenario))
            # An ephemeral instance keeps its records in SQLite databases in memory, and has no public way to copy them.
            source._held_conn.connection.driver_connection.backup(target._held_conn.connection.driver_connection)

    def dispose(self) -> None:
        """Release the records."""
        self._finished.instance.dispose()


@pytest.fixture(scope="session")
def finished_pass(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[FinishedPass]:
    """Yield the pass that `finished` copies."""
    kept = FinishedPass(tmp_path_factory.mktemp("finished"), tiny_clip)
    yield kept
    kept.dispose()


@pytest.fixture
def scenario(tmp_path: Path, tiny_clip: Path) -> Iterator[Scenario]:
    """Yield a project in which nothing has run."""
    scenario = Scenario(tmp_path, tiny_clip)
    yield scenario
    scenario.instance.dispose()


@pytest.fixture
def finished(scenario: Scenario, finished_pass: FinishedPass) -> Scenario:
    """Let the `scenario` of this test start with everything computed; its folder is another than `tmp_path`."""
    finished_pass.restore(scenario)
    return scenario
