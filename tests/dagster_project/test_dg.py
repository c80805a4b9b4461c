"""`dg`, Dagster's command line, in the project's folder: [tool.dg] in pyproject.toml."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dagster_project.instance import open_instance, prepare_home
from dagster_project.location import CONFIG_VARIABLE
from tests.support.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_dg_checks_lists_and_launches_the_project_of_the_environment(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    project = scenario.open()
    home = prepare_home(project)
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        CONFIG_VARIABLE: str(project.config),
    }

    def dg(*arguments: str) -> str:
        command = [sys.executable, "-m", "dagster_dg_cli.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "All definitions loaded successfully" in dg("check", "defs")
    listed = dg("list", "defs", "--json")
    keys = {asset["asset_key"] for asset in json.loads(listed[listed.index("{") :])["assets"]}
    assert {"raw_pool", "subset/paper", "catalog"} <= keys
    dg("launch", "--assets", "catalog")
    with open_instance(project) as instance:
        assert [run.status.value for run in instance.get_runs()] == ["SUCCESS"]
    assert project.catalog_path().exists()
