"""A run that is killed at any moment resumes without a lost or repeated row."""

import signal

import polars as pl
import pytest

from tests.support.interrupting import data_files, start_forked_run, stray_files
from tests.support.scenario import ROWS, SHARDS, Scenario


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_where_an_unbroken_one_does(scenario: Scenario) -> None:
    scenario.set("encoders", "tiny", "workers", value=2)
    scenario.open()
    lake = scenario.folder / "lake"
    killed_at = []
    config = scenario.folder / "project.yaml"
    for files in (1, 4, 9, 13, 17, 22):
        process = start_forked_run(config)
        while process.is_alive() and len(data_files(lake)) < files:
            process.join(timeout=0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed_at.append(len(data_files(lake)))
    assert killed_at == sorted(killed_at)

    finished = start_forked_run(config)
    finished.join()
    assert finished.exitcode == 0
    assert not stray_files(lake)

    scenario.set("lake", value="unbroken")
    assert scenario.run().failures == {}
    wanted = data_files(scenario.folder / "unbroken")
    assert len(wanted) > 20
    assert killed_at[-1] < len(wanted)
    assert data_files(lake) == wanted
    for shard in SHARDS:
        rows = pl.read_parquet(lake / "raw_pool" / f"{shard}.parquet")
        assert rows["uid"].n_unique() == len(rows) == ROWS
