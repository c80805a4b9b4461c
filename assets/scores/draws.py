"""Reference negatives as a table: drawing K draws of B pool rows, and reading them back.

A row of a draw is identified by its uid and its content, because a row whose content changed since the draw is another
row than the drawn one.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from assets.base.results import Result
from core.uids import UID_DTYPE
from resources.lake.files import Lake, column_to_vectors, vectors_to_column
from resources.lake.gather import gather

SCHEMA = pa.schema(
    [
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("f0", pa.uint64(), nullable=False),
        pa.field("f1", pa.uint64(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
        pa.field("text", pa.list_(pa.float16()), nullable=False),
    ]
)


def draw(lake: Lake, embeddings: str, shards: Mapping[str, str], *, draws: int, batch_size: int, seed: int) -> Result:
    """Draw reference negatives from the embeddings of some shards.

    Args:
        lake: the lake.
        embeddings: key of the embeddings.
        shards: the shards, and their fingerprints.
        draws: K.
        batch_size: B; the whole pool where it has fewer rows.
        seed: of the keyed hash that chooses rows.

    Returns:
        The rows of all draws in order, as `SCHEMA` has them, and the numbers that describe them.
    """
    from selection.scores.negatives import candidates, merge

    names = list(shards)
    chosen = merge(
        (
            candidates(*_uids(lake, embeddings, shard), draws=draws, size=batch_size, seed=seed, shard=number)
            for number, shard in enumerate(names)
        ),
        batch_size,
    )
    draws, size = chosen.shape
    flat = chosen.ravel()
    image, text = gather(lake, embeddings, ["image", "text"], names, flat["shard"], flat["row"])
    table = pa.table(
        {
            "draw": np.repeat(np.arange(draws, dtype=np.int32), size),
            "rank": np.tile(np.arange(size, dtype=np.int32), draws),
            "f0": flat["f0"],
            "f1": flat["f1"],
            "image": vectors_to_column(image),
            "text": vectors_to_column(text),
        }
    )
    summary: dict[str, object] = {"draws": draws, "batch_size": size, "seed": seed, "shards_drawn_from": len(names)}
    if size < batch_size:
        summary["notes"] = f"the pool has {size} rows, fewer than {batch_size}: each draw is all of it"
    return Result(table, summary)


def read_draws(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the stored draws.

    Returns:
        The uids as `UID_DTYPE` records `[K, B]`, and float16 image and text `[K, B, d]`.
    """
    draws = int(table["draw"][-1].as_py()) + 1
    uids = np.empty(table.num_rows, dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = table["f0"].to_numpy(), table["f1"].to_numpy()
    image, text = column_to_vectors(table["image"]), column_to_vectors(table["text"])
    size = table.num_rows // draws
    return uids.reshape(draws, size), image.reshape(draws, size, -1), text.reshape(draws, size, -1)


def with_content(uids: np.ndarray, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Mix a hash of the embeddings' bits into uids, so that two are equal only where both agree.

    The draw holds the old pair of a row whose content changed since. A batch that took it for the row itself would
    lack the row's own pair.

    Args:
        uids: `UID_DTYPE` records `[..., n]`.
        image: float16 `[..., n, d]`.
        text: likewise.
    """
    mixed = uids.copy()
    for vectors in (image, text):
        spare = -vectors.shape[-1] % 4  # four float16 are one 64-bit word
        padded = np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, spare)]) if spare else vectors
        words = np.ascontiguousarray(padded).view(np.uint64)
        random = np.random.default_rng(0).integers(0, 2**63, words.shape[-1], dtype=np.uint64)
        odd = random * np.uint64(2) + np.uint64(1)
        mixed["f0"] = mixed["f0"] * np.uint64(0x9E3779B97F4A7C15) + words @ odd
    return mixed


def _uids(lake: Lake, embeddings: str, shard: str) -> tuple[np.ndarray, np.ndarray]:
    table = lake.read(embeddings, shard, ["f0", "f1"])
    return table["f0"].to_numpy(), table["f1"].to_numpy()
