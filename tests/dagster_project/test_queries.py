"""Commands that ask a project (status, versions, diff, lineage, rejects), with and without --json; and export."""

import json
import tarfile
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_project import cli
from tests.support.scenario import ROWS, SHARDS, Scenario, keep


class Terminal:
    """Runs commands on a scenario's project."""

    def __init__(self, scenario: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
        self.scenario = scenario
        self.capsys = capsys

    def text(self, command: str, *options: str, status: int = 0) -> str:
        """Run a command, check its exit status, and return what it printed: to stdout, or to stderr if it failed."""
        self.scenario.open()
        assert cli.main([command, str(self.scenario.folder / "project.yaml"), *options]) == status
        printed = self.capsys.readouterr()
        return printed.err if status else printed.out

    def json(self, command: str, *options: str) -> Any:
        """Run a command with --json and return what it printed."""
        return json.loads(self.text(command, *options, "--json"))


@pytest.fixture
def terminal(finished: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "250")
    return Terminal(finished, capsys)


def test_status_counts_the_shards_that_are_up_to_date_due_and_waiting(terminal: Terminal) -> None:
    rows = terminal.json("status")
    assert {row["state"] for row in rows} == {"up to date"}
    assert "Everything is up to date." in terminal.text("status")
    (terminal.scenario.folder / "pool" / f"{SHARDS[0]}.tar").unlink()
    (terminal.scenario.folder / "pool" / f"{SHARDS[0]}.parquet").unlink(missing_ok=True)
    terminal.scenario.write_shard("00003")
    by_key = {row["asset"]: row for row in terminal.json("status")}
    assert by_key["raw_pool"] == {
        "asset": "raw_pool",
        "state": "due",
        "up_to_date": 2,
        "of": 3,
        "rows": 2 * ROWS,
    }
    assert by_key["embeddings/tiny"]["state"] == "waits for its inputs"
    assert by_key["subset/paper"] | {"rows": 0} == {
        "asset": "subset/paper",
        "state": "due",
        "up_to_date": 0,
        "of": 1,
        "rows": 0,
        "version": "v0001",
    }
    assert f"No longer in the pool: {SHARDS[0]}" in terminal.text("status")


def test_status_lists_for_each_shard_which_assets_are_up_to_date(terminal: Terminal) -> None:
    assets = ["raw_pool", "embeddings/tiny", "clip_score/tiny", "neg_clip_loss/tiny", "norm_sim/tiny/pets"]
    terminal.scenario.write_shard("00003")
    terminal.scenario.open().lake.remove("clip_score/tiny", SHARDS[2])
    found = terminal.json("status", "--shards")
    assert [(row["shard"], row["rows"]) for row in found] == [
        (SHARDS[2], ROWS),
        ("00003", None),
        (SHARDS[0], ROWS),
        (SHARDS[1], ROWS),
    ]
    assert found[0]["due"] == ["clip_score/tiny"]
    assert (found[1]["due"], found[1]["waiting"]) == (["raw_pool"], assets[1:])
    assert (found[2]["complete"], found[2]["due"], found[2]["waiting"]) == (assets, [], [])
    text = terminal.text("status", "--shards", "--limit", "2")
    assert "4 of 5" in text
    assert "and 2 more rows" in text
    assert "2 of 4 shards are complete." in text


def test_the_metadata_of_the_catalog_lists_for_each_shard_what_is_complete(finished: Scenario) -> None:
    (record,) = finished.instance.fetch_materializations(dg.AssetKey("catalog"), limit=1).records
    assert record.asset_materialization is not None
    metadata = record.asset_materialization.metadata
    assert (metadata["shards_complete"].value, metadata["shards_in_pool"].value) == (3, 3)
    table = metadata["shards"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [row.data for row in table.records] == [
        {"shard": shard, "rows": ROWS, "complete": "5 of 5", "due": "", "waiting for inputs": ""} for shard in SHARDS
    ]


def test_versions_diff_and_lineage_show_the_history_of_a_subset(terminal: Terminal) -> None:
    before = set(terminal.scenario.manifest("clip_third")["uid"])
    terminal.scenario.set("recipes", "clip_third", value={"steps": [keep("clip_score/tiny", count=5)]})
    assert terminal.scenario.run().failures == {}
    after = set(terminal.scenario.manifest("clip_third")["uid"])
    assert len(after) == 5
    assert after < before
    rows = terminal.json("versions", "--recipe", "clip_third")
    assert [(row["version"], row["rows"], row["current"]) for row in rows] == [
        ("v0001", len(before), False),
        ("v0002", 5, True),
    ]
    assert {row["recipe"] for row in terminal.json("versions")} == {"clip_third", "inside", "paper"}
    left = terminal.json("diff", "--recipe", "clip_third")
    assert {row["uid"] for row in left} == before - after
    assert {row["change"] for row in left} == {"left"}
    entered = terminal.json("diff", "--recipe", "clip_third", "--from", "v0002", "--to", "v0001", "--limit", "3")
    assert [row["change"] for row in entered] == ["entered"] * 3
    printed = terminal.text("diff", "--recipe", "clip_third", "--limit", "2")
    assert "clip_third, v0001 to v0002" in printed
    assert f"and {len(before - after) - 2} more rows; --limit shows more" in printed
    record = terminal.json("lineage", "--recipe", "clip_third", "--version", "v0001")
    assert (record["version"], record["rows"]) == ("v0001", len(before))
    assert "keep the top 5 by clip_score/tiny" in terminal.text("lineage", "--recipe", "clip_third")


def test_a_name_that_does_not_exist_gets_a_suggestion_and_exit_status_2(terminal: Terminal) -> None:
    for arguments, message in (
        (["versions", "--recipe", "papr"], "there is no recipe 'papr'; did you mean paper"),
        (["diff", "--recipe", "papr"], "there is no recipe with a version, 'papr'; did you mean paper"),
        (["diff", "--recipe", "paper"], "paper: v0001 is the first version"),
        (["diff", "--recipe", "paper", "--to", "v0009"], "there is no version 'v0009'; did you mean v0001"),
        (["lineage", "--recipe", "paper", "--version", "1"], "there is no version '1'"),
        (["export", "--recipe", "papr"], "there is no recipe 'papr'; did you mean paper"),
        (["evaluate", "--name", "smal"], "there is no evaluation 'smal'"),
        (["rejects", "--reason", "too_smal"], "there is no rejected sample for the reason 'too_smal'"),
    ):
        assert message in terminal.text(*arguments, status=2)


def test_export_writes_the_tars_of_the_newest_version_once(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert terminal.text("run")  # the project's own instance learns the shards
    assert "Exported: " in terminal.text("export", "--recipe", "paper")
    folder = terminal.scenario.folder / "lake" / "export" / "paper" / "v0001"
    keys: set[str] = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys |= {Path(name).stem for name in tar.getnames()}
    assert keys == set(terminal.scenario.manifest("paper")["key"])
    written = terminal.scenario.files()
    terminal.text("export", "--recipe", "paper")
    assert {name: written[name] for name in written if "export" in name} == {
        name: stamp for name, stamp in terminal.scenario.files().items() if "export" in name
    }
    terminal.scenario.set("recipes", "paper", value={"steps": [keep("clip_score/tiny", count=5)]})
    assert "subset/paper has no version, or is out of date" in terminal.text("export", "--recipe", "paper", status=2)


@pytest.fixture
def rejected(scenario: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Yield a pool of one shard with two failed downloads, one of them without a url, and one missing sample."""
    monkeypatch.setenv("COLUMNS", "250")
    sidecar = scenario.folder / "pool" / f"{SHARDS[0]}.parquet"
    pool = pl.read_parquet(sidecar) if sidecar.exists() else None
    keys = [f"{number:09d}" for number in range(ROWS)] if pool is None else pool["key"].to_list()
    lost = {
        "key": ["900000001", "900000002", "900000003"],
        "status": ["failed_to_download", "failed_to_download", "success"],
        "error_message": ["HTTP Error 404: [/b] :heart:", None, None],
        "url": ["https://a.example/1.jpg", None, "https://a.example/3.jpg"],
        "caption": ["a red kite", "two kites", "three kites"],
        "uid": ["ab" * 16, "cd" * 16, "ef" * 16],
    }
    present = {
        "key": keys,
        "status": ["success"] * len(keys),
        "error_message": [None] * len(keys),
        "url": [f"https://a.example/{key}.jpg" for key in keys],
        "caption": [f"caption {key}" for key in keys],
        "uid": [f"{number:032x}" for number in range(len(keys))],
    }
    pq.write_table(pa.table({name: [*present[name], *lost[name]] for name in lost}), sidecar)
    scenario.execute("raw_pool", shard=SHARDS[0])
    return Terminal(scenario, capsys)


def test_rejects_lists_samples_by_reason(rejected: Terminal) -> None:
    rows = [row for row in rejected.json("rejects") if row["key"].startswith("9")]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("900000001", "download_failed"),
        ("900000002", "download_failed"),
        ("900000003", "missing_from_tar"),
    ]
    assert rows[0]["detail"] == "failed_to_download: HTTP Error 404: [/b] :heart:"
    assert "HTTP Error 404: [/b] :heart:" in rejected.text("rejects")
    assert [row["key"] for row in rejected.json("rejects", "--reason", "missing_from_tar")] == ["900000003"]


def test_failed_downloads_become_a_parquet_file_for_img2dataset(rejected: Terminal, tmp_path: Path) -> None:
    retry = tmp_path / "lists" / "retry.parquet"
    assert "samples to download again: 1; without a url, and left out: 1" in rejected.text(
        "rejects", "--retry", str(retry)
    )
    assert pq.read_table(retry).to_pylist() == [
        {
            "url": "https://a.example/1.jpg",
            "caption": "a red kite",
            "uid": "ab" * 16,
            "key": "900000001",
            "shard": SHARDS[0],
        }
    ]
    counts = rejected.json("rejects", "--retry", str(retry), "--reason", "missing_from_tar")
    assert counts == {"file": str(retry), "samples": 1, "without_url": 0}
    assert pl.read_parquet(retry)["url"].to_list() == ["https://a.example/3.jpg"]


@pytest.mark.parametrize(
    ("command", "options", "kind", "status"),
    [
        ("explain", ["--uid", "0" * 32], "UnknownUidError", 1),
        ("versions", ["--recipe", "clip_thrid"], "QueryError", 2),
        ("rejects", ["--reason", "too_big"], "QueryError", 2),
        ("export", ["--recipe", "clip_thrid"], "QueryError", 2),
        ("evaluate", ["--name", "smal"], "QueryError", 2),
        ("check", ["--only", "clip_thrid"], "QueryError", 2),
        ("status", ["--limti", "3"], "NoSuchOption", 2),
    ],
)
def test_a_command_that_fails_prints_one_json_document_and_the_message_without_a_class(
    terminal: Terminal, command: str, options: list[str], kind: str, status: int
) -> None:
    assert cli.main([command, str(terminal.scenario.folder / "project.yaml"), *options, "--json"]) == status
    printed = terminal.capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["exit_status"], document["error"]["type"]) == (status, kind)
    assert document["error"]["message"] in printed.err
    assert kind not in printed.err


def test_check_and_export_print_json(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert terminal.json("run")["failed"] == []  # the project's own instance learns the shards
    assert terminal.json("check")["shards"] == len(SHARDS)
    found = terminal.json("export", "--recipe", "paper")
    assert (found["exit_status"], found["version"], found["failed"]) == (0, "v0001", [])
    assert Path(found["folder"]) == terminal.scenario.folder / "lake" / "export" / "paper" / "v0001"
    assert list(Path(found["folder"]).glob("*.tar"))


def test_a_count_above_the_number_of_rows_is_a_warning_in_the_terminal_the_record_and_the_report(
    terminal: Terminal,
) -> None:
    terminal.scenario.set("recipes", "clip_third", value={"steps": [keep("clip_score/tiny", count=10**20)]})
    found = terminal.json("run")
    note = f"{3 * ROWS} rows entered, fewer than the {10**20} wanted: all stay"
    (subset,) = (subset for subset in found["subsets"] if subset["recipe"] == "clip_third")
    assert subset["warnings"] == [f"step 1: {note}"]
    assert json.loads((Path(subset["folder"]) / "lineage.json").read_text())["steps"][0]["note"] == note
    assert note in (Path(subset["folder"]) / "report" / "index.html").read_text()
    assert note in terminal.text("run")


def test_a_narrow_terminal_breaks_no_name_and_no_uid(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.scenario.set("recipes", "clip_third", value={"steps": [keep("clip_score/tiny", count=5)]})
    assert terminal.scenario.run().failures == {}
    uids = [row["uid"] for row in terminal.json("diff", "--recipe", "clip_third", "--limit", "3")]
    for width in ("80", "20"):
        monkeypatch.setenv("COLUMNS", width)
        assert terminal.text("versions").count("clip_third") == 2
        text = terminal.text("diff", "--recipe", "clip_third", "--limit", "3")
        assert all(uid in text for uid in uids)
