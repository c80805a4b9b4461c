"""A user's actions in the browser, on a real Dagster server with its daemon.

Set SCREENSHOTS to a folder to keep the pictures of the README's tour.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from assets.base.keys import SHARDS_NAME
from assets.settings import open_project
from dagster_project import cli
from dagster_project.instance import open_instance, prepare_home
from dagster_project.location import DEMO_CONFIG
from examples.demo.pool import make_targets, picture, plan_shard
from resources.lake.files import Lake
from resources.lake.versions import Versions
from tests.support.pool_factory import Sample, write_shard
from tests.support.scenario import SHARDS, Scenario

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = [
    pytest.mark.waits,
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
PATIENCE = 600_000  # milliseconds; each run is a process on a busy machine
DEMO_ROWS = 200  # of a shard: their kinds are shuffled
OUR_STORAGE = "module: dagster_project.sqlite_event_log"
QUICK_STORAGE = "module: tests.support.quick_daemon"
RUNS = "{ runsOrError { ... on Runs { results { status } } } }"
BACKFILLS = "{ partitionBackfillsOrError { ... on PartitionBackfills { results { status } } } }"
ENDED = {"SUCCESS", "FAILURE", "CANCELED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED"}
VERSIONS = """
query Versions($recipe: String!) {
    assetNodeOrError(assetKey: {path: ["subset", $recipe]}) {
        ... on AssetNode {
            assetMaterializations { metadataEntries { label ... on TextMetadataEntry { text } } }
        }
    }
}
"""
RIGHT_EDGE = """
element => {
    const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    const range = document.createRange();
    let right = 0;
    while (texts.nextNode()) {
        range.selectNodeContents(texts.currentNode);
        right = Math.max(right, range.getBoundingClientRect().right);
    }
    return right;
}
"""
ASK = """
async ([query, variables]) => {
    const answer = await fetch("/graphql", {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify({query, variables}),
    });
    return Object.values((await answer.json()).data)[0];
}
"""


class Browser:
    """A page on a project's server.

    Attributes:
        page: the page.
        project: the path of the project's YAML.
        lake: the project's lake.
    """

    def __init__(self, page: "playwright.Page", project: Path) -> None:
        self.page = page
        self.project = project
        self.lake: Lake = open_project(project).lake

    def register(self, *shards: str) -> None:
        """Add shards to the partitions, as the discovery does."""
        with open_instance(open_project(self.project)) as instance:
            instance.add_dynamic_partitions(SHARDS_NAME, list(shards))

    def launch(self, button: str) -> None:
        """Press a button that launches something; wait until the server has answered."""
        with self.page.expect_response(
            lambda answer: "/graphql" in answer.url and "aunch" in (answer.request.post_data or "")
        ):
            self.page.get_by_role("button", name=button).last.click()

    def ask(self, query: str, **variables: str) -> dict[str, Any]:
        """Ask the server, as the page does."""
        return dict(self.page.evaluate(ASK, [query, variables]))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Check once a second until a condition holds."""
        for _ in range(PATIENCE // 1000):
            if condition():
                return
            self.page.wait_for_timeout(1000)
        log = (self.project.parent / "server.log").read_text()
        raise AssertionError(f"it did not come to that in time; the server's last words: {log[-4000:]}")

    def wait_for_ends(self, query: str) -> set[str]:
        """Wait until runs, or backfills, exist and all have ended; return their statuses."""
        statuses: set[str] = set()

        def ended() -> bool:
            statuses.clear()
            statuses.update(result["status"] for result in self.ask(query)["results"])
            return bool(statuses) and statuses <= ENDED

        self.wait_until(ended)
        return statuses

    def versions(self, recipe: str) -> list[str]:
        """Return the versions of a subset on the server, the newest first."""
        found = self.ask(VERSIONS, recipe=recipe)["assetMaterializations"]
        return [entry["text"] for event in found for entry in event["metadataEntries"] if entry["label"] == "version"]

    def graph_address(self) -> str:
        """Return the address of the graph with all groups open, as `clip-select ui` prints it."""
        log = (self.project.parent / "server.log").read_text()
        (address,) = re.findall(r"The asset graph with all groups open: (\S+)", log)
        return str(address)

    def keep_picture(self, name: str) -> None:
        """Keep a picture for the tour, in few colours so that it is small."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(1500)
            picture = Image.open(io.BytesIO(self.page.screenshot()))
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                Path(folder) / f"{name}.png", optimize=True
            )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Write the demo with three short shards and return its YAML."""
    for shard in range(3):
        samples = []
        for number, row in enumerate(plan_shard(shard)[:DEMO_ROWS]):
            jpeg, words, _ = picture(row)
            samples.append(Sample(f"{number:09d}", jpeg, words.encode(), {"uid": row.uid, "caption": words}))
        write_shard(tmp_path / "pool", samples, f"{shard:05d}")
    make_targets(tmp_path / "targets", each=10)
    document = yaml.safe_load(DEMO_CONFIG.read_text())
    document["lake"] = "lake"
    document["pool"]["path"] = "pool"
    document["encoders"]["tiny"]["workers"] = 0
    document["encoders"]["tiny"]["model"] = f"local-dir:{DEMO_CONFIG.parents[1] / 'examples' / 'demo' / 'encoder'}"
    document["targets"]["festive"]["path"] = "targets"
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return tmp_path / "demo.yaml"


class Server:
    """A starting `clip-select ui`.

    Args:
        project: the path of the project's YAML.
    """

    def __init__(self, project: Path) -> None:
        settings = prepare_home(open_project(project)) / "dagster.yaml"
        settings.write_text(settings.read_text().replace(OUR_STORAGE, QUICK_STORAGE))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = project.parent / "server.log"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dagster_project.cli", "ui", str(project), "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,  # where the server finds `tests`
            )

    def wait(self) -> None:
        """Wait until it answers."""
        while not answers(self.address):
            assert self.process.poll() is None, self.log.read_text()

    def close(self) -> None:
        """Stop it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        finally:
            os.killpg(self.process.pid, signal.SIGKILL) if self.process.poll() is None else None


Serve = Callable[[Path], Callable[[], Browser]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start `clip-select ui` for a project, once per test; the function that it returns opens a browser on it."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    closing: list[Callable[[], object]] = []

    def start(project: Path) -> Callable[[], Browser]:
        server = Server(project)
        closing.append(server.close)

        def browse() -> Browser:
            server.wait()
            driver = playwright.sync_playwright().start()
            closing.append(driver.stop)
            chromium = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
            closing.append(chromium.close)
            page = chromium.new_page(viewport={"width": 1440, "height": 900}, base_url=server.address)
            page.set_default_timeout(PATIENCE)
            return Browser(page, project)

        return browse

    yield start
    for close in reversed(closing):
        close()


def answers(address: str) -> bool:
    """Check whether the server is up; wait a moment if not."""
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


def test_from_an_empty_graph_to_a_subset_that_explains_itself(demo: Path, serve: Serve) -> None:
    browser = serve(demo)()
    page = browser.page
    browser.register("00000")

    page.goto("/asset-groups")
    for group in ("pool", "embeddings", "neg_clip_loss", "subsets"):
        page.get_by_text(group, exact=True).first.wait_for()

    page.goto("/assets/raw_pool?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="All", exact=True).click()
    browser.keep_picture("materialize")
    browser.launch("Launch")
    assert browser.wait_for_ends(RUNS) == {"SUCCESS"}
    page.goto("/assets/raw_pool?view=partitions&partition=00000")
    page.get_by_text("Materialized (1)").wait_for()
    page.get_by_text("samples_seen").first.wait_for()
    browser.keep_picture("shard")
    assert browser.lake.shards("raw_pool") == ["00000"]

    browser.register("00001", "00002")
    page.goto("/asset-groups")
    page.get_by_role("button", name="Materialize all").click()
    page.get_by_role("button", name="All", exact=True).click()
    browser.keep_picture("backfill")
    browser.launch("Launch")
    assert browser.wait_for_ends(BACKFILLS) == {"COMPLETED_SUCCESS"}
    assert browser.wait_for_ends(RUNS) == {"SUCCESS"}
    for recipe in ("clip_score_30", "neg_clip_loss_30_norm_sim_20"):
        assert Versions(browser.lake, recipe).current() is not None

    page.goto(browser.graph_address())
    page.get_by_text("raw_pool", exact=True).first.wait_for()
    page.get_by_text("neg_c…_norm_sim_20", exact=True).first.wait_for()
    page.goto("/assets/subset/neg_clip_loss_30_norm_sim_20?view=lineage&lineageScope=upstream&lineageDepth=5")
    page.get_by_text("neg_clip_loss", exact=True).first.wait_for()
    browser.keep_picture("lineage")
    page.goto("/assets/subset/neg_clip_loss_30_norm_sim_20")
    funnel = page.get_by_role("row", name="funnel").get_by_role("listitem")
    funnel.last.wait_for()
    for step, score in enumerate(("neg_clip_loss/tiny", "norm_sim_inf/tiny/festive")):
        assert score in funnel.nth(step).inner_text()
        assert funnel.nth(step).evaluate(RIGHT_EDGE) <= 1080, "where the page's right column begins"
    browser.keep_picture("subset")
    page.get_by_role("row", name="contact_sheet").get_by_text("Show Markdown").click()
    page.locator("td img").first.wait_for()
    page.get_by_text("Best kept by norm_sim_inf/tiny/festive").scroll_into_view_if_needed()
    browser.keep_picture("contact-sheet")


def test_a_failed_check_says_what_is_wrong(scenario: Scenario, serve: Serve) -> None:
    broken = scenario.folder / "broken"
    shutil.copytree(scenario.document["encoders"]["tiny"]["model"].removeprefix("local-dir:"), broken)
    weights = broken / "open_clip_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    scenario.set("encoders", "tiny", "model", value=f"local-dir:{broken}")
    project = scenario.open().config
    browse = serve(project)
    assert cli.main(["run", str(project)]) == 1  # while the server starts
    browser = browse()
    page = browser.page

    page.goto("/assets/embeddings/tiny?view=checks")
    page.get_by_text("unit_norm").first.click()
    page.get_by_text("12 rows are not of unit norm, the first is row 0: nan").wait_for()
    browser.keep_picture("failed-check")
    assert browser.lake.shards("embeddings/tiny") == []


def test_a_shard_that_arrives_is_scored_and_selected_by_itself(finished: Scenario, serve: Serve) -> None:
    browser = serve(finished.open().config)()
    page = browser.page
    page.goto("/automation")
    switches = page.locator("label[class*=formatSwitch]")
    switches.nth(2).wait_for()
    for number in range(3):
        with page.expect_response(lambda answer: "StartSensor" in (answer.request.post_data or "")):
            switches.nth(number).click()
    browser.keep_picture("automation")
    finished.write_shard("00003")
    browser.wait_until(lambda: browser.versions("paper") == ["v0002"])

    page.goto("/assets/subset/paper")
    page.get_by_text("v0002").first.wait_for()
    assert Versions(browser.lake, "paper").names() == ["v0001", "v0002"]
    assert finished.subset("paper").lineage["shards"].keys() == {*SHARDS, "00003"}
    assert browser.wait_for_ends(RUNS) == {"SUCCESS"}
    assert len(browser.ask(RUNS)["results"]) == 2, "one run for the shard, and one for the subsets"
