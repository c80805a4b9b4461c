"""Damaged and missing files: `clip-select verify` reports each of them, and a run computes it again or reports it."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dagster_project import cli
from dagster_project.instance import damaged_records
from dagster_project.verify import verified_files
from resources.storage.checksums import Checked
from tests.support.corruption import DAMAGES, flip, replace_content
from tests.support.scenario import SHARDS, Scenario, keep

VERSION = "subset/paper/v0001"
KINDS = {
    "embeddings": f"embeddings/tiny/{SHARDS[0]}.arrow",
    "target embeddings": "target_embeddings/tiny/pets.arrow",
    "score": f"neg_clip_loss/tiny/{SHARDS[1]}.parquet",
    "raw_pool": f"raw_pool/{SHARDS[2]}.parquet",
    "rejects": f"rejects/{SHARDS[1]}.parquet",
    "subset.npy": f"{VERSION}/subset.npy",
    "manifest": f"{VERSION}/manifest.parquet",
    "set of uids": "subset/inside/v0001/sets/clip_third.parquet",
    "lineage.json": f"{VERSION}/lineage.json",
    "report": f"{VERSION}/report/index.html",
    "report checksums": f"{VERSION}/report/checksums.json",
}


class Verify:
    """Runs `clip-select verify` on a scenario."""

    def __init__(self, scenario: Scenario, capfd: pytest.CaptureFixture[str]) -> None:
        self.scenario = scenario
        self.lake = scenario.folder / "lake"
        self.capfd = capfd

    def __call__(self, *options: str, status: int) -> dict[str, dict[str, Any]]:
        """Check the exit status, and that there is no traceback; return the reported files by path in the lake."""
        self.scenario.open()
        self.capfd.readouterr()
        assert cli.main(["verify", str(self.scenario.folder / "project.yaml"), "--json", *options]) == status
        printed = self.capfd.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return {str(Path(file["file"]).relative_to(self.lake)): file for file in json.loads(printed.out)["files"]}


@pytest.fixture
def verify(finished: Scenario, capfd: pytest.CaptureFixture[str]) -> Verify:
    return Verify(finished, capfd)


def results(lake: Path) -> dict[str, bytes]:
    """Return the bytes of everything that was computed; newest versions by recipe, as a version's number may differ."""
    found = {
        str(path.relative_to(lake)): path.read_bytes()
        for path in lake.rglob("[!.]*")
        if path.suffix in (".parquet", ".arrow") and path.relative_to(lake).parts[0] not in ("subset", "catalog")
    }
    for recipe in sorted((lake / "subset").iterdir()):
        newest = max(recipe.glob("v*"))
        for name in ("subset.npy", "manifest.parquet"):
            found[f"{recipe.name} {name}"] = (newest / name).read_bytes()
        assert (newest / "report/index.html").stat().st_size > 0
    return found


def test_a_sound_lake_has_no_file_that_is_not_verified(verify: Verify) -> None:
    assert verify(status=0) == {}


def test_a_lake_that_is_not_there_is_missing(verify: Verify) -> None:
    verify.lake.rename(verify.lake.with_name("away"))
    assert verify(status=1)["."]["state"] == "missing"


def test_each_damage_of_each_file_is_reported_and_the_others_are_not(verify: Verify) -> None:
    """Reading changes nothing, so one lake serves all cases."""
    project, graph = verify.scenario.open_graph()
    wrong = []
    for kind, name in KINDS.items():
        path = verify.lake / name
        content = path.read_bytes()
        for damage, apply in DAMAGES.items():
            apply(path)
            reported = [file for file in verified_files(project, graph) if file.state != "ok"]
            state = "missing" if damage == "deleted" else "damaged"
            states = {str(Path(file.file).relative_to(verify.lake)): file.state for file in reported}
            listed = kind == "report checksums" and all(file.startswith(f"{VERSION}/report/") for file in states)
            if not states or (states != {name: state} and not listed):
                wrong.append((kind, damage, reported))
            elif not all(file.remedy and file.detail for file in reported):
                wrong.append((kind, damage, "no remedy or detail"))
            replace_content(path, content)
    assert wrong == []
    assert verify(status=0) == {}


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "emptied", "deleted"])
def test_a_run_computes_damaged_files_of_every_kind_again(
    damage: str, verify: Verify, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = results(verify.lake)
    some = ("embeddings", "target embeddings", "score", "raw_pool", "rejects", "subset.npy", "set of uids")
    for kind in some:
        DAMAGES[damage](verify.lake / KINDS[kind])
    DAMAGES[damage](verify.lake / "subset/clip_third/v0001/report/scores.png")
    if damage == "flipped bit":  # a file that nothing reads is only found by a complete reading
        verify("--repair", status=1)
    outcome = verify.scenario.run()
    assert (outcome.failures, outcome.not_attempted) == ({}, {})
    assert results(verify.lake) == wanted
    assert {file["state"] for file in verify(status=0).values()} <= {"set aside"}
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("damage", ["flipped bit", "{}", "deleted"])
def test_a_version_whose_record_is_damaged_is_selected_again(damage: str, verify: Verify) -> None:
    wanted = results(verify.lake)
    DAMAGES[damage](verify.lake / KINDS["lineage.json"])
    outcome = verify.scenario.run()
    assert outcome.failures == {}
    assert outcome.computed.keys() == {"subset/paper", "catalog"}
    assert results(verify.lake) == wanted
    assert verify.scenario.subset("paper").name == "v0002"  # a number is not used for another version
    verify("--repair", status=int(damage == "deleted"))  # the files beside the missing record
    assert {file["state"] for file in verify(status=0).values()} == {"set aside"}


def test_damage_that_a_step_finds_in_its_inputs_is_repaired_in_the_same_pass(verify: Verify) -> None:
    """The other shards are computed, and the step is tried again when its input was."""
    wanted = results(verify.lake)
    for name in ("embeddings", "score"):
        flip(verify.lake / KINDS[name], (verify.lake / KINDS[name]).stat().st_size // 2)
    for shard in SHARDS:
        (verify.lake / f"clip_score/tiny/{shard}.parquet").unlink()
    verify.scenario.set("recipes", "another", value={"steps": [keep("neg_clip_loss/tiny", count=2)]})
    outcome = verify.scenario.run()
    assert outcome.failures == {}
    assert outcome.computed["clip_score/tiny"] == list(SHARDS)
    assert outcome.computed["embeddings/tiny"] == [SHARDS[0]]
    assert outcome.computed["neg_clip_loss/tiny"] == [SHARDS[1]]
    assert set(outcome.damaged) == {str(verify.lake / KINDS[name]) for name in ("embeddings", "score")}
    found = results(verify.lake)
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("file", ["catalog.duckdb", "catalog/targets.parquet"])
def test_a_damaged_catalog_is_reported_and_built_again(
    file: str, verify: Verify, capfd: pytest.CaptureFixture[str]
) -> None:
    config, path = str(verify.scenario.folder / "project.yaml"), verify.lake / file
    for damage in ("flipped bit", "truncated", "emptied", "deleted"):
        DAMAGES[damage](path)
        assert set(verify(status=1)) == {file}
        assert cli.main(["versions", config]) == 2
        message = capfd.readouterr().err
        assert str(path) in message.replace("\n", "")
        assert "Remedy: " in message
        assert verify.scenario.run().computed == {"catalog": []}
        assert cli.main(["versions", config]) == 0
        assert verify(status=0) == {}


def test_an_older_damaged_version_is_reported_by_sql_until_it_is_set_aside(
    verify: Verify, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(verify.scenario.folder / "project.yaml")
    verify.scenario.set("recipes", "paper", value={"steps": [keep("clip_score/tiny", count=5)]})
    assert verify.scenario.run().failures == {}
    replace_content(verify.lake / KINDS["lineage.json"], b"{}")
    assert cli.main(["versions", config]) == 2
    assert "lineage.json: damaged: not a lineage record" in capfd.readouterr().err.replace("\n", " ")
    assert verify("--repair", status=1)[KINDS["lineage.json"]]["remedy"].startswith("the version was set aside")
    assert cli.main(["versions", config]) == 0
    assert verify.scenario.run().failures == {}


def test_files_from_before_checksums_are_unverified_and_valid(verify: Verify) -> None:
    path = verify.lake / KINDS["score"]
    table = pq.read_table(path)
    record = json.loads(table.schema.metadata[b"clip_data_selection"])
    del record["checksums"]
    path.unlink()
    pq.write_table(table.replace_schema_metadata({b"clip_data_selection": json.dumps(record)}), path)
    content = path.read_bytes()
    assert not Checked(lambda start, stop: content[start:stop], len(content)).sealed
    lineage = verify.lake / KINDS["lineage.json"]
    old = {name: value for name, value in json.loads(lineage.read_text()).items() if name[:8] != "checksum"}
    replace_content(lineage, json.dumps(old).encode())
    (verify.lake / KINDS["report checksums"]).unlink()
    assert {name: file["state"] for name, file in verify(status=0).items()} == {
        KINDS["score"]: "unverified",
        KINDS["lineage.json"]: "unverified",
    }
    assert set(verify.scenario.run().computed) <= {"catalog"}


def test_verify_prints_one_line_for_each_file_with_its_remedy(
    verify: Verify, capfd: pytest.CaptureFixture[str]
) -> None:
    path = verify.lake / KINDS["embeddings"]
    replace_content(path, b"")
    assert cli.main(["verify", str(verify.scenario.folder / "project.yaml")]) == 1
    lines = capfd.readouterr().out.splitlines()
    remedy = "clip-select verify --repair sets it aside in any case, for the next run"
    assert (
        lines[0]
        == f"damaged: {path}: it is empty. Remedy: clip-select run computes it again if a step reads it; {remedy}"
    )
    assert lines[1].startswith("Files: ")
    assert "1 damaged" in lines[1]


# Dagster's records


@pytest.fixture
def instance(verify: Verify, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """Run the command once, so that the lake has an instance, and return its folder."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert cli.main(["run", str(verify.scenario.folder / "project.yaml")]) == 0
    capfd.readouterr()
    return verify.lake / ".dagster"


def test_damaged_records_of_dagster_are_one_message_and_exit_status_2(
    verify: Verify, instance: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, path = str(verify.scenario.folder / "project.yaml"), instance / "history/runs.db"
    content = path.read_bytes()
    spoilt: dict[str, Callable[[], object]] = {
        "emptied": lambda: replace_content(path, b""),
        "truncated": lambda: replace_content(path, content[:5_000]),
        "flipped": lambda: flip(path, 3),
    }
    for spoil in spoilt.values():
        spoil()
        assert cli.main(["run", config]) == 2
        printed = "".join(capfd.readouterr())
        assert "runs.db: damaged" in printed.replace("\n", "")
        assert "Remedy: stop Dagster and move its folder" in printed
        assert "Traceback" not in printed
        assert verify(status=1)[".dagster/history/runs.db"]["state"] == "damaged"
        replace_content(path, content)
    shutil.move(instance / "history", instance / "old history")
    assert cli.main(["run", config]) == 0
    assert "nothing was computed" in "".join(capfd.readouterr())


def test_settings_of_dagster_are_written_again_where_they_are_gone(
    verify: Verify, instance: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, path = str(verify.scenario.folder / "project.yaml"), instance / "dagster.yaml"
    content = path.read_bytes()
    for left in (b"", b"# only a comment", b"{}", None):
        replace_content(path, left or b"")
        if left is None:
            path.unlink()
        assert verify(status=1)[".dagster/dagster.yaml"]["state"] in ("damaged", "missing")
        assert cli.main(["run", config]) == 0
        assert path.read_bytes() == content
    replace_content(path, b"telemetry: [")
    assert verify(status=1)[".dagster/dagster.yaml"]["state"] == "damaged"
    capfd.readouterr()
    assert cli.main(["run", config]) == 2
    printed = "".join(capfd.readouterr())
    assert "dagster.yaml" in printed
    assert "Traceback" not in printed


def test_a_database_whose_pages_are_damaged_is_found_by_a_thorough_look(tmp_path: Path) -> None:
    path = tmp_path / "history" / "runs.db"
    path.parent.mkdir()
    with sqlite3.connect(path) as con:
        con.execute("CREATE TABLE runs (body TEXT)")
        con.executemany("INSERT INTO runs VALUES (?)", [("x" * 500,)] * 200)
    con.close()
    assert damaged_records(tmp_path, thorough=True) == {}
    content = bytearray(path.read_bytes())
    content[5 * 4096 : 6 * 4096] = bytes(4096)
    replace_content(path, bytes(content))
    assert set(damaged_records(tmp_path, thorough=True)) == {path}


def test_verify_writes_nothing_without_repair(verify: Verify) -> None:
    flip(verify.lake / KINDS["embeddings"], 3_000)
    before = verify.scenario.files()
    verify(status=1)
    assert verify.scenario.files() == before
