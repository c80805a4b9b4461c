"""The folder of the Dagster instance, and the lock of a pass."""

from pathlib import Path

import pytest
import yaml

from dagster_project.instance import only_pass, prepare_home, write_workspace
from resources.lake.files import LakeError
from tests.support.scenario import Scenario


def test_two_projects_do_not_share_a_dagster_home(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    assert prepare_home(scenario.open()) == tmp_path / "home"
    assert prepare_home(scenario.open()) == tmp_path / "home"
    scenario.set("lake", value="another")
    with pytest.raises(LakeError, match=r"home: this Dagster instance belongs to the lake .*lake\. Remedy"):
        prepare_home(scenario.open())


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
