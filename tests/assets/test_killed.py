"""A run that is killed at any moment resumes without a lost or repeated row."""

import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.support.scenario import ROWS, SHARDS, Scenario


def data_files(lake: Path) -> dict[str, bytes]:
    """Return the lake's data: everything but Dagster's records, the catalog, and timings."""
    return {
        str(path.relative_to(lake)): path.read_bytes()
        for path in sorted(lake.rglob("*"))
        if path.suffix in (".parquet", ".arrow", ".npy") and ".dagster" not in path.parts
    }


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_where_an_unbroken_one_does(scenario: Scenario) -> None:
    scenario.set("encoders", "tiny", "workers", value=2)
    scenario.set("lake", value="unbroken")
    assert scenario.run().failures == {}
    wanted = data_files(scenario.folder / "unbroken")
    assert len(wanted) > 20

    scenario.set("lake", value="lake")
    scenario.open()
    lake = scenario.folder / "lake"
    killed_at = []
    command = [sys.executable, "-m", "dagster_project.cli", "run", str(scenario.folder / "project.yaml")]
    for files in (1, 4, 9, 13, 17, 22):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(data_files(lake)) < files:
            try:
                process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed_at.append(len(data_files(lake)))
    assert killed_at == sorted(killed_at)
    assert killed_at[-1] < len(wanted)

    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert data_files(lake) == wanted
    assert not [path for path in lake.rglob(".*.tmp") if ".dagster" not in path.parts]
    for shard in SHARDS:
        rows = pl.read_parquet(lake / "raw_pool" / f"{shard}.parquet")
        assert rows["uid"].n_unique() == len(rows) == ROWS
