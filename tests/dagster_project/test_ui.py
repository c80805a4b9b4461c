"""What `clip-select ui` serves, asked over GraphQL as its pages do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.base.keys import SHARDS_NAME
from dagster_project.definitions import build_defs
from dagster_project.executor import execute
from dagster_project.instance import open_instance
from tests.support.scenario import SHARDS, Scenario

pytestmark = pytest.mark.slow

LOCATIONS = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } } }"
RUNS = """
query Timeline($filter: RunsFilter!) {
    runsOrError(filter: $filter, limit: 10) {
        ... on Runs { results { id startTime repositoryOrigin { repositoryName repositoryLocationName } } }
    }
}
"""


class Server:
    """A running `clip-select ui`.

    Args:
        config: the project's YAML.
        log: file for its output.
    """

    def __init__(self, config: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dagster_project.cli", "ui", str(config), "--port", str(self.port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"},
            )

    def ask(self, query: str, **variables: Any) -> Any:
        """Return the answer to a query, waiting for the server to start."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)["data"]
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def server(scenario: Scenario) -> Iterator[Server]:
    scenario.set("name", value="flowers")
    scenario.open()
    server = Server(scenario.folder / "project.yaml", scenario.folder / "server.log")
    yield server
    server.stop()


def test_the_location_has_the_project_s_name_and_the_timeline_shows_runs_from_the_terminal(
    scenario: Scenario, server: Server
) -> None:
    project, graph = scenario.open_graph()
    with open_instance(project) as instance:
        instance.add_dynamic_partitions(SHARDS_NAME, list(SHARDS))
        result = execute(
            build_defs(project, graph).resolve_implicit_global_asset_job_def(),
            instance,
            location=project.settings.name,
            asset_selection=[dg.AssetKey("raw_pool")],
            tags={"dagster/partition": SHARDS[0]},
        )
    assert result.success
    (location,) = server.ask(LOCATIONS)["workspaceOrError"]["locationEntries"]
    assert location == {"name": "flowers", "loadStatus": "LOADED"}
    for filters in (
        {"statuses": ["SUCCESS"], "updatedAfter": time.time() - 3600},  # as the timeline asks
        {"tags": [{"key": ".dagster/repository", "value": "__repository__@flowers"}]},  # one code location's runs
    ):
        (run,) = server.ask(RUNS, filter=filters)["runsOrError"]["results"]
        assert run["id"] == result.run_id
        assert run["startTime"]
        # The timeline leaves out runs without an origin.
        assert run["repositoryOrigin"] == {"repositoryName": "__repository__", "repositoryLocationName": "flowers"}
    assert "superseded" not in server.log.read_text()
    assert f"http://127.0.0.1:{server.port}" in server.log.read_text()
