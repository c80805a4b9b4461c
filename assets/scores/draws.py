"""Samples of the pool, and reference negatives as a table: drawing K draws of B pool rows, and reading them back.

A row of a draw is identified by its uid and its content, because a row whose content changed since the draw is another
row than the drawn one.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from assets.base.context import Snapshot
from assets.base.engines import Spread, map_here
from assets.base.results import Result
from core.uids import UID_DTYPE
from resources.lake.files import column_to_vectors, vectors_to_column
from resources.lake.gather import gather, read_rows

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


def draw(
    snapshot: Snapshot,
    embeddings: str,
    shards: Mapping[str, str],
    *,
    draws: int,
    batch_size: int,
    seed: int,
    spread: Spread | None = None,
) -> Result:
    """Draw reference negatives from the embeddings of some shards.

    Args:
        snapshot: the project's inputs.
        embeddings: key of the embeddings.
        shards: the shards, and their fingerprints.
        draws: K.
        batch_size: B; the whole pool where it has fewer rows.
        seed: of the keyed hash that chooses rows.
        spread: computes shards, such as `Step.map`; by default in this process.

    Returns:
        The rows of all draws in order, as `SCHEMA` has them, and the numbers that describe them.
    """
    from selection.scores.negatives import merge

    spread = spread or partial(map_here, snapshot)
    names = list(shards)
    drawn = ((embeddings, shard, number, draws, batch_size, seed) for number, shard in enumerate(names))
    chosen = merge(spread(_candidates, drawn), batch_size)
    draws, size = chosen.shape
    flat = chosen.ravel()
    image, text = _gathered(spread, snapshot, embeddings, ["image", "text"], names, flat)
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


def _candidates(
    snapshot: Snapshot, embeddings: str, shard: str, number: int, draws: int, size: int, seed: int
) -> np.ndarray:
    """Return the rows of one shard that may be among the negatives."""
    from selection.scores.negatives import candidates

    uids = snapshot.context.lake.read(embeddings, shard, ["f0", "f1"])
    return candidates(uids["f0"].to_numpy(), uids["f1"].to_numpy(), draws=draws, size=size, seed=seed, shard=number)


def _rows(
    snapshot: Snapshot, embeddings: str, columns: Sequence[str], shard: str, rows: np.ndarray
) -> list[np.ndarray]:
    """Read chosen rows of one shard's embeddings."""
    return read_rows(snapshot.context.lake, embeddings, columns, shard, rows)


def sample(
    snapshot: Snapshot,
    embeddings: str,
    shards: Sequence[str],
    *,
    size: int,
    seed: int,
    spread: Spread,
    columns: Sequence[str] = ("image",),
) -> tuple[np.ndarray, ...]:
    """Read the embeddings of a sample of the pool.

    Returns:
        The rows as `CANDIDATE` records `[n]`, whose shard is a position in `shards`, in an order that only the uids
        decide; and their embeddings, float16 `[n, d]` for each of `columns`.
    """
    from selection.scores.negatives import merge

    drawn = ((embeddings, shard, number, 1, size, seed) for number, shard in enumerate(shards))
    (chosen,) = merge(spread(_candidates, drawn), size)
    return chosen, *_gathered(spread, snapshot, embeddings, columns, shards, chosen)


def _gathered(
    spread: Spread,
    snapshot: Snapshot,
    embeddings: str,
    columns: Sequence[str],
    shards: Sequence[str],
    chosen: np.ndarray,
) -> list[np.ndarray]:
    return gather(
        snapshot.context.lake,
        embeddings,
        columns,
        shards,
        chosen["shard"],
        chosen["row"],
        spread=lambda parts: spread(_rows, ((embeddings, columns, *part) for part in parts)),
    )
