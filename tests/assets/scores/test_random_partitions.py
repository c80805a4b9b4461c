"""The paper's estimator of negCLIPLoss over shards of unequal sizes: every batch has B rows."""

from pathlib import Path

import numpy as np
import pytest

from assets.scores.draws import read_draws
from tests.support.pool_factory import datacomp_shard, unit_rows
from tests.support.scenario import Scenario, keep

WIDTH = 8
TAU = 0.07
SIZES = {"00000": 1800, "00001": 200}


def vectors(shard: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and captions `[rows, 8]` of the same distribution in every shard."""
    image = unit_rows(2 * int(shard) + 1, rows, WIDTH).astype(np.float64)
    text = image + unit_rows(2 * int(shard) + 2, rows, WIDTH)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return image.astype(np.float16), text.astype(np.float16)


def add_shard(folder: Path, shard: str, rows: int) -> None:
    image, text = vectors(shard, rows)
    datacomp_shard(folder / "metadata", shard, rows, arrays={"b32_img": image, "b32_txt": text})


@pytest.fixture
def unequal(scenario: Scenario) -> Scenario:
    """Return the scenario with a shard of 1,800 rows and one of 200, and the paper's estimator with B = 1,000."""
    for shard, rows in SIZES.items():
        add_shard(scenario.folder, shard, rows)
    settings = {"batch_size": 1000, "draws": 3, "estimator": "random_partitions"}
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    scenario.document["encoders"] = {"b32": {"precomputed": "b32", "temperature": TAU}}
    scenario.document["targets"] = {}
    scenario.document["scores"] = {"clip_score": [], "neg_clip_loss": {"b32": settings}, "norm_sim": {}}
    scenario.document["recipes"] = {"best": {"steps": [keep("neg_clip_loss/b32", fraction=0.3)]}}
    return scenario


def in_batch(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Compute the score of every row of one batch by the equation, in float64."""
    v, t = image.astype(np.float64), text.astype(np.float64)
    s = v @ t.T / TAU
    top = s.max()
    sums = np.log(np.exp(s - top).sum(1)) + np.log(np.exp(s - top).sum(0)) + 2 * top
    return TAU * (np.diag(s) - sums / 2)


def completed(scenario: Scenario, shard: str, rows: int) -> np.ndarray:
    """Compute the scores of a small shard, each of its batches completed with the draw's first rows from others."""
    lake = scenario.open().lake
    own = {tuple(row) for row in scenario.scores("neg_clip_loss/b32", [shard]).select("f0", "f1").rows()}
    image, text = vectors(shard, rows)
    uids, drawn_image, drawn_text = read_draws(lake.read("negatives/b32"))
    scores = np.zeros(rows)
    for k in range(len(uids)):
        others = [place for place, uid in enumerate(uids[k].tolist()) if uid not in own][: uids.shape[1] - rows]
        batch = np.concatenate([image, drawn_image[k, others]]), np.concatenate([text, drawn_text[k, others]])
        assert len(batch[0]) == uids.shape[1]
        scores += in_batch(*batch)[:rows] / len(uids)
    return scores


def test_a_small_shard_keeps_the_same_share_as_a_large_one(unequal: Scenario) -> None:
    assert unequal.run().failures == {}
    share = {
        shard: np.mean(unequal.manifest("best")["shard"].to_numpy() == shard) * 600 / rows
        for shard, rows in SIZES.items()
    }
    # 0.3 of 200 rows has a standard deviation of 0.032. Batches of 200 rows kept 0.41.
    assert share["00001"] == pytest.approx(share["00000"], abs=0.065)
    small = unequal.scores("neg_clip_loss/b32", ["00001"])["neg_clip_loss"].to_numpy()
    np.testing.assert_allclose(small, completed(unequal, "00001", 200), atol=1e-6)
    for shard in SIZES:
        stored = unequal.open().lake.stored("neg_clip_loss/b32", shard)
        assert stored is not None
        assert stored.summary["batch_size"] == 1000


def test_a_shard_that_arrives_leaves_the_others_scores_as_they_are(unequal: Scenario) -> None:
    unequal.run()
    before = unequal.scores("neg_clip_loss/b32", list(SIZES))
    add_shard(unequal.folder, "00002", 50)
    computed = unequal.run().computed
    assert computed["neg_clip_loss/b32"] == ["00002"]
    assert "negatives/b32" not in computed
    assert unequal.scores("neg_clip_loss/b32", list(SIZES)).equals(before)
    added = unequal.scores("neg_clip_loss/b32", ["00002"])["neg_clip_loss"].to_numpy()
    np.testing.assert_allclose(added, completed(unequal, "00002", 50), atol=1e-6)
    assert set(unequal.run(redraw=True).computed["neg_clip_loss/b32"]) == {*SIZES, "00002"}


def test_every_batch_is_the_whole_pool_while_it_is_smaller_than_a_batch(unequal: Scenario) -> None:
    unequal.set("scores", "neg_clip_loss", "b32", "batch_size", value=5000)
    assert unequal.run().failures == {}
    pool = [vectors(shard, rows) for shard, rows in SIZES.items()]
    expected = in_batch(*(np.concatenate(side) for side in zip(*pool, strict=True)))
    found = unequal.scores("neg_clip_loss/b32", list(SIZES))["neg_clip_loss"].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    add_shard(unequal.folder, "00002", 50)
    assert unequal.run().computed["neg_clip_loss/b32"] == [*SIZES, "00002"]
    stored = unequal.open().lake.stored("neg_clip_loss/b32", "00000")
    assert stored is not None
    assert stored.summary["batch_size"] == 2050
