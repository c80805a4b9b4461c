"""Warnings reach people: in the terminal, the lineage record, the report and on the subset's page."""

import io
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from rich.console import Console

from dagster_project.console import print_outcome
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET
from resources.catalog.build import read_catalog
from tests.support.pool_factory import cosines, datacomp_shard, sample, unit_rows
from tests.support.scenario import Scenario, keep

COLUMN = "clip_b32_similarity_score"
SHARDS = ("00000", "00001", "00002")
BEST = {"best": {"steps": [keep("clip_score/b32", fraction=0.5)]}}
OWN = "near_the_pools_own"


@pytest.fixture
def imported(scenario: Scenario) -> Scenario:
    """A pool of DataComp metadata: one odd score in 00000, all agree in 00001, and 00002 has none."""
    for number, shard in enumerate(SHARDS):
        arrays = {"b32_img": unit_rows(10 * number + 1, 12), "b32_txt": unit_rows(10 * number + 2, 12)}
        stored = cosines(*arrays.values())
        stored[3] += np.float32(0.3 if number == 0 else 0)
        columns = {COLUMN: None if number == 2 else stored}
        datacomp_shard(scenario.folder / "metadata", shard, 12, columns=columns, arrays=arrays)
    scenario.document |= {
        "pool": {"path": "metadata", "format": "datacomp"},
        "encoders": {"b32": {"precomputed": "b32", "temperature": 0.1}},
        "targets": {},
        "scores": {},
        "recipes": {},
    }
    return scenario


def warnings(scenario: Scenario, recipe: str = "best") -> list[tuple[str, str, str, list[str]]]:
    found = scenario.subset(recipe).lineage["warnings"]
    return [(entry["asset"], entry["check"], entry["result"], entry["shards"]) for entry in found]


def printed(scenario: Scenario) -> str:
    project, graph = scenario.open_graph()
    text = io.StringIO()
    print_outcome(project, graph, scenario.run(), Console(file=text, width=200))
    return text.getvalue()


def test_a_check_of_an_earlier_pass_reaches_everyone_without_dagsters_records(imported: Scenario) -> None:
    assert imported.run().failures == {}
    imported.instance.dispose()
    imported.instance = dg.DagsterInstance.ephemeral()
    imported.set("recipes", value=BEST)
    assert imported.run().computed.keys() == {"subset/best", "catalog"}

    failed = "clip_score/b32 near_the_pools_own: failed in shard 00000: 1 of 12 rows differ by more than 0.02"
    nothing = f"clip_score/b32 near_the_pools_own: not compared in shard 00002: no row of the pool has a {COLUMN}"
    assert warnings(imported) == [
        ("clip_score/b32", OWN, "failed", ["00000"]),
        ("clip_score/b32", OWN, "not compared", ["00002"]),
    ]
    assert f"Warnings:\n  {failed}\nNot compared:\n  {nothing}\n" in printed(imported)
    assert (
        "1 of 12 rows differ by more than 0.02"
        in (Path(imported.subset("best").folder) / "report/index.html").read_text()
    )
    event = imported.instance.get_latest_materialization_event(dg.AssetKey(["subset", "best"]))
    assert event is not None
    shown = event.asset_materialization.metadata["warnings"].value
    assert "1 of 12 rows differ by more than 0.02" in shown
    assert len(shown.splitlines()) == 2
    with read_catalog(imported.open().catalog_path()) as con:
        rows = con.execute("SELECT name, value FROM lineage('best') WHERE what = 'warning'").fetchall()
    assert rows[0] == (
        "clip_score/b32 near_the_pools_own",
        "failed in 1 shards: 1 of 12 rows differ by more than 0.02",
    )


def test_a_check_that_compared_nothing_does_not_pass_in_dagster(imported: Scenario) -> None:
    imported.run()
    key = dg.AssetCheckKey(dg.AssetKey(["clip_score", "b32"]), OWN)
    records = imported.instance.event_log_storage.get_asset_check_execution_history(key, limit=10)
    assert {record.partition: record.status.value for record in records} == {
        "00000": "FAILED",
        "00001": "SUCCEEDED",
        "00002": "FAILED",
    }
    (event,) = [record.event for record in records if record.partition == "00002"]
    assert event is not None
    found = event.dagster_event.asset_check_evaluation_data
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.description == f"not compared: no row of the pool has a {COLUMN}"


def test_a_check_launched_by_itself_is_kept_in_the_lake_and_replaces_the_older_result(imported: Scenario) -> None:
    imported.run()
    lake = imported.open().lake
    stored = lake.stored("clip_score/b32", "00001")
    assert stored is not None
    table = lake.read("clip_score/b32", "00001")
    spoiled = table["clip_score"].to_numpy() + np.float32(0.1)
    lake.write(
        table.set_column(3, "clip_score", [spoiled]),
        stored.provenance,
        content=stored.fingerprint,
        summary=stored.summary,
    )
    project, graph = imported.open_graph()
    job = build_defs(project, graph).resolve_implicit_global_asset_job_def()
    keys = {dg.AssetCheckKey(dg.AssetKey(["clip_score", "b32"]), OWN)}
    assert (
        job.get_subset(asset_selection=set(), asset_check_selection=keys)
        .execute_in_process(instance=imported.instance, partition_key="00001", run_config=QUIET)
        .success
    )
    imported.set("recipes", value=BEST)
    imported.run()
    assert ("clip_score/b32", OWN, "failed", ["00000", "00001"]) in warnings(imported)
    (imported.folder / "metadata/00001.parquet").unlink()
    (imported.folder / "metadata/00001.npz").unlink()
    imported.run()
    assert not (imported.folder / "lake/checks/clip_score/b32/00001").exists()


def test_a_subset_lists_what_the_subsets_it_reads_depend_on(imported: Scenario) -> None:
    inside = {"from": "best", "steps": [{"where": "width > 1"}]}
    imported.set("recipes", value={**BEST, "inside": inside, "all": {"steps": [{"where": "width > 1"}]}})
    assert imported.run().failures == {}
    assert warnings(imported, "inside") == warnings(imported, "best")
    assert warnings(imported, "all") == []


def test_repeated_uids_are_a_warning_of_the_subset(scenario: Scenario) -> None:
    scenario.write_shard("00001", meta=sample(0, "00000").meta)
    assert scenario.run().failures == {}
    assert warnings(scenario, "clip_third") == [("subset/clip_third", "uids_unique_across_shards", "failed", [])]
    assert warnings(scenario, "inside") == [
        ("subset/clip_third", "uids_unique_across_shards", "failed", []),
        ("subset/inside", "uids_unique_across_shards", "failed", []),
    ]
    assert "subset/clip_third uids_unique_across_shards: failed: 1 rows have the uid" in printed(scenario)
