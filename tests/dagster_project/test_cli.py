"""`clip-select`: options, exit statuses, output. No loss is silent, and text is printed as it is."""

import ast
import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from assets.graph import build_graph
from assets.study import figures
from dagster_project import cli, console
from dagster_project.command_line import SECTIONS
from tests.support.pool_factory import sample, write_shard, write_tar
from tests.support.scenario import SHARDS, Scenario


@pytest.fixture
def printed(scenario: Scenario) -> "Printed":
    return Printed(scenario)


class Printed:
    """Runs the scenario and returns the printed outcome."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def __call__(self) -> str:
        """Run a pass and return the text."""
        outcome = self.scenario.run()
        project = self.scenario.open()
        text = io.StringIO()
        console.print_outcome(project, build_graph(project), outcome, Console(file=text, width=200))
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
    assert "12 rows have the uid of an earlier row and were left out" in text


def test_a_failure_is_one_message_with_the_file_and_without_a_traceback(scenario: Scenario, printed: Printed) -> None:
    (scenario.folder / "pool" / f"{SHARDS[0]}.tar").write_bytes(b"this is no tar at all")
    text = printed()
    assert "FAILED raw_pool" in text
    assert f"{SHARDS[0]}.tar: this is not a tar" in text
    assert "Traceback" not in text
    assert f"without shard {SHARDS[0]}" in text


# The command line


def test_the_help_lists_every_command_under_a_heading_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(cli.commands.commands)
    for title, names in SECTIONS.items():
        assert f"\n{title}:\n" in text
        assert all(f"\n  {name} " in text for name in names)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"clip-select, version {version('clip-data-selection')}\n"


def test_a_mistake_in_the_arguments_or_the_yaml_is_one_message_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: [")
    for arguments, message in (
        (["zzz"], "No such command 'zzz'; known: browse, check, compute, diff, evaluate, explain, "),
        (["explian"], "No such command 'explian'; did you mean explain"),
        (["explain", "--demo"], "Missing option '--uid'"),
        (["prune", "--demo", "--keep", "0"], "0 is not in the range x>=1"),
        (["run"], "CONFIG is missing, the path of the project's YAML. Remedy: `clip-select run project.yaml`, or "),
        (["run", str(wrong), "--demo"], "CONFIG and --demo exclude each other"),
        (["run", str(tmp_path / "absent.yaml")], "absent.yaml: no such file"),
        (["run", str(wrong)], "wrong.yaml: not valid YAML"),
    ):
        assert cli.main(arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert "Traceback" not in printed


HELP = """
import sys
from dagster_project import cli
assert cli.main(sys.argv[1:]) == 0
print(sorted({"dagster", "duckdb", "numpy", "pyarrow", "pydantic", "torch", "open_clip"} & set(sys.modules)))
"""


def loaded_by(*arguments: str) -> str:
    """Return the large packages that a command imports."""
    command = [sys.executable, "-c", HELP, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def test_help_imports_nothing_large() -> None:
    assert loaded_by("--help") == "[]"
    assert loaded_by("run", "--help") == "[]"


def test_explain_does_without_dagster_and_torch_and_prints_each_step(
    scenario: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert scenario.run().failures == {}
    config, uid = str(scenario.folder / "project.yaml"), scenario.manifest("paper")["uid"][0]
    assert cli.main(["explain", config, "--uid", uid]) == 0
    text = capsys.readouterr().out
    assert "paper v0001" in text
    assert "keep the top 0.5 of the pool by neg_clip_loss/tiny" in text
    assert "nearest target: " in text
    assert f"Browse: http://127.0.0.1:3002/sample/{uid}" in text
    assert not {"dagster", "torch", "open_clip"} & set(ast.literal_eval(loaded_by("explain", config, "--uid", uid)))
    assert cli.main(["explain", config, "--uid", uid.upper(), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (step,) = (row for row in rows if row["recipe"] == "paper" and row["step"] == 1)
    assert (step["verdict"], step["value"] >= step["threshold"]) == ("kept", True)
    for wrong, why in (("0" * 32, "no sample in the pool has this uid"), ("12", "this is not a uid, which has 32 hex")):
        assert cli.main(["explain", config, "--uid", wrong]) == 1
        printed = capsys.readouterr()
        assert f"{wrong}: {why}" in printed.err
        assert printed.out == ""


def test_the_help_of_study_names_the_default_number_of_rows() -> None:
    (option,) = (option for option in cli.study.params if option.name == "rows")
    assert f"[default: {figures.ROWS}]" in option.help
