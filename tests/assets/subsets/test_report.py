"""The report of a subset: the right samples, their own pictures, small events, and hostile captions that stay inert."""

import base64
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pyarrow.compute as pc
import pytest
from dagster._serdes import serialize_value
from markupsafe import escape
from PIL import Image

from assets.base.contact_sheets import Sheet, Tile, escaped, html_page, markdown, small_jpeg
from assets.subsets.report import report_metadata, reports_address
from resources.storage.images import ImageError
from selection.scores.negatives import keyed_hash
from tests.support.pool_factory import datacomp_shard, picture
from tests.support.reports import Page, report_folder, report_page
from tests.support.scenario import SHARDS, Scenario, keep

HOSTILE = '<script>alert("x")</script> & ![](http://example.com/a.png) | **bold** [l](u)'


def materialization(scenario: Scenario, recipe: str) -> dg.EventLogEntry:
    event = scenario.instance.get_latest_materialization_event(dg.AssetKey(["subset", recipe]))
    assert event is not None
    return event


def warnings(scenario: Scenario) -> list[str]:
    records = [scenario.instance.all_logs(run.run_id) for run in scenario.instance.get_runs()]
    return [entry.user_message for logs in records for entry in logs if entry.level == 30]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """A project with every asset materialized, and one hostile caption."""
    scenario = Scenario(tmp_path_factory.mktemp("made"), tiny_clip)
    scenario.write_shard(SHARDS[0], text=HOSTILE.encode())
    scenario.set("recipes", "everything", value={"steps": [keep("clip_score/tiny", fraction=1.0)]})
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


def test_the_sheets_show_the_ends_of_the_last_ranking(made: Scenario) -> None:
    entered = made.scores("neg_clip_loss/tiny").sort("neg_clip_loss", descending=True).head(18)
    near = made.scores("norm_sim/tiny/pets").join(entered, on=["f0", "f1"], how="semi")
    uids = (
        near.sort("norm_sim_inf", descending=True)
        .select(pl.struct("f0", "f1").map_elements(lambda u: f"{u['f0']:016x}{u['f1']:016x}", pl.String))
        .to_series()
        .to_list()
    )
    shown = report_page(made, "paper").sections
    score = "norm_sim_inf/tiny/pets"
    assert shown[f"Best kept by {score}"] == uids[:9]
    assert shown[f"Worst kept by {score}"] == uids[:9][::-1]
    assert shown[f"Best dropped by {score}"] == uids[9:]
    assert shown[f"Worst dropped by {score}"] == uids[9:][::-1]
    assert len(shown["Best dropped by neg_clip_loss/tiny"]) == 12


def test_the_random_handful_is_the_subsets_smallest_keyed_hashes(made: Scenario) -> None:
    uids = made.array("clip_third")
    order = np.argsort(keyed_hash(0, 0, uids["f0"].copy(), uids["f1"].copy()))[:12]
    wanted = {f"{f0:016x}{f1:016x}" for f0, f1 in uids[order].tolist()}
    assert set(report_page(made, "clip_third").sections["A random handful of the subset"]) == wanted


def test_each_picture_is_the_samples_own(made: Scenario) -> None:
    uid = report_page(made, "paper").sections["Best kept by norm_sim_inf/tiny/pets"][0]
    pool = pl.concat([pl.from_arrow(made.open().lake.read("raw_pool", shard)) for shard in SHARDS])
    number = int(pool.row(by_predicate=pl.col("uid") == uid, named=True)["key"])
    shown = np.asarray(Image.open(report_folder(made, "paper") / f"images/{uid}.jpg"), dtype=float)
    true = np.asarray(Image.open(io.BytesIO(picture(number))), dtype=float)
    assert np.abs(shown - true).mean() < 6
    other = np.asarray(Image.open(io.BytesIO(picture(number + 1))), dtype=float)
    assert np.abs(shown - other).mean() > 20


def test_a_page_refers_to_files_beside_it_and_to_nothing_else(made: Scenario) -> None:
    for recipe in ("clip_third", "paper", "inside", "everything"):
        found = report_page(made, recipe)
        assert "script" not in found.tags
        assert "link" not in found.tags
        links = [reference for reference in found.references if reference.startswith("http://127.0.0.1:3002/")]
        files = [name for name in found.references if not name.startswith("#") and name not in links]
        assert len(files) > 3
        assert links[0] == f"http://127.0.0.1:3002/?recipe={recipe}&version=v0001"
        assert all(link.startswith("http://127.0.0.1:3002/sample/") for link in links[1:])
        assert len(links) > 3
        assert all((report_folder(made, recipe) / name).is_file() and ".." not in name for name in files)


def test_a_hostile_caption_is_shown_and_not_obeyed(made: Scenario) -> None:
    text = (report_folder(made, "everything") / "index.html").read_text()
    shown = html_page("t", {}, {"Funnel": [["step"]]}, "scores.png", [Sheet("s", "", [Tile("0" * 32, HOSTILE)])])
    assert "script" not in Page(text).tags + Page(shown).tags
    assert str(escape(HOSTILE)) in shown
    table = markdown(Sheet("s", "", [Tile("0" * 32, HOSTILE, {}, small_jpeg(picture(), 16))]))
    assert "<script" not in table
    (line,) = [line for line in table.splitlines() if "alert" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 6  # five cells, and no sixth made of the caption's own
    assert "![](http" not in table


@pytest.mark.parametrize(
    "address",
    ["www.evil.example/a", "WWW.evil.example", "http://evil.example", "HTTPS://evil.example", "a.b+c@evil.example"],
)
def test_no_address_in_a_caption_becomes_a_link(address: str) -> None:
    found = escaped(f"see {address} now")
    read = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", found)  # as Markdown reads it, before it looks for addresses
    assert not re.search(r"(https?://|www(?=\.))[-.\w]+", read, re.IGNORECASE)
    assert not re.search(r"[-.\w+]+@[-\w]+(\.[-\w]+)+", read)
    assert read.replace("\u2060", "") == f"see {address} now"


def test_the_report_is_a_link_where_a_web_server_has_it(made: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_SELECTION_REPORTS", "https://clip.example.org/subset/")
    project = made.open()
    page = (report_folder(made, "paper") / "index.html").relative_to(project.lake.root)
    found = report_metadata(project, made.subset("paper"))
    assert found["report"] == dg.MetadataValue.url(f"https://clip.example.org/{page.as_posix()}")


def test_the_event_of_a_subset_is_small_and_shows_pictures(made: Scenario) -> None:
    event = materialization(made, "paper")
    assert len(serialize_value(event)) < 200 * 1024
    metadata = event.asset_materialization.metadata
    page = report_folder(made, "paper") / "index.html"
    assert metadata["report_file"].value == str(page)
    lake = made.open().lake
    assert metadata["report"].value == f"{reports_address(lake)}/{page.relative_to(f'{lake.root}/subset').as_posix()}"
    address = "http://127.0.0.1:3002/?recipe=paper&version=v0001"
    assert f"[kept]({address}) · [dropped at step 1]({address}&member=dropped&step=1)" in metadata["browse"].value
    assert (
        metadata["threshold/step2 norm_sim_inf/tiny/pets"].value
        == made.subset("paper").lineage["steps"][1]["threshold"]
    )
    pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", metadata["contact_sheet"].md_str)
    assert len(pictures) == 5 * 8
    for picture_ in pictures:
        assert max(Image.open(io.BytesIO(base64.b64decode(picture_))).size) <= 96
    (chart,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", metadata["score_distributions"].md_str)
    assert Image.open(io.BytesIO(base64.b64decode(chart))).format == "PNG"


def test_a_tile_of_noise_still_fits_the_event_log() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, "PNG")
    small = small_jpeg(out.getvalue(), 96, most_bytes=2_000)
    assert len(small) <= 2_000
    assert max(Image.open(io.BytesIO(small)).size) >= 48
    with pytest.raises(ImageError):
        small_jpeg(b"no picture", 112)


def test_a_subset_that_is_told_again_shows_the_same(made: Scenario) -> None:
    before = materialization(made, "clip_third").asset_materialization.metadata["contact_sheet"]
    assert made.execute("subset/clip_third").success
    assert materialization(made, "clip_third").asset_materialization.metadata["contact_sheet"] == before


@pytest.mark.usefixtures("finished")
def test_a_version_without_its_report_is_the_same_version(scenario: Scenario) -> None:
    scenario.run()
    page = (report_folder(scenario, "paper") / "index.html").read_text()
    images = [name for name in report_page(scenario, "paper").references if not name.startswith(("#", "http:"))]
    shutil.rmtree(report_folder(scenario, "paper"))
    lineage = (Path(scenario.subset("paper").folder) / "lineage.json").read_bytes()
    assert scenario.run().computed == {}  # but for the report
    assert scenario.subset("paper").name == "v0001"
    assert (Path(scenario.subset("paper").folder) / "lineage.json").read_bytes() == lineage
    assert (report_folder(scenario, "paper") / "index.html").read_text() == page
    assert all((report_folder(scenario, "paper") / name).is_file() for name in images)

    (report_folder(scenario, "paper") / "index.html").unlink()  # as a run that was killed leaves it
    assert scenario.execute("subset/paper").success
    assert (report_folder(scenario, "paper") / "index.html").read_text() == page
    assert scenario.run().computed == {}


def beyond_the_tar(scenario: Scenario) -> str:
    """Let `raw_pool` point beyond the end of a shard's tar."""
    lake = scenario.open().lake
    stored, table = lake.stored("raw_pool", SHARDS[0]), lake.read("raw_pool", SHARDS[0])
    assert stored is not None
    place = table.column_names.index("image_offset")
    moved = table.set_column(place, "image_offset", pc.add(table["image_offset"], 10**9))
    lake.write(moved, stored.provenance, content=stored.fingerprint, summary=stored.summary)
    return "ends at byte"


def other_bytes(scenario: Scenario) -> str:
    """Change the pictures of a shard, but not its size and time, so that the listing is the same."""
    tar = scenario.folder / "pool" / f"{SHARDS[0]}.tar"
    stat, data = tar.stat(), bytearray(tar.read_bytes())
    for row in scenario.open().lake.read("raw_pool", SHARDS[0]).to_pylist():
        data[row["image_offset"] + row["image_size"] // 2] ^= 0xFF
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return "changed since it was read"


@pytest.mark.parametrize("spoil", [beyond_the_tar, other_bytes])
@pytest.mark.usefixtures("finished")
def test_a_picture_that_cannot_be_shown_is_named_and_stops_nothing(
    scenario: Scenario, spoil: Callable[[Scenario], str]
) -> None:
    scenario.run()
    reason = spoil(scenario)
    scenario.set("recipes", "late", value={"steps": [keep("clip_score/tiny", fraction=1.0)]})
    assert scenario.execute("subset/late").success
    assert scenario.subset("late").lineage["rows"] == 36
    text = (report_folder(scenario, "late") / "index.html").read_text()
    said = [message for message in warnings(scenario) if "No picture of" in message]
    named = {re.search(r"No picture of (\w{32}) in shard (\w+)", message).groups() for message in said}  # type: ignore
    assert {shard for _, shard in named} == {SHARDS[0]}
    assert all(reason in message for message in said)
    assert all(f"No picture of {uid}" in text for uid, _ in named)
    assert not any((report_folder(scenario, "late") / f"images/{uid}.jpg").exists() for uid, _ in named)
    assert "No picture of" in materialization(scenario, "late").asset_materialization.metadata["contact_sheet"].md_str


@pytest.mark.usefixtures("finished")
def test_a_report_that_cannot_be_written_is_logged_and_the_subset_stays(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    scenario.run()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    scenario.set("recipes", "late", value={"steps": [keep("clip_score/tiny", fraction=0.5)]})
    assert scenario.execute("subset/late").success
    assert scenario.subset("late").lineage["rows"] == 18
    assert any("the report could not be written" in message for message in warnings(scenario))
    assert "contact_sheet" not in materialization(scenario, "late").asset_materialization.metadata


def test_a_pool_without_pictures_shows_captions_and_scores(scenario: Scenario) -> None:
    for shard in SHARDS:
        datacomp_shard(scenario.folder / "metadata", shard, rows=12)
    scenario.document = {
        "name": "imported",
        "lake": "imported",
        "pool": {"path": "metadata", "format": "datacomp"},
        "encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}},
        "scores": {"neg_clip_loss": {"b32": {"batch_size": 8, "draws": 2}}},
        "recipes": {"third": {"steps": [keep("clip_score/b32", fraction=0.34)]}},
    }
    assert scenario.run().failures == {}
    assert "img" in report_page(scenario, "third").tags  # the chart
    assert not list(report_folder(scenario, "third").glob("images/*"))
    sheet = materialization(scenario, "third").asset_materialization.metadata["contact_sheet"].md_str
    assert "| caption | clip\\_score/b32 |" in sheet
    assert "data:image" not in sheet
    assert warnings(scenario) == []
