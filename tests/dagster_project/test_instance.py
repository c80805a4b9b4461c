"""The folder of the Dagster instance, and the lock of a pass."""

import json
from pathlib import Path

import pytest
import yaml

from dagster_project import cli
from dagster_project.instance import only_pass, open_instance, prepare_home, write_workspace
from resources.lake.files import LakeError
from tests.support.scenario import Scenario, keep


def test_two_projects_do_not_share_a_dagster_home(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    assert prepare_home(scenario.open()) == tmp_path / "home"
    assert prepare_home(scenario.open()) == tmp_path / "home"
    scenario.set("lake", value="another")
    with pytest.raises(LakeError, match=r"home: this Dagster instance belongs to the lake .*lake\. Remedy"):
        prepare_home(scenario.open())


@pytest.mark.parametrize("name", ["lake [1]", "50%", "why?", "all*"])
def test_a_folder_whose_path_dagster_misreads_is_refused_and_another_home_works(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    scenario.set("lake", value=name)
    with pytest.raises(LakeError, match=r"Dagster can't use a folder with \S in its path\. Remedy: set DAGSTER_HOME"):
        prepare_home(scenario.open())
    assert not (tmp_path / name).exists()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    with open_instance(scenario.open()) as instance:
        assert instance.root_directory == str(tmp_path / "home")
        assert not instance.telemetry_enabled
        assert type(instance.event_log_storage).__name__ == "KeptOpenSqliteEventLogStorage"


def test_a_lake_with_brackets_in_its_path_works(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    scenario.set("lake", value="lake [1]")
    scenario.set("recipes", value={"best": {"steps": [keep("clip_score/tiny", count=5)]}})
    scenario.open()
    config = str(scenario.folder / "project.yaml")
    assert cli.main(["run", config]) == 0
    capsys.readouterr()
    assert cli.main(["versions", config, "--json"]) == 0
    assert [row["rows"] for row in json.loads(capsys.readouterr().out)] == [5]


def test_a_user_s_dagster_yaml_is_kept(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = prepare_home(scenario.open())
    assert home == scenario.folder / "lake" / ".dagster"
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    prepare_home(scenario.open())
    assert (home / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


def test_a_second_pass_at_once_is_refused(scenario: Scenario) -> None:
    project = scenario.open()
    with only_pass(project), pytest.raises(LakeError, match=r"\.pass\.lock: another `clip-select` .*Remedy: wait"):
        only_pass(project).__enter__()
    with only_pass(project):
        pass


def test_the_code_location_is_named_after_the_project(tmp_path: Path) -> None:
    path = write_workspace(tmp_path, "flowers")
    (entry,) = yaml.safe_load(path.read_text())["load_from"]
    assert entry["python_module"]["location_name"] == "flowers"
    assert entry["python_module"]["module_name"] == "dagster_project.definitions"
