"""HYPE from the files of hyperbolic embeddings to a subset."""

import json
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from assets.reproduction import choose_again, rebuild
from assets.settings import ConfigError
from dagster_project.early_checks import problems
from resources.inputs.external import ExternalError
from resources.inputs.hyperbolic import read_shard
from resources.settings import HypeSettings
from resources.storage.arrays import ArrayError
from tests.support.hyperbolic import (
    published_distance,
    published_image_specificity,
    published_text_specificity,
)
from tests.support.pool_factory import datacomp_shard, uid, unit_rows
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

WIDTH = 6
CURVATURE = 0.5
PARTS = ("hype_specificity_image", "hype_specificity_text", "hype_distance", "hype_cosine")


def spatial(seed: int, rows: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def embeddings(shard: str) -> dict[str, np.ndarray]:
    return {side: spatial(10 * int(shard) + number, ROWS) for number, side in enumerate(("image", "text"))}


def write_pool(folder: Path, shard: str) -> dict[str, np.ndarray]:
    arrays = {"b32_img": unit_rows(int(shard) + 1, ROWS), "b32_txt": unit_rows(int(shard) + 51, ROWS)}
    datacomp_shard(folder / "metadata", shard, ROWS, arrays=arrays)
    return arrays


@pytest.fixture
def hyped(scenario: Scenario) -> Scenario:
    """Return the scenario with hyperbolic embeddings and a recipe that ranks by HYPE."""
    (scenario.folder / "hyperbolic").mkdir()
    for shard in SHARDS:
        write_pool(scenario.folder, shard)
        np.savez(scenario.folder / "hyperbolic" / f"{shard}.npz", **embeddings(shard))
    np.savez(scenario.folder / "reference.npz", image=spatial(98, 9), text=spatial(99, 11))
    settings = {"path": "hyperbolic", "reference": "reference.npz", "curvature": CURVATURE}
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    scenario.document["encoders"] = {"b32": {"precomputed": "b32", "temperature": 0.01}}
    scenario.document["targets"] = {}
    scenario.document["scores"] = {"clip_score": [], "neg_clip_loss": {}, "norm_sim": {}, "hype": {"meru": settings}}
    scenario.document["recipes"] = {"best": {"steps": [keep("hype/meru", fraction=0.25)]}}
    return scenario


def expected(shard: str, curvature: float = CURVATURE) -> dict[str, np.ndarray]:
    """Compute the parts by the published equations."""
    image, text = (side.astype(np.float64) for side in embeddings(shard).values())
    of_images, of_texts = spatial(98, 9).astype(np.float64), spatial(99, 11).astype(np.float64)
    parts = {
        "hype_specificity_image": published_image_specificity(image, of_texts, curvature),
        "hype_specificity_text": published_text_specificity(text, of_images, curvature),
    }
    lengths = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    parts["hype_distance"] = published_distance(image, text, curvature)
    parts["hype_cosine"] = (image * text).sum(1) / lengths
    return parts


def test_every_part_is_a_column_and_their_sum_is_ranked_by(hyped: Scenario) -> None:
    assert hyped.run().failures == {}
    scores = hyped.scores("hype/meru")
    wanted = {part: np.concatenate([expected(shard)[part] for shard in SHARDS]) for part in PARTS}
    for part in PARTS:
        np.testing.assert_allclose(scores[part].to_numpy(), wanted[part], atol=2e-6)
    image, text, distance, cosine = (wanted[part] for part in PARTS)
    np.testing.assert_allclose(scores["hype"].to_numpy(), image + text - distance + cosine, atol=5e-6)
    best = scores.sort(["hype", "f0", "f1"], descending=[True, False, False]).head(9)
    assert sorted(best.select("f0", "f1").rows()) == sorted(hyped.manifest("best").select("f0", "f1").rows())
    with duckdb.connect(str(hyped.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        chosen = hyped.manifest("best")["uid"][0]
        ((verdict, value),) = con.sql(f"SELECT verdict, value FROM explain('{chosen}') WHERE step = 1").fetchall()
        assert (verdict, value) == ("kept", pytest.approx(hyped.manifest("best")["step1_value"][0]))
        assert len(con.sql('SELECT "hype_distance/meru", "hype_cosine/meru" FROM scores').fetchall()) == 36


def test_the_specificity_of_a_caption_rises_with_its_distance_from_the_origin(hyped: Scenario) -> None:
    hyped.run()
    nearer = hyped.scores("hype/meru", ["00001"])
    farther = embeddings("00001")
    farther["text"] *= 2
    np.savez(hyped.folder / "hyperbolic" / "00001.npz", **farther)
    assert hyped.run().computed["hype/meru"] == ["00001"]
    scores = hyped.scores("hype/meru", ["00001"])
    assert (scores["hype_specificity_text"] > nearer["hype_specificity_text"]).all()
    assert scores["hype_specificity_image"].equals(nearer["hype_specificity_image"])


@pytest.mark.parametrize("name", ["words", "texts"])
def test_embeddings_in_another_order_are_joined_by_uid(hyped: Scenario, name: str) -> None:
    hyped.run()
    wanted = hyped.scores("hype/meru")
    order = np.random.default_rng(0).permutation(ROWS)
    for shard in SHARDS:
        uids = [uid(shard, int(row)) for row in order]
        words = np.array([[int(text[:16], 16), int(text[16:], 16)] for text in uids], dtype=np.uint64)
        beside = {"uid": np.array(uids)} if name == "texts" else {"f0": words[:, 0], "f1": words[:, 1]}
        shuffled = {side: vectors[order] for side, vectors in embeddings(shard).items()}
        np.savez(hyped.folder / "hyperbolic" / f"{shard}.npz", **shuffled, **beside)
    outcome = hyped.run()
    assert outcome.failures == {}
    assert outcome.computed["hype/meru"] == list(SHARDS)
    assert hyped.scores("hype/meru").equals(wanted)


def test_rows_keep_their_own_embedding_when_a_sample_is_rejected(hyped: Scenario) -> None:
    hyped.run()
    whole = hyped.scores("hype/meru", ["00001"])
    arrays = write_pool(hyped.folder, "00001")
    arrays["b32_img"][0] = np.nan
    datacomp_shard(hyped.folder / "metadata", "00001", ROWS, arrays=arrays)
    assert hyped.run().failures == {}
    assert hyped.scores("hype/meru", ["00001"]).equals(whole[1:])


def clustered(scenario: Scenario) -> None:
    """Add HYPE's cluster term: four fixed centroids, and a target of two images' features."""
    images = np.concatenate([unit_rows(int(shard) + 1, ROWS) for shard in SHARDS])
    np.save(scenario.folder / "centroids.npy", images[[0, 7, 20, 30]].astype(np.float32))
    np.save(scenario.folder / "features.npy", images[[7, 30]])
    scenario.document["targets"] = {"liked": {"features": {"b32": "features.npy"}}}
    scenario.set("scores", "clusters", value={"b32": {"targets": ["liked"], "centroids": "centroids.npy"}})
    scenario.set("scores", "hype", "meru", "clusters", value="b32/liked")


def test_the_cluster_term_says_whether_the_nearest_centroid_is_a_targets_too(hyped: Scenario) -> None:
    hyped.run()
    before = hyped.scores("hype/meru")
    clustered(hyped)
    assert hyped.run().failures == {}
    after = hyped.scores("hype/meru")
    images = np.concatenate([unit_rows(int(shard) + 1, ROWS) for shard in SHARDS]).astype(np.float64)
    inside = np.isin((images @ images[[0, 7, 20, 30]].T).argmax(1), [1, 3])
    assert 0 < inside.sum() < len(inside)
    assert after["hype_cluster"].to_list() == inside.astype(float).tolist()
    np.testing.assert_allclose((after["hype"] - before["hype"]).to_numpy(), inside, atol=1e-6)


def test_other_centroids_score_hype_again(hyped: Scenario) -> None:
    clustered(hyped)
    hyped.run()
    np.save(hyped.folder / "centroids.npy", unit_rows(7, 3).astype(np.float32))
    outcome = hyped.run()
    assert outcome.failures == {}
    assert outcome.computed["hype/meru"] == list(SHARDS)
    assert hyped.run().computed == {}


def test_what_the_published_code_calls_nan_has_a_score(hyped: Scenario) -> None:
    odd = embeddings("00000")
    odd["text"][0] = odd["image"][0]
    odd["image"][1] = odd["text"][2] = 0
    odd["image"][3] *= 1e-6
    odd["text"][4] *= 1e6
    np.savez(hyped.folder / "hyperbolic" / "00000.npz", **odd)
    reference = np.concatenate([odd["image"][:5], odd["text"][:5]])
    np.savez(hyped.folder / "reference.npz", image=reference, text=reference)
    assert hyped.run().failures == {}
    scores = hyped.scores("hype/meru", ["00000"]).select(pl.col("^hype.*$")).to_numpy()
    assert np.isfinite(scores).all()
    assert hyped.scores("hype/meru", ["00000"])["hype_distance"][0] == 0


def test_a_new_reference_or_curvature_scores_all_shards_again_and_a_shards_file_its_own(hyped: Scenario) -> None:
    hyped.run()
    assert hyped.run().computed == {}
    np.savez(hyped.folder / "hyperbolic" / "00001.npz", **embeddings("00000"))
    assert hyped.run().computed["hype/meru"] == ["00001"]
    hyped.set("recipes", "specific", value={"steps": [keep("hype_specificity_image/meru", count=5)]})
    hyped.run()
    np.savez(hyped.folder / "reference.npz", image=spatial(1, 5), text=spatial(2, 5))
    assert hyped.run().computed["hype/meru"] == list(SHARDS)
    with duckdb.connect(str(hyped.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        told = con.sql(
            "SELECT DISTINCT step FROM diff('specific', 'v0001', 'v0002') WHERE reason = 'score changed'"
        ).fetchall()
    assert told == [(1,)]
    hyped.set("scores", "hype", "meru", "curvature", value=1.0)
    assert hyped.run().computed["hype/meru"] == list(SHARDS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": spatial(1, ROWS)}, "00001.npz has no array 'text'"),
        ({"image": spatial(1, 5), "text": spatial(2, 5)}, "5 rows, and 12 samples were seen"),
        ({"image": spatial(1, ROWS), "text": spatial(2, ROWS, 3)}, "of one width"),
        ({"image": spatial(1, ROWS) * np.nan, "text": spatial(2, ROWS)}, "12 rows have NaN"),
        (
            {"image": spatial(1, ROWS), "text": spatial(2, ROWS), "uid": np.array(["0" * 32] * ROWS)},
            "12 of the shard's 12 rows are not in it",
        ),
    ],
)
def test_a_wrong_file_is_one_error_with_its_name(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "00001.npz", **arrays)
    settings = HypeSettings(path=str(tmp_path), reference="none.npz", curvature=1)
    pool = {"f0": np.arange(ROWS, dtype=np.uint64), "f1": np.ones(ROWS, np.uint64), "source_row": np.arange(ROWS)}
    with pytest.raises((ExternalError, ArrayError), match=message) as error:
        read_shard(settings, "00001", pool, ROWS)
    assert "00001.npz" in str(error.value)


def test_a_wrong_file_costs_its_shard_alone(hyped: Scenario) -> None:
    narrow = {"image": spatial(1, ROWS, 3), "text": spatial(2, ROWS, 3)}
    np.savez(hyped.folder / "hyperbolic" / "00001.npz", **narrow)
    said = hyped.run().failures["hype/meru"]
    assert "Remedy: a reference set by the same encoder" in said
    assert "1 of 3 shards failed" in said
    assert hyped.open().lake.shards("hype/meru") == ["00000", "00002"]


def test_a_shard_waits_for_its_file(hyped: Scenario) -> None:
    missing = hyped.folder / "hyperbolic" / "00001.npz"
    missing.unlink()
    hyped.run()
    assert hyped.open().lake.shards("hype/meru") == ["00000", "00002"]
    assert "00001" in hyped.subset("best").lineage["shards_missing"]
    np.savez(missing, **embeddings("00001"))
    outcome = hyped.run()
    assert outcome.computed["hype/meru"] == ["00001"]


def test_a_file_that_one_shard_lacks_is_no_problem_of_the_project_and_that_all_lack_is_one(hyped: Scenario) -> None:
    for shard in SHARDS:
        assert problems(*hyped.open_graph()) == {}
        (hyped.folder / "hyperbolic" / f"{shard}.npz").unlink()
    ((message, keys),) = problems(*hyped.open_graph()).items()
    assert f"{SHARDS[0]}.npz" in message
    assert keys == ["hype/meru"]


def test_clusters_that_nobody_computes_are_refused(hyped: Scenario) -> None:
    hyped.set("scores", "hype", "meru", "clusters", value="b32/liked")
    with pytest.raises(ConfigError, match=r"scores.hype.meru.clusters: scores.clusters has no 'b32/liked'"):
        hyped.open()


def test_what_hype_chose_is_made_again_from_its_record(hyped: Scenario, tmp_path: Path) -> None:
    clustered(hyped)
    hyped.run()
    record = json.loads((Path(hyped.subset("best").folder) / "lineage.json").read_text())
    assert record["scores"]["hype/meru"]["curvature"] == CURVATURE
    choose_again(hyped.open().lake, record, tmp_path / "chosen")
    rebuild(record, tmp_path / "rebuilt")
