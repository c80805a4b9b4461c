"""A user's actions in `clip-select browse`, in Chromium on a real server.

Set SCREENSHOTS to a folder to keep a picture of each view.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.browse_site import TOKEN, Site, open_site
from tests.support.pool_factory import sample, uid, write_shard
from tests.support.scenario import ROWS, SHARDS, Scenario

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: install Debian's package chromium"),
    pytest.mark.slow,
]
OFFLINE = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ALL = ROWS * len(SHARDS)
PATIENCE = 180_000  # milliseconds; a machine may be busy
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202ereversed"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_clip) -> Iterator[Scenario]:
    """Yield a project with hostile text, of which only `raw_pool` is computed."""
    scenario = Scenario(tmp_path_factory.mktemp("hostile"), tiny_clip)
    meta = {"uid": uid("hostile"), "caption": HOSTILE, "url": "javascript:alert(3)"}
    samples = [sample(0, key="0'\"><img src=x onerror=alert(4)>", text=HOSTILE.encode(), meta=meta)]
    samples.append(sample(1, key="1<script>alert(5)</script>", image=b"none"))
    write_shard(scenario.folder / "pool", samples, "00000")
    assert scenario.execute("raw_pool", shard="00000").success
    yield scenario
    scenario.instance.dispose()


@pytest.fixture(scope="module")
def chromium(hostile: Scenario) -> Iterator["playwright.Browser"]:
    """Start a browser. Its event loop lasts as long as it does, so Dagster runs before it."""
    del hostile
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield opened
        opened.close()


def open_page(chromium, site: Site, **options) -> "playwright.Page":
    """Open a page with the token; a message of the browser or a request to another host fails the test."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 900}, base_url=site.address, accept_downloads=True, **options
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: (page.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on(
        "request",
        lambda request: request.url.startswith((site.address, "blob:", "data:")) or page.problems.append(request.url),
    )
    page.goto(f"/?token={TOKEN}")
    return page


@pytest.fixture
def page(chromium, site: Site) -> Iterator["playwright.Page"]:
    opened = open_page(chromium, site)
    yield opened
    assert opened.problems == []
    opened.context.close()


def keep_picture(page, name: str) -> None:
    """Keep a picture, where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def shown(page) -> list[str]:
    """Return the uids of the tiles."""
    return page.eval_on_selector_all(".tile", "tiles => tiles.map((tile) => tile.dataset.uid)")


def wait_for_tiles(page, count: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('.tile').length === count", arg=count)


def test_the_grid_loads_as_it_is_scrolled_and_obeys_the_keyboard(chromium, site: Site, monkeypatch) -> None:
    monkeypatch.setattr("dagster_project.browser.grid_pages.PAGE", 8)
    page = open_page(chromium, site)
    page.set_viewport_size({"width": 700, "height": 200})
    page.goto("/")
    wait_for_tiles(page, 8)
    page.wait_for_function(
        "count => { scrollTo(0, document.body.scrollHeight);"
        " return document.querySelectorAll('.tile').length === count; }",
        arg=ALL,
    )
    assert len(set(shown(page))) == ALL
    assert page.locator("#status").inner_text() == f"{ALL} rows."
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    across = page.evaluate(
        "() => { const t = [...document.querySelectorAll('.tile')];"
        " return t.filter((x) => x.offsetTop === t[0].offsetTop).length; }"
    )
    focused = page.evaluate("document.activeElement.dataset.uid")
    assert focused == shown(page)[1 + across]
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/sample/{focused}")
    page.keyboard.press("Escape")
    page.wait_for_url(f"{site.address}/")
    page.locator(".tile").first.wait_for()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"
    assert page.problems == []
    page.context.close()


def test_filter_and_sort_are_in_the_address(page, project: Scenario) -> None:
    wait_for_tiles(page, ALL)
    page.locator("[name=where]").fill("width >= 0")
    page.locator("[name=sort]").select_option("clip_score/tiny")
    page.locator("[name=order]").select_option("asc")
    page.locator("[name=recipe]").select_option("paper")
    page.get_by_role("button", name="Apply").click()
    wanted = project.manifest("paper")
    wait_for_tiles(page, len(wanted))
    assert set(shown(page)) == set(wanted["uid"])
    values = page.eval_on_selector_all(".tile .value b", "all => all.map((one) => Number(one.textContent))")
    assert values == sorted(values)
    assert page.locator(".tile img").first.evaluate("image => image.complete || image.decode()") is not None
    keep_picture(page, "filter")
    address = page.url
    assert "sort=clip_score" in address
    before = shown(page)
    page.goto("/rejects")
    page.goto(address)
    wait_for_tiles(page, len(wanted))
    assert shown(page) == before
    assert page.locator("[name=sort]").input_value() == "clip_score/tiny"
    page.go_back()
    page.go_back()
    wait_for_tiles(page, len(wanted))


def test_a_wrong_filter_shows_its_message(chromium, site: Site) -> None:
    page = open_page(chromium, site)
    page.locator("[name=where]").fill("widht > 3")
    page.locator("[name=where]").press("Enter")
    page.get_by_text("did you mean width").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("where: there is no column 'widht'")
    page.context.close()  # the browser logs the status 400 itself


def test_search_by_text_and_by_example(page) -> None:
    wait_for_tiles(page, ALL)
    example = shown(page)[4]
    page.keyboard.press("/")
    page.keyboard.type("red boat")
    page.keyboard.press("Enter")
    page.get_by_text(f"Searched all {ALL} rows.").wait_for()
    cosines = page.eval_on_selector_all(".tile .value b", "all => all.map((one) => Number(one.textContent))")
    assert cosines == sorted(cosines, reverse=True)
    keep_picture(page, "search")
    page.goto(f"/sample/{example}")
    page.get_by_role("link", name="Similar images").click()
    page.get_by_text(f"Searched all {ALL} rows.").wait_for()
    assert shown(page)[0] == example


def test_a_sample_is_explained(page) -> None:
    wait_for_tiles(page, ALL)
    page.locator(".tile").first.click()
    page.get_by_role("heading", name="Lineage").wait_for()
    for text in ("Nearest image of pets", "percentile", "sha256", "paper v0001", "Hardest negatives"):
        assert page.get_by_text(text).first.is_visible(), text
    sizes = page.eval_on_selector_all("img.large", "all => all.map((one) => one.naturalWidth)")
    assert len(sizes) >= 2
    assert min(sizes) > 0
    keep_picture(page, "sample")


def test_a_dragged_threshold_shows_what_would_enter_and_leave_and_writes_nothing(page, project: Scenario) -> None:
    before = project.files()
    page.goto("/what-if?recipe=clip_third")
    chart = page.locator(".step svg").first
    page.locator(".step rect").first.wait_for()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + 40, steps=4)
    page.mouse.up()
    page.locator("#enter .tile").first.wait_for()
    assert "limit1=threshold" in page.url
    fraction = page.get_by_label("Kept, as a fraction of 36 rows")
    fraction.fill("0.1")
    fraction.press("Tab")
    page.locator("#leave .tile").first.wait_for()
    page.get_by_text("3 rows; v0001 has 12, of which 3 stay.").wait_for()
    (recipe,) = yaml.safe_load(page.locator("#yaml").inner_text())["recipes"].values()
    assert recipe["steps"][0]["keep_top"]["fraction"] == 0.1
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as recipe").click()
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#yaml").inner_text()
    keep_picture(page, "what-if")
    assert project.files() == before


def test_a_large_pool_states_what_was_judged_and_follows_a_threshold_while_it_is_dragged(
    chromium, project: Scenario
) -> None:
    with open_site(project.open(), ALL - 1) as site:
        page = open_page(chromium, site)
        page.goto("/what-if?recipe=clip_third")
        page.get_by_text("12 rows; v0001 has 12, of which 12 stay.").wait_for()
        page.get_by_text(f"Judged on 24 of {ALL} rows").wait_for()
        page.locator(".step svg").hover()
        page.mouse.down()
        page.mouse.move(0, 300, steps=9)
        page.get_by_text(f"{ALL} entered, about {ALL} remain").wait_for()
        page.mouse.up()
        page.locator("#enter .tile").first.wait_for()
        page.get_by_text(f"About {ALL} rows; v0001 has 12, of which about 12 stay.").wait_for()
        keep_picture(page, "what-if-large")
        page.goto("/?recipe=clip_third&member=near&step=1")
        page.get_by_text(f"Shown are rows among 24 of {ALL} rows").wait_for()
        assert page.problems == []
        page.context.close()


def test_two_subsets_are_compared_side_by_side(page, project: Scenario) -> None:
    page.goto("/compare")
    page.locator("[name=left]").select_option("clip_third")
    page.locator("[name=right]").select_option("paper:v0001")
    page.get_by_role("button", name="Compare").click()
    left, right = set(project.manifest("clip_third")["uid"]), set(project.manifest("paper")["uid"])
    page.get_by_role("heading", name=f"In both: {len(left & right)}").wait_for()
    assert page.get_by_role("heading", name=f"Only in clip_third: {len(left - right)}").is_visible()
    keep_picture(page, "compare")


def test_tags_are_set_by_keyboard_kept_and_downloaded(page, tmp_path: Path) -> None:
    wait_for_tiles(page, ALL)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("t")
    page.keyboard.press("t")  # takes the third one back
    wanted = shown(page)[:2]
    page.goto("/compare")
    page.get_by_text("2 tagged").wait_for()
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Download").click()
    downloaded.value.save_as(tmp_path / "tagged.npy")
    found = np.load(tmp_path / "tagged.npy", allow_pickle=False)
    assert sorted(f"{f0:016x}{f1:016x}" for f0, f1 in found) == sorted(wanted)
    page.get_by_role("button", name="Clear").click()
    assert page.get_by_text("2 tagged").is_hidden()


def test_a_link_asks_for_the_token_once(chromium, site: Site) -> None:
    context = chromium.new_context(base_url=site.address)
    page = context.new_page()
    page.goto("/rejects?reason=x")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Open").click()
    page.wait_for_url("**/rejects?reason=x")
    page.goto("/compare")
    assert page.get_by_role("heading", name="Compare").is_visible()
    context.close()


def test_hostile_text_runs_nothing(chromium, hostile: Scenario) -> None:
    with open_site(hostile.open()) as site:
        page = open_page(chromium, site)
        wait_for_tiles(page, 1)
        assert "<script>alert(2)</script>" in page.locator(".tile").inner_text()
        for path in (f"/sample/{uid('hostile')}", "/rejects", "/?rejected=any", "/?where=true"):
            page.goto(path)
            page.wait_for_load_state("networkidle")
            assert page.get_by_text("alert(5)" if "reject" in path else "alert(2)").first.is_visible()
        assert page.locator("a[href^='javascript']").count() == 0
        assert page.problems == []
        page.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_no_page_has_a_serious_fault_of_accessibility_or_is_too_wide(
    chromium, site: Site, scheme: str, width: int
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(chromium, site, color_scheme=scheme, bypass_csp=True)  # which would refuse axe's script
    wait_for_tiles(page, ALL)
    views = {"grid": "/?sort=random", "sample": f"/sample/{shown(page)[0]}", "what-if": "/what-if"}
    for name, path in {**views, "compare": "/compare", "rejects": "/rejects"}.items():
        if scheme == "dark" and name not in ("grid", "what-if"):  # whose colours the others have too
            continue
        page.goto(path)
        for checked in (1830 - width, width):
            page.set_viewport_size({"width": checked, "height": 850})
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= checked, (path, checked)
            keep_picture(page, f"{name}-{checked}-{scheme}")
        found = axe.Axe().run(page).response["violations"]
        assert [fault["id"] for fault in found if fault["impact"] in ("serious", "critical")] == [], path
    page.context.close()
