"""Output of `clip-select run`: it reports every loss, and prints text unchanged."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from assets.graph import build_graph
from dagster_project import cli as command
from resources.lake.files import LakeError
from tests.support.pool_factory import sample, write_shard, write_tar
from tests.support.scenario import SHARDS, Scenario


@pytest.fixture
def printed(scenario: Scenario) -> "Printed":
    return Printed(scenario)


class Printed:
    """Runs the scenario and returns the printed text."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def __call__(self) -> str:
        """Run a pass and return the printed text."""
        outcome = self.scenario.run()
        project = self.scenario.open()
        text = io.StringIO()
        console = Console(file=text, width=200)
        command.print_outcome(project, build_graph(project), outcome, console)
        return text.getvalue()


def test_brackets_in_a_step_are_printed_as_they_are(scenario: Scenario, printed: Printed) -> None:
    where = "caption NOT LIKE '%[/b]%' AND NOT regexp_matches(caption, '^[a-z]$')"
    scenario.set("recipes", value={"plain": {"steps": [{"where": where}]}})
    assert f"where {where}" in printed()


def test_a_shards_notes_its_rejects_and_repeated_uids_are_said(scenario: Scenario, printed: Printed) -> None:
    pool = scenario.folder / "pool"
    (pool / "00007.tar").write_bytes((pool / "00000.tar").read_bytes())
    members = [member for number in (900, 901, 902) for member in sample(number, "00008").members()]
    whole = write_tar(scenario.folder / "whole.tar", members).read_bytes()
    (pool / "00008.tar").write_bytes(whole[: whole.index(b"000000902.jpg") + 700])
    write_shard(pool, [sample(950, "00009"), sample(951, "00009", image=b"")], "00009")
    text = printed()
    assert "shard 00008: 00008.tar is incomplete" in text
    assert "1 image_empty" in text
    assert "12 rows left out: their uid came before" in text


def test_a_failure_is_one_message_with_the_file_and_without_a_traceback(scenario: Scenario, printed: Printed) -> None:
    (scenario.folder / "pool" / f"{SHARDS[0]}.tar").write_bytes(b"this is no tar at all")
    text = printed()
    assert "FAILED raw_pool" in text
    assert f"{SHARDS[0]}.tar: this is not a tar" in text
    assert "Traceback" not in text
    assert f"without shard {SHARDS[0]}" in text


def test_two_projects_do_not_share_a_dagster_home(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    assert command.prepare_home(scenario.open()) == tmp_path / "home"
    assert command.prepare_home(scenario.open()) == tmp_path / "home"
    scenario.set("lake", value="another")
    with pytest.raises(LakeError, match=r"home: this Dagster instance belongs to the lake .*lake\. Remedy"):
        command.prepare_home(scenario.open())
