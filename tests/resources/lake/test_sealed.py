"""The lake's readers return the values that were written, or an error: never other values."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from resources.lake.files import DamagedError, Lake, Provenance, vectors_to_column
from resources.lake.gather import gather
from tests.support.corruption import flip

ROWS, WIDTH = 6_000, 16
EMBEDDINGS, SCORE = "embeddings/b32", "clip_score/b32"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(str(tmp_path / "lake"))
    rng = np.random.default_rng(0)
    uids = {name: rng.integers(0, 2**64, ROWS, np.uint64) for name in ("f0", "f1")}
    sides = {
        name: vectors_to_column(rng.standard_normal((ROWS, WIDTH)).astype(np.float16)) for name in ("image", "text")
    }
    lake.write(pa.table({**uids, **sides}), Provenance(EMBEDDINGS, "00000", "1"))
    scores = {"shard": ["00000"] * ROWS, **uids, "clip_score": rng.standard_normal(ROWS).astype(np.float32)}
    lake.write(pa.table(scores), Provenance(SCORE, "00000", "1"))
    return lake


def read(lake: Lake, asset: str) -> pa.Table | None:
    """Read a file as a step does: its record, then its table; None where the lake finds it damaged."""
    try:
        return None if lake.stored(asset, "00000") is None else lake.read(asset, "00000")
    except DamagedError:
        return None


@pytest.mark.parametrize("asset", [EMBEDDINGS, SCORE])
def test_of_200_flipped_bits_none_is_read_as_another_value(lake: Lake, asset: str) -> None:
    path = Path(lake.path(asset, "00000"))
    content, wanted, record = path.read_bytes(), lake.read(asset, "00000"), lake.stored(asset, "00000")
    rng = np.random.default_rng(2)
    found = 0
    for place in rng.integers(0, len(content), 200):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        flip(path, int(place), int(rng.integers(8)))
        table = read(lake, asset)
        if table is None:
            found += 1
        else:
            assert table.equals(wanted, check_metadata=True)
            assert lake.stored(asset, "00000") == record
    assert found == 200  # no byte is without a checksum


@pytest.mark.parametrize("asset", [EMBEDDINGS, SCORE])
def test_a_damaged_file_is_set_aside_with_a_message_and_missing_from_then_on(lake: Lake, asset: str) -> None:
    path = Path(lake.path(asset, "00000"))
    damaged = flip(path, path.stat().st_size // 2)
    with pytest.raises(DamagedError, match=r"do not have their checksum\. Set aside as .*Remedy: clip-select run"):
        lake.read(asset, "00000")
    assert lake.stored(asset, "00000") is None
    assert path.with_name(f".{path.name}.damaged").read_bytes() == damaged
    assert list(lake.damaged) == [str(path)]


def test_rows_are_read_as_long_as_their_own_blocks_are_sound(lake: Lake) -> None:
    path = Path(lake.path(EMBEDDINGS, "00000"))
    (image,) = lake.vectors(EMBEDDINGS, "00000", columns=["image"])
    wanted = image[:].copy()
    place = path.read_bytes().index(wanted[5_000].tobytes())
    flip(path, place)
    rows = np.array([0, 17, 2_000])
    (found,) = gather(lake, EMBEDDINGS, ["image"], ["00000"], np.zeros(3, np.int64), rows)
    np.testing.assert_array_equal(found, wanted[rows])
    (image,) = lake.vectors(EMBEDDINGS, "00000", columns=["image"])
    np.testing.assert_array_equal(image[:2_900], wanted[:2_900])  # 2,100 rows of 32 bytes fill a block
    with pytest.raises(DamagedError, match="do not have their checksum"):
        image[np.array([0, 5_000])]


def test_columns_that_are_not_read_are_not_verified(lake: Lake) -> None:
    path = Path(lake.path(EMBEDDINGS, "00000"))
    text = lake.vectors(EMBEDDINGS, "00000", columns=["text"])[0][:]
    flip(path, path.read_bytes().index(text[ROWS // 2].tobytes()))
    assert lake.read(EMBEDDINGS, "00000", ["f0", "f1"]).num_rows == ROWS
    with pytest.raises(DamagedError):
        lake.read(EMBEDDINGS, "00000", ["text"])


def test_a_path_for_duckdb_is_verified_first(lake: Lake) -> None:
    path = Path(lake.path(SCORE, "00000"))
    assert lake.verified_path(SCORE, "00000", ["f0", "clip_score"]) == path
    flip(path, 1_000)
    with pytest.raises(DamagedError, match="do not have their checksum"):
        lake.verified_path(SCORE, "00000")


def test_a_file_that_cannot_be_set_aside_is_an_error_with_a_remedy(lake: Lake) -> None:
    path = Path(lake.path(SCORE, "00000"))
    path.write_bytes(b"")
    path.with_name(f".{path.name}.damaged").mkdir()
    with pytest.raises(DamagedError, match=r"it is empty\. Remedy: remove it"):
        lake.stored(SCORE, "00000")
