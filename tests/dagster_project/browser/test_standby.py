"""The server of browse that `clip-select ui` starts: it loads at the first request, and ends with the UI."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.scenario import Scenario

START = """
import sys
from dagster_project.browser.token import stored_token
from dagster_project.instance import start_server
print(start_server("dagster_project.browser.standby", [sys.argv[1]], 0), stored_token(), flush=True)
sys.stdin.read()
"""


def status(address: str) -> int:
    """Return the status of an answer; 0 if nothing listens."""
    try:
        with urllib.request.urlopen(address, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return 0


def test_a_link_works_while_the_ui_runs_and_the_temporary_files_go_with_it(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(spill))
    command = [sys.executable, "-c", START, str(scenario.open().config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address, token = process.stdout.readline().split()
        assert os.listdir(spill) == [], "nothing is loaded yet"
        assert status(f"{address}/static/browse.js?token=wrong") == 403
        assert status(f"{address}/api/trial?recipe=nope") == 403
        request = urllib.request.Request(f"{address}/", headers={"Cookie": f"browse-{address[17:]}={token}"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert b"scenario" in answer.read()
        process.communicate()
    deadline = time.monotonic() + 60
    while status(address) or os.listdir(spill):
        assert time.monotonic() < deadline
