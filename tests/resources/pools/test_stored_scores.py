"""A shard whose metadata and embeddings are in different orders is left out; its stored similarities show it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from resources.pools.base import PoolError, ShardRead
from resources.pools.formats import open_pool
from resources.pools.stored_scores import ROWS, sampled_rows, score_column
from resources.settings import EncoderSettings, PoolSettings, PrecomputedKeys
from tests.support.pool_factory import SHARED, cosines, datacomp_shard, uid, unit_rows
from tests.support.scenario import Scenario, keep

REAL = SHARED / "data" / "pools" / "real_datacomp"
COLUMN = "clip_b32_similarity_score"


def read(folder: Path, precomputed: str | PrecomputedKeys = "b32", shard: str = "00000") -> ShardRead:
    encoders = {"any": EncoderSettings(precomputed=precomputed, temperature=0.01)}
    return open_pool(PoolSettings(path=str(folder), format="datacomp"), encoders).read_shard(shard)


def reversed_arrays(rows: int) -> dict[str, np.ndarray]:
    return {"b32_img": unit_rows(1, rows)[::-1], "b32_txt": unit_rows(2, rows)[::-1]}


def own(rows: int) -> np.ndarray:
    return cosines(unit_rows(1, rows), unit_rows(2, rows))


def test_rows_in_another_order_are_an_error_with_both_files_an_example_and_the_remedy(tmp_path: Path) -> None:
    rows = 40
    stored, arrays = own(rows), reversed_arrays(rows)
    datacomp_shard(tmp_path, rows=rows, columns={COLUMN: stored}, arrays=arrays)
    with pytest.raises(PoolError) as caught:
        read(tmp_path)
    message = str(caught.value)
    worst = int(np.abs(stored - stored[::-1]).argmax())
    assert f"shard 00000: {tmp_path}/00000.parquet and {tmp_path}/00000.npz contradict each other" in message
    assert f"uid {uid('00000', worst)}: {COLUMN} is {stored[worst]:.4f}, the cosine is {stored[::-1][worst]:.4f}" in (
        message
    )
    assert "Download both again" in message


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_scores_of_these_embeddings_agree_whatever_their_precision(tmp_path: Path, kind: type) -> None:
    datacomp_shard(tmp_path, rows=40, columns={COLUMN: own(40).astype(kind)})
    assert read(tmp_path).rows.num_rows == 40


def test_the_end_of_a_shard_that_is_out_of_step_is_found(tmp_path: Path) -> None:
    rows = 400
    stored = own(rows)
    stored[-20:] = np.roll(stored[-20:], 1)
    datacomp_shard(tmp_path, rows=rows, columns={COLUMN: stored})
    with pytest.raises(PoolError, match=r"of 400 rows compared"):
        read(tmp_path)


def test_a_single_odd_score_is_no_other_order(tmp_path: Path) -> None:
    stored = own(6)
    stored[2] += 0.5
    datacomp_shard(tmp_path, rows=6, columns={COLUMN: stored})
    assert read(tmp_path).rows.num_rows == 6


@pytest.mark.parametrize(
    "stored", [[None] * 40, [float("nan")] * 40, [31.4] * 40, ["high"] * 40], ids=["null", "nan", "percent", "text"]
)
def test_values_that_are_no_cosine_are_not_compared(tmp_path: Path, stored: list[Any]) -> None:
    datacomp_shard(tmp_path, rows=40, columns={COLUMN: stored}, arrays=reversed_arrays(40))
    assert read(tmp_path).rows.num_rows == 40


def test_without_the_column_nothing_is_compared(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, rows=40, columns={COLUMN: None}, arrays=reversed_arrays(40))
    assert read(tmp_path).rows.num_rows == 40


def test_scores_of_another_encoder_are_no_contradiction(tmp_path: Path) -> None:
    l14 = {"l14_img": unit_rows(3, 40), "l14_txt": unit_rows(4, 40)}
    dfn = {"dfn_img": unit_rows(5, 40), "dfn_txt": unit_rows(6, 40)}
    datacomp_shard(tmp_path, rows=40, columns={COLUMN: own(40)}, arrays=reversed_arrays(40) | l14 | dfn)
    assert read(tmp_path, "l14").rows.num_rows == 40
    assert read(tmp_path, PrecomputedKeys(image="dfn_img", text="dfn_txt")).rows.num_rows == 40
    with pytest.raises(PoolError, match="contradict each other"):
        read(tmp_path, PrecomputedKeys(image="b32_img", text="b32_txt"))


@pytest.mark.parametrize(
    ("image", "text", "column"),
    [
        ("b32_img", "b32_txt", COLUMN),
        ("oai-clip-vit-l14-image", "oai-clip-vit-l14-text", "clip_l14_similarity_score"),
        ("b32_img", "l14_txt", None),
        ("b32_img", "other", None),
        ("b32_txt", "b32_txt", None),
        ("dedup", "dedup", None),
        (None, None, None),
    ],
)
def test_the_names_of_the_arrays_tell_which_column_is_theirs(
    image: str | None, text: str | None, column: str | None
) -> None:
    assert score_column(image, text) == column


def test_dataset2metadatas_names_are_compared_and_named(tmp_path: Path) -> None:
    arrays = {f"oai-clip-vit-b32-{side}": unit_rows(place, 40) for place, side in enumerate(("image", "text"))}
    wrong = cosines(*arrays.values())[::-1]
    datacomp_shard(tmp_path, rows=40, columns={COLUMN: None, "oai-clip-vit-b32-score": wrong}, arrays=arrays)
    with pytest.raises(PoolError, match="oai-clip-vit-b32-score is "):
        read(tmp_path)


def test_of_a_large_shard_the_same_rows_are_compared_every_time() -> None:
    rows = sampled_rows(ROWS * 10)
    assert (len(rows), len(np.unique(rows))) == (ROWS, ROWS)
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sampled_rows(ROWS * 10))
    assert np.array_equal(sampled_rows(5), np.arange(5))


def test_the_shard_fails_alone_and_the_subset_lists_it(scenario: Scenario) -> None:
    folder = scenario.folder / "metadata"
    for number in range(3):
        shard, seed = f"{number:05d}", 10 * number
        arrays = {"b32_img": unit_rows(seed + 1, 12), "b32_txt": unit_rows(seed + 2, 12)}
        stored = cosines(*arrays.values())
        datacomp_shard(folder, shard, 12, columns={COLUMN: stored[::-1] if number == 1 else stored}, arrays=arrays)
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    scenario.document["encoders"] = {"b32": {"precomputed": "b32", "temperature": 0.1}}
    scenario.document["targets"] = {}
    scenario.document["scores"] = {}
    scenario.document["recipes"] = {"best": {"steps": [keep("clip_score/b32", fraction=0.5)]}}
    outcome = scenario.run()
    assert outcome.failures.keys() == {"raw_pool"}
    assert "00001: shard 00001: " in outcome.failures["raw_pool"]
    assert scenario.subset("best").lineage["shards"].keys() == {"00000", "00002"}
    assert scenario.subset("best").lineage["shards_missing"].keys() == {"00001"}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real pool is not at {REAL}")
def test_the_real_pool_agrees_and_is_refused_in_another_order(tmp_path: Path) -> None:
    for name in ("00000.parquet", "00000.npz"):
        shutil.copy(REAL / name, tmp_path / name)
    assert read(tmp_path).rows.num_rows == 800
    table = pq.read_table(tmp_path / "00000.parquet")
    pq.write_table(table.take([1, 0, *range(2, 780), *range(799, 779, -1)]), tmp_path / "00000.parquet")
    with pytest.raises(PoolError, match="contradict each other"):
        read(tmp_path)
