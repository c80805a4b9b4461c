"""What a person does in the browser, on a real Dagster server with its daemon.

Set SCREENSHOTS to a folder to keep the pictures that the README's tour shows.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.sharded import SHARDS_NAME
from dagster_project import command
from tests.scenario import SHARDS, Scenario

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: install Debian's package chromium"),
    pytest.mark.slow,
]

OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds: a run starts in a process of its own, on a busy machine


@pytest.fixture
def server(scenario: Scenario) -> Iterator[str]:
    """Serve the scenario with `clip-select ui`; gives its address."""
    register(scenario, "00001")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    config = str(scenario.folder / "project.yaml")
    with open(scenario.folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster_project.command", "ui", config, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(address):
            assert process.poll() is None, (scenario.folder / "server.log").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def register(scenario: Scenario, *shards: str) -> None:
    """Add shards to the partitions, as the discovery does."""
    with command.open_instance(scenario.open()) as instance:
        instance.add_dynamic_partitions(SHARDS_NAME, list(shards))


def answers(address: str) -> bool:
    """Tell whether the server is up; waits a moment where it is not."""
    try:
        with urllib.request.urlopen(f"{address}/server_info", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        with socket.socket() as idle:
            idle.settimeout(0.2)
            idle.bind(("127.0.0.1", 0))
            idle.listen()
            try:
                idle.accept()
            except TimeoutError:
                return False
        return False


@pytest.fixture
def page(server: str) -> Iterator["playwright.Page"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        page = browser.new_page(viewport={"width": 1500, "height": 850}, base_url=server)
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def keep_picture(page: "playwright.Page", name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_from_the_graph_to_a_subset_that_explains_itself(scenario: Scenario, page: "playwright.Page") -> None:
    page.goto("/asset-groups")
    for group in ("pool", "embeddings", "neg_clip_loss", "subsets"):
        page.get_by_text(group, exact=True).first.wait_for()
    keep_picture(page, "graph")

    page.goto("/assets/raw_pool?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="All", exact=True).click()
    keep_picture(page, "materialize")
    page.get_by_role("button", name="Launch").last.click()
    page.goto("/assets/raw_pool?view=partitions&partition=00001")
    page.get_by_text("Materialized (1)").wait_for()
    assert scenario.open().lake.shards("raw_pool") == ["00001"]

    register(scenario, *SHARDS)
    page.reload()
    page.get_by_text("Missing (2)").wait_for()
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="Missing", exact=True).click()
    page.get_by_role("button", name="Launch").last.click()
    page.goto("/assets/raw_pool?view=partitions&partition=00002")
    page.get_by_text("Materialized (3)").wait_for()
    page.reload()
    page.get_by_text("samples_seen").first.wait_for()
    keep_picture(page, "partition")
    assert scenario.open().lake.shards("raw_pool") == list(SHARDS)

    config = str(scenario.folder / "project.yaml")
    done = subprocess.run([sys.executable, "-m", "dagster_project.command", "run", config], check=False)
    assert done.returncode == 0
    page.goto("/assets/subset/paper?view=lineage&lineageScope=upstream&lineageDepth=5")
    page.get_by_text("neg_clip_loss", exact=True).first.wait_for()
    keep_picture(page, "lineage")
    page.goto("/assets/subset/paper")
    page.get_by_text("funnel", exact=True).wait_for()
    page.get_by_text("v0001").first.wait_for()
    assert page.get_by_text("keep the top 0.25 of the pool by norm_sim_inf/tiny/pets").first.is_visible()
    keep_picture(page, "subset")
