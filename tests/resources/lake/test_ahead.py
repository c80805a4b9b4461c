"""Files of a remote lake are copied while those before are worked on."""

import numpy as np
import pyarrow as pa
import pytest

from resources.lake.ahead import read_ahead
from resources.lake.files import Lake, LakeError, Provenance, vectors_to_column
from resources.lake.gather import gather
from resources.storage.objects import ObjectStore

SHARDS = ["00000", "00001", "00002"]
ASSETS = ("embeddings/tiny", "raw_pool")


@pytest.fixture
def lake(bucket: str) -> Lake:
    lake = Lake(f"{bucket}/lake")
    for number, shard in enumerate(SHARDS):
        vectors = np.full((3, 4), number, np.float16)
        lake.write(pa.table({"image": vectors_to_column(vectors)}), Provenance(ASSETS[0], shard, "1"))
        lake.write(pa.table({"f0": [number]}), Provenance(ASSETS[1], shard, "1"))
    return Lake(f"{bucket}/lake")


def copied(lake: Lake) -> list[str]:
    """Return the shards of which this machine has both files."""
    assert isinstance(lake.store, ObjectStore)
    found = {}
    for shard in SHARDS:
        entries = [lake.store.stat(lake.path(asset, shard)) for asset in ASSETS]
        found[shard] = all(entry is not None and lake.store.copied(entry) is not None for entry in entries)
    return [shard for shard, there in found.items() if there]


def test_a_group_is_at_hand_when_its_turn_comes_and_only_the_next_is_copied(lake: Lake) -> None:
    ahead = read_ahead(lake, [[(asset, shard) for asset in ASSETS] for shard in SHARDS])
    assert copied(lake) == []
    next(ahead)
    assert copied(lake)[:1] == SHARDS[:1]
    ahead.close()  # which waits for the copy that has begun
    assert copied(lake) == SHARDS[:2]


def test_a_file_that_is_not_there_is_an_error_in_its_own_turn(lake: Lake) -> None:
    lake.store.delete(lake.path(ASSETS[0], SHARDS[1]))
    turns = []
    for shard, _ in zip(SHARDS, read_ahead(lake, [[(ASSETS[0], shard)] for shard in SHARDS]), strict=True):
        try:
            turns.append(lake.vectors(ASSETS[0], shard, columns=["image"])[0][:].tolist()[0][0])
        except LakeError as error:
            turns.append(shard in str(error))
    assert turns == [0.0, True, 2.0]


def test_rows_are_gathered_from_a_remote_lake(lake: Lake) -> None:
    (image,) = gather(lake, ASSETS[0], ["image"], SHARDS, np.array([2, 0, 2]), np.array([1, 0, 2]))
    assert image[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert copied(lake) == []  # of shards without a chosen row, and of other assets, nothing
    assert lake.store.stat(lake.path(ASSETS[0], SHARDS[1])) is not None


def test_a_local_lake_copies_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    assert len(list(read_ahead(lake, [[("raw_pool", "00000")]] * 3))) == 3
