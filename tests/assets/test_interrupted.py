"""A run that is interrupted while it embeds selects nothing, and its resumption ends where an unbroken run does."""

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest

from dagster_project.dead_runs import close_dead_runs
from dagster_project.instance import open_instance
from tests.support.interrupting import Running, data_files, stray_files
from tests.support.scenario import SHARDS, Scenario

LARGE = 300


def interrupt(scenario: Scenario, number: signal.Signals, at: Path, *, ignored: bool = False) -> str:
    """Run the project, send a signal to all its processes when a file appears, and return the line about it."""
    command = [sys.executable, "-m", "dagster_project.cli", "run", str(scenario.folder / "project.yaml")]
    running = Running(command, ignored=ignored)
    running.wait_for(at.exists)
    status, errors = running.end(number, group=True)
    assert status == 128 + number
    *progress, line = errors.splitlines(keepends=True)
    assert all(shown.startswith("step ") for shown in progress)
    assert line.startswith(f"Interrupted by {number.name}: kept all finished files")
    assert line.endswith(f"; no subset was selected. To resume: clip-select run {scenario.folder}/project.yaml\n")
    return line


def embedded(lake: Path) -> list[str]:
    return sorted(path.stem for path in (lake / "embeddings/tiny").glob("*.arrow"))


@pytest.mark.slow
def test_an_interrupted_run_selects_nothing_and_its_resumption_computes_only_the_rest(scenario: Scenario) -> None:
    scenario.set("encoders", "tiny", "batch_size", value=1)
    for shard in SHARDS[1:]:
        scenario.write_shard(shard, rows=LARGE)  # long enough for a signal in the middle of it
    scenario.set("lake", value="unbroken")
    assert scenario.run().failures == {}
    wanted = data_files(scenario.folder / "unbroken")

    scenario.set("lake", value="lake")
    project = scenario.open()
    lake = scenario.folder / "lake"
    line = interrupt(scenario, signal.SIGINT, lake / "embeddings/tiny/00000.arrow", ignored=True)
    assert "raw_pool (3 files)" in line
    assert embedded(lake) == ["00000"]
    assert not (lake / "subset").exists()
    assert not (lake / "catalog.duckdb").exists()
    assert not (lake / "clip_score").exists()
    assert not stray_files(lake)

    interrupt(scenario, signal.SIGTERM, lake / "embeddings/tiny/00001.arrow")
    assert embedded(lake) == ["00000", "00001"]
    assert not (lake / "subset").exists()
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.computed["embeddings/tiny"] == ["00002"]
    assert "raw_pool" not in outcome.computed
    with open_instance(project) as instance:
        close_dead_runs(instance)  # as each command and sensor begins; on a busy machine a run can't close its record
        statuses = Counter(run.status for run in instance.get_runs())
        assert set(statuses) == {dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS}
        assert statuses[dg.DagsterRunStatus.FAILURE] == 2
        assert not list(Path(instance.root_directory).glob("processes/*"))
    assert data_files(lake) == wanted
    assert json.loads(Path(scenario.subset("paper").folder, "lineage.json").read_text())["shards_missing"] == {}
    assert not stray_files(lake)
