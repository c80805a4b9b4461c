"""A lake that was moved or copied: no query answers from another lake, and a run builds the catalog again."""

import json
import shutil
from pathlib import Path

import duckdb
import pytest

from dagster_project import cli, notebook
from resources.catalog.build import CatalogError
from tests.support.scenario import Scenario, keep

QUERIES = (
    "SELECT count(*) FROM pool",
    "SELECT uid FROM pool WHERE f0 = 17",
    "SELECT * FROM scores LIMIT 1",
    "FROM subsets",
    "SELECT * FROM subset_members WHERE recipe = 'paper'",
    "FROM explain('{uid}')",
    "FROM versions('paper')",
    "FROM lineage('paper')",
    "FROM diff('paper', 'v0001', 'v0001')",
    "FROM overlap('paper', 'inside')",
    "FROM rejects",
    "FROM shards",
)


def queried_directly(catalog: Path, uid: str) -> list[str]:
    """Return the queries that DuckDB answers although they should be errors."""
    answered = []
    with duckdb.connect(str(catalog), read_only=True) as con:
        for query in QUERIES:
            try:
                con.execute(query.format(uid=uid)).fetchall()
            except duckdb.Error as error:
                if "moved or copied" in str(error) or "No files found" in str(error):
                    continue
                raise
            answered.append(query)
    return answered


@pytest.mark.parametrize("original", ["changed", "deleted"])
def test_a_copied_or_moved_lake_is_an_error_until_a_run_and_then_answers_for_itself(
    original: str, finished: Scenario, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = finished.manifest("paper")["uid"][0]
    wanted = set(finished.manifest("paper")["uid"])
    old, new = finished.folder / "lake", tmp_path / "elsewhere [v2]" / "lake"
    shutil.copytree(old, new)
    if original == "deleted":
        shutil.rmtree(old)
    else:
        finished.set("recipes", "paper", value={"steps": [keep("clip_score/tiny", count=1)]})
        assert finished.run().failures == {}
        (old / "raw_pool/00000.parquet").unlink()
        finished.set(
            "recipes",
            "paper",
            value={"steps": [keep("neg_clip_loss/tiny", fraction=0.5), keep("norm_sim_inf/tiny/pets", fraction=0.25)]},
        )
    finished.set("lake", value=str(new))
    finished.open()
    config = str(finished.folder / "project.yaml")
    assert queried_directly(new / "catalog.duckdb", uid) == []
    for command in (["explain", config, "--uid", uid], ["versions", config], ["lineage", config, "--recipe", "paper"]):
        assert cli.main(command) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "the lake was moved or copied since. Remedy: clip-select run" in printed.err.replace("\n", " ")
    assert cli.main(["status", config, "--json"]) == 0
    assert {row["asset"] for row in json.loads(capsys.readouterr().out) if row["state"] != "up to date"} == {"catalog"}
    project = notebook.open_project(config)
    for ask in (lambda: project.pool(), lambda: project.explain(uid), lambda: project.sql("FROM subsets")):
        with pytest.raises(CatalogError, match="moved or copied"):
            ask()
    outcome = finished.run()
    assert outcome.failures == {}
    assert outcome.computed == {"catalog": []}
    assert cli.main(["explain", config, "--uid", uid]) == 0
    assert "paper v0001" in capsys.readouterr().out
    assert set(project.subset("paper")["uid"]) == wanted
    assert set(project.sql("SELECT uid FROM subset_members WHERE recipe = 'paper'")["uid"]) == wanted
    assert len(project.pool()) == 36


def test_a_catalog_is_the_same_by_a_link_and_by_a_relative_path(
    finished: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(finished.folder / "lake")
    with duckdb.connect(str(link / "catalog.duckdb"), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM pool").fetchall() == [(36,)]
    monkeypatch.chdir(finished.folder)
    with duckdb.connect("lake/catalog.duckdb", read_only=True) as con:
        assert con.execute("SELECT count(*) FROM pool").fetchall() == [(36,)]
