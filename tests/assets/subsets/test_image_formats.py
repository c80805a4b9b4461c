"""Pools of Parquet files and of image files, from the files to a subset with a contact sheet."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.graph import build_graph
from tests.support.pool_factory import caption, picture, uid
from tests.support.scenario import SHARDS, Scenario, keep


def write_parquet(folder: Path) -> None:
    """Write samples as Hugging Face does."""
    for shard in SHARDS:
        numbers = range(int(shard) * 100, int(shard) * 100 + 8)
        table = {
            "image": [{"bytes": picture(number), "path": f"{number}.jpg"} for number in numbers],
            "text": [caption(number) for number in numbers],
            "uid": [uid(shard, number) for number in numbers],
        }
        pq.write_table(pa.table(table), folder / f"{shard}.parquet")


def write_folders(folder: Path) -> None:
    """Write samples as files in folders."""
    for shard in SHARDS:
        (folder / shard).mkdir()
        for number in range(int(shard) * 100, int(shard) * 100 + 8):
            (folder / shard / f"{number}.jpg").write_bytes(picture(number))
            (folder / shard / f"{number}.txt").write_text(caption(number))


@pytest.mark.parametrize(("name", "write"), [("parquet_images", write_parquet), ("image_folder", write_folders)])
def test_from_files_to_a_subset_with_a_contact_sheet(
    scenario: Scenario, name: str, write: Callable[[Path], None]
) -> None:
    pool = scenario.folder / "images"
    pool.mkdir()
    write(pool)
    scenario.set("pool", value={"path": "images", "format": name})
    scenario.set("scores", value={"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}})
    scenario.set("targets", value={})
    scenario.set("recipes", value={"half": {"steps": [keep("clip_score/tiny", fraction=0.5)]}})
    assert scenario.run().failures == {}
    rows = scenario.scores("raw_pool")
    assert rows.height == 24
    assert scenario.scores("clip_score/tiny")["f0"].to_list() == rows["f0"].to_list()
    best = scenario.scores("clip_score/tiny").sort("clip_score", descending=True).head(12)
    assert set(scenario.manifest("half")["f0"]) == set(best["f0"])
    report = Path(scenario.subset("half").folder) / "report"
    shown = {path.stem for path in (report / "images").glob("*.jpg")}
    assert set(scenario.manifest("half")["uid"]) <= shown
    assert "No picture of" not in (report / "index.html").read_text()
    assert build_graph(scenario.open()).exports == ()  # which copies members of tars

    before = scenario.files()
    assert scenario.run().computed == {}
    assert scenario.files() == before
