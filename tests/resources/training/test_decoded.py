"""Pictures are decoded once, resumably, and near duplicates are found in them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import polars as pl
import pytest
from PIL import Image

from resources.pools.base import PoolError
from resources.pools.webdataset import WebdatasetPool
from resources.settings import PoolSettings
from resources.training.decoded import Decoder, EvaluationError, decode_samples, decode_task, small_picture
from resources.training.process import Run, Samples
from tests.support.evaluations import reencoded
from tests.support.pool_factory import picture, webdataset_pool

SIZE = 24


@pytest.fixture
def pool(tmp_path: Path) -> WebdatasetPool:
    return WebdatasetPool(PoolSettings(path=str(webdataset_pool(tmp_path / "pool", shards=2))))


def rows_of(pool: WebdatasetPool) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(pool.read_shard(shard).rows) for shard in pool.list_shards()])


def decode(pool: Any, rows: pl.DataFrame, work: Path) -> int:
    """Decode rows into a work folder, and return how many were decoded now."""
    work.mkdir(exist_ok=True)
    counted: list[int] = []
    decode_samples(pool, rows, work, Decoder.of(SIZE), counted.append)
    return sum(counted)


class OneShard:
    """A pool of which only one shard can be read."""

    def __init__(self, pool: WebdatasetPool, shard: str) -> None:
        self.pool, self.shard, self.settings = pool, shard, pool.settings

    def read_images(self, shard: str, rows: Any) -> list[Any]:
        """Read the images of the shard, and fail for others."""
        return self.pool.read_images(shard, rows) if shard == self.shard else [PoolError("gone")] * rows.num_rows


def test_what_was_decoded_before_an_error_is_not_decoded_again(pool: WebdatasetPool, tmp_path: Path) -> None:
    rows, work = rows_of(pool), tmp_path / "work"
    with pytest.raises(EvaluationError, match=r"shard 00001, key 000000006: gone.*clip-select run"):
        decode(OneShard(pool, "00000"), rows, work)
    assert decode(pool, rows, work) == 6
    assert decode(pool, rows, work) == 0
    assert decode(pool, rows, tmp_path / "at_once") == 12
    for name in ("pictures.npy", "thumbs.npy"):
        assert (work / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


def test_other_rows_are_decoded_from_the_start(pool: WebdatasetPool, tmp_path: Path) -> None:
    rows = rows_of(pool)
    assert decode(pool, rows, tmp_path / "work") == 12
    assert decode(pool, rows.head(7), tmp_path / "work") == 7


def test_pictures_are_those_of_open_clips_preprocessing(pool: WebdatasetPool, tmp_path: Path) -> None:
    rows, work = rows_of(pool), tmp_path / "work"
    decode(pool, rows, work)
    rows.write_parquet(work / "samples.parquet")
    preprocess = open_clip.image_transform(SIZE, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    settings = {"work": str(work), "pool": None}
    cached = Samples(run(**settings), preprocess, tokenizer)
    streamed = Samples(run(**settings | {"pool": pool.settings.model_dump(mode="json")}), preprocess, tokenizer)
    wanted = np.array([11, 0, 5])
    found, from_pool = cached[wanted], streamed[wanted]
    for place, row in enumerate(wanted):
        image = Image.open(io.BytesIO(picture(int(row))))
        step = 1 / 255 / 0.26  # of a byte, after normalisation
        assert np.abs(found[0][place].numpy() - preprocess(image).numpy()).max() <= step
        assert (from_pool[0][place].numpy() == preprocess(image).numpy()).all()
    assert (found[1] == tokenizer(rows["caption"].gather(wanted).to_list())).all()
    assert (found[1] == from_pool[1]).all()


def run(**changed: Any) -> Run:
    settings: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__, 0)
    return Run(**settings | changed)


def test_a_copy_at_another_size_is_alike_and_another_picture_is_not() -> None:
    def small(data: bytes) -> np.ndarray:
        return small_picture(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.float32)

    original = small(picture(1))
    assert original @ small(reencoded(picture(1), 96)) > 0.99
    assert max(original @ small(picture(seed)) for seed in range(2, 40)) < 0.9


def test_a_single_colour_is_like_nothing() -> None:
    assert not small_picture(Image.new("RGB", (30, 40), (90, 10, 200))).any()


def test_images_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    images = [(picture(0), "a"), (b"no picture", "b"), (picture(2), "c")]
    found = decode_task("task", images, tmp_path, Decoder.of(SIZE), 10_000)
    assert (found.texts, found.skipped, len(found.thumbs)) == (["a", "c"], 1, 2)
    with pytest.raises(EvaluationError, match="none of its 1 images"):
        decode_task("task", images[1:2], tmp_path, Decoder.of(SIZE), 10_000)
