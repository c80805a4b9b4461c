"""The examples run on real photographs, if the machine has them."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from assets.graph import build_graph
from assets.settings import open_project
from dagster_project.headless import Outcome, materialize
from resources.lake.files import column_to_vectors
from resources.lake.versions import Versions

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
HALF = 400

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real photographs are not at {DATA}"),
    pytest.mark.slow,
]


def example(name: str, folder: Path, **changes: object) -> Path:
    """Write an example's YAML with absolute paths and a lake in `folder`."""
    text = (ROOT / "examples" / name).read_text().replace("../../shared/data", str(DATA))
    path = folder / name
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), "lake": str(folder / Path(name).stem), **changes}))
    return path


def run(config: Path, instance: dg.DagsterInstance) -> Outcome:
    project = open_project(config)
    return materialize(project, build_graph(project), instance, notice=lambda *_: None)


def scores(config: Path, asset: str) -> pl.DataFrame:
    lake = open_project(config).lake
    return pl.concat([pl.from_arrow(lake.read(asset, shard)) for shard in lake.shards(asset)])


def array(config: Path, recipe: str) -> np.ndarray:
    version = Versions(open_project(config).lake, recipe).current()
    assert version is not None
    return np.load(version.uids)


def first_half(folder: Path) -> tuple[Path, Path, pl.DataFrame]:
    """Write the first samples of a real shard as a webdataset and as DataComp metadata.

    Returns:
        The folders of both, and the rows of the downloads among them that had failed.
    """
    pool, metadata = folder / "pool", folder / "metadata"
    pool.mkdir()
    metadata.mkdir()
    rows = pl.read_parquet(DATA / "pools/real/00000.parquet").sort("key")
    ready = rows.filter(pl.col("status") == "success").head(HALF)
    rows = rows.filter(pl.col("key") <= ready["key"].last())
    rows.write_parquet(pool / "00000.parquet")
    keys = set(ready["key"])
    with tarfile.open(DATA / "pools/real/00000.tar") as whole, tarfile.open(pool / "00000.tar", "w") as half:
        for member in whole:
            if member.name.partition(".")[0] in keys:
                half.addfile(member, whole.extractfile(member))
    described = pl.read_parquet(DATA / "pools/real_datacomp/00000.parquet")
    kept = described["uid"].is_in(ready["uid"].implode())
    described.filter(kept).write_parquet(metadata / "00000.parquet")
    with np.load(DATA / "pools/real_datacomp/00000.npz") as stored:
        np.savez(metadata / "00000.npz", **{name: stored[name][kept.to_numpy()] for name in stored.files})
    return pool, metadata, rows.filter(pl.col("status") != "success")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def test_photographs_and_their_datacomp_metadata_lead_to_the_same_subset(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    pool, metadata, failed = first_half(tmp_path)
    flickr = {"flickr": {"path": str(DATA / "targets/flickr_dev.tar")}}  # the target that the recipes use
    photographs = example("photographs.yaml", tmp_path, pool={"path": str(pool)}, targets=flickr)
    datacomp = example("datacomp.yaml", tmp_path, pool={"path": str(metadata), "format": "datacomp"})

    assert run(photographs, instance).failures == {}
    with dg.DagsterInstance.ephemeral() as other_instance:
        assert run(datacomp, other_instance).failures == {}
    seen = open_project(photographs).lake.stored("raw_pool", "00000")
    assert seen is not None
    assert (seen.rows, seen.summary["samples_seen"]) == (HALF, HALF + len(failed))

    ours, theirs = scores(photographs, "clip_score/small"), scores(datacomp, "clip_score/b32")
    both = ours.join(theirs, on=["f0", "f1"], suffix="_theirs")
    assert len(both) == HALF
    assert (both["clip_score"] - both["clip_score_theirs"]).abs().max() < 3e-3
    one, other = array(photographs, "neg_clip_loss_30_norm_sim_20"), array(datacomp, "neg_clip_loss_30_norm_sim_20")
    assert len(one) == len(other) == HALF // 5
    assert len(np.intersect1d(one, other)) >= HALF // 5 - 1

    truth = pl.read_parquet(DATA / "pools/real_truth.parquet").select("uid", "kind")
    lake = open_project(photographs).lake
    uids = pl.from_arrow(lake.read("raw_pool", "00000", ["uid", "f0", "f1"]))
    loss = scores(photographs, "neg_clip_loss/small").join(uids, on=["f0", "f1"]).join(truth, on="uid")
    mean = dict(loss.group_by("kind").agg(pl.col("neg_clip_loss").mean()).iter_rows())
    assert mean["clean"] > max(mean["shuffled"], mean["generic"], mean["junk"])

    assert run(photographs, instance).computed == {}


def test_stored_embeddings_give_the_pools_own_clip_score(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    datacomp = example("datacomp.yaml", tmp_path)
    assert run(datacomp, instance).failures == {}
    lake = open_project(datacomp).lake
    own = pl.concat(
        [
            pl.from_arrow(lake.read("raw_pool", shard, ["f0", "f1", "clip_b32_similarity_score"]))
            for shard in lake.shards("raw_pool")
        ]
    )
    both = scores(datacomp, "clip_score/b32").join(own, on=["f0", "f1"])
    assert len(both) == 3200
    assert (both["clip_score"] - both["clip_b32_similarity_score"]).abs().max() < 3e-3
    vectors = column_to_vectors(lake.read("embeddings/b32", "00005")["image"])
    with np.load(DATA / "pools/real_datacomp/00005.npz") as stored:
        np.testing.assert_array_equal(vectors, stored["b32_img"])


def test_a_damaged_shard_is_used_as_far_as_it_goes(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    recipes = {"clip_score_30": {"steps": [{"keep_top": {"score": "clip_score/small", "fraction": 0.30}}]}}
    pool = {"path": str(DATA / "pools/broken")}
    broken = example("photographs.yaml", tmp_path, pool=pool, targets={}, recipes=recipes)
    assert run(broken, instance).failures == {}
    lake = open_project(broken).lake
    stored = lake.stored("raw_pool", "00000")
    assert stored is not None
    rejects = pl.from_arrow(lake.read("rejects", "00000"))
    assert stored.rows + len(rejects) == stored.summary["samples_seen"] == 41
    assert {"image_truncated", "duplicate_key", "unsafe_path", "shard_truncated"} <= set(rejects["reason"])
    lineage = json.loads((tmp_path / "photographs/subset/clip_score_30/v0001/lineage.json").read_text())
    assert (lineage["source"]["rows"], lineage["rows"]) == (30, 9)


def test_the_photographs_that_are_there_twice_are_found_and_the_better_caption_stays(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    settings = {"neg_clip_loss": {}, "norm_sim": {}, "near_duplicates": {"b32": {"best": "clip_score/b32"}}}
    apart = {"steps": [{"where": '"near_duplicate/b32" <= 0.99'}]}
    datacomp = example("datacomp.yaml", tmp_path, scores=settings, recipes={"apart": apart})
    assert run(datacomp, instance).failures == {}
    lake = open_project(datacomp).lake
    uids = pl.concat([pl.from_arrow(lake.read("raw_pool", s, ["uid", "f0", "f1"])) for s in lake.shards("raw_pool")])
    truth = pl.read_parquet(DATA / "pools/real_truth.parquet").select("uid", "source_image")
    rows = scores(datacomp, "near_duplicates/b32").join(uids, on=["f0", "f1"]).join(truth, on="uid")
    rows = rows.join(scores(datacomp, "clip_score/b32"), on=["f0", "f1"])
    better = rows.select("uid", "source_image", "clip_score")
    named = rows.join(better, left_on="near_duplicate_of", right_on="uid", suffix="_of")
    assert len(named) == len(rows) - 1
    assert (named["clip_score_of"] >= named["clip_score"]).all()
    copies = rows.sort("clip_score", "uid", descending=[True, False]).filter(
        pl.int_range(pl.len()).over("source_image") > 0
    )
    assert len(copies) > 300
    assert copies["near_duplicate"].min() > 0.999
    same = named.filter(pl.col("source_image") == pl.col("source_image_of"))
    assert set(copies["uid"]) <= set(same["uid"])
    assert len(array(datacomp, "apart")) <= len(rows) - len(copies)
