"""Draw the reference negatives: K draws of B pool rows by a keyed hash of the uid.

NumPy only. Here: which rows are drawn. Not here: their embeddings and files.

A draw keeps the B rows with the smallest hashes of (seed, draw, uid), so it does not depend on the order, shards or
workers in which the pool is read. As the pool grows, a row leaves a draw only when a new row displaces it.

A uid is two uint64, f0 and f1 (its first and last 16 hexadecimal digits). A uid that the pool holds several times
counts once, as the copy with the lowest (shard, row).
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from core.uids import UID_DTYPE

# A candidate: its hash in the draw, its uid, and its location in the pool.
CANDIDATE = np.dtype([("hash", "u8"), ("f0", "u8"), ("f1", "u8"), ("shard", "i8"), ("row", "i8")])

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


def keyed_hash(seed: int, draw: int, f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Compute a 64-bit hash of (seed, draw, uid).

    h = 0; for each word w of (seed, draw, f0, f1): h = mix((h + γ) ^ w), where γ is 2^64 over the golden ratio and mix
    the finaliser of splitmix64, a bijection in which each input bit flips each output bit with probability near 1/2.

    Args:
        seed: any integer; taken modulo 2^64.
        draw: number of the draw, from 0.
        f0: uint64 [n].
        f1: uint64 [n].

    Returns:
        uint64 [n].
    """
    h = np.zeros(1, dtype=np.uint64)
    for word in (np.uint64(seed % 2**64), np.uint64(draw), f0, f1):
        h = _mix((h + _GAMMA) ^ word)
    return h


def _mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def candidates(
    f0: NDArray[np.uint64],
    f1: NDArray[np.uint64],
    *,
    draws: int,
    size: int,
    seed: int,
    shard: int = 0,
) -> NDArray[np.void]:
    """Return the rows of one shard that may be among the negatives: the B smallest of each draw.

    Args:
        f0: uint64 [n], first half of the rows' uids.
        f1: uint64 [n], second half.
        draws: K, at least 1.
        size: B, at least 1.
        seed: fixes the draws.
        shard: number of this shard, copied into the result.

    Returns:
        `CANDIDATE` records [K, min(B, different uids)], each draw in ascending order of (hash, f0, f1).

    Raises:
        ValueError: f0 and f1 are not uint64 of one length, or draws or size is below 1.
    """
    for name, value in (("draws", draws), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    _check_uids(f0, f1)
    _, distinct = np.unique(_joined(f0, f1), return_index=True)
    chosen = np.empty((draws, min(size, len(distinct))), dtype=CANDIDATE)
    pool = np.empty(len(distinct), dtype=CANDIDATE)
    pool["f0"], pool["f1"], pool["shard"], pool["row"] = f0[distinct], f1[distinct], shard, distinct
    for draw in range(draws):
        pool["hash"] = keyed_hash(seed, draw, pool["f0"], pool["f1"])
        chosen[draw] = _smallest(pool, size)
    return chosen


def merge(shards: Iterable[NDArray[np.void]], size: int) -> NDArray[np.void]:
    """Merge the candidates of all shards into the reference negatives; memory holds one set of draws.

    Args:
        shards: results of `candidates`, or of `merge`, with the same draws, seed and a size of at least `size`.
        size: B.

    Returns:
        `CANDIDATE` records [K, B] in ascending order of (hash, f0, f1); B is the number of rows in the pool when
        that is smaller than `size`.

    Raises:
        ValueError: there are no shards, or no rows in them, or their numbers of draws differ.
    """
    best: NDArray[np.void] | None = None
    for shard in shards:
        if best is None:
            best = shard[:, :size].copy()
            continue
        if len(shard) != len(best):
            raise ValueError(f"shards differ in their number of draws: {len(best)} and {len(shard)}")
        best = np.stack([_smallest(np.concatenate(pair), size) for pair in zip(best, shard, strict=True)])
    if best is None or best.shape[1] == 0:
        raise ValueError("shards hold no rows, so there are no negatives to draw")
    return best


def membership(draws: NDArray[np.void], f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows are in which draw.

    Args:
        draws: records [K, B] with fields f0 and f1, such as `merge` returns.
        f0: uint64 [n], first half of the rows' uids.
        f1: uint64 [n], second half.

    Returns:
        bool [K, n].

    Raises:
        ValueError: f0 and f1 are not uint64 of one length.
    """
    drawn, rows, uids = _numbered(draws, f0, f1)
    inside = np.zeros(uids, dtype=bool)
    result = np.empty((len(draws), len(rows)), dtype=bool)
    for k, draw in enumerate(drawn):
        inside[draw] = True
        result[k] = inside[rows]
        inside[draw] = False
    return result


def outside(draws: NDArray[np.void], f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows of the draws are not among some rows.

    Args:
        draws: records [K, B] with fields f0 and f1, such as `merge` returns.
        f0: uint64 [n], first half of the rows' uids.
        f1: uint64 [n], second half.

    Returns:
        bool [K, B].

    Raises:
        ValueError: f0 and f1 are not uint64 of one length.
    """
    drawn, rows, uids = _numbered(draws, f0, f1)
    inside = np.zeros(uids, dtype=bool)
    inside[rows] = True
    return ~inside[drawn]


def _numbered(
    draws: NDArray[np.void], f0: NDArray[np.uint64], f1: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Number the uids of draws and rows from 0: the numbers of the draws [K, B], of the rows [n], and how many."""
    _check_uids(f0, f1)
    every = np.concatenate([_joined(draws["f0"].ravel(), draws["f1"].ravel()), _joined(f0, f1)])
    uids, number = np.unique(every, return_inverse=True)
    return number[: draws.size].reshape(draws.shape), number[draws.size :], len(uids)


def _smallest(pool: NDArray[np.void], size: int) -> NDArray[np.void]:
    """Return the first `size` candidates in order, each uid once."""
    if len(pool) > 2 * size:  # drop most rows before the sort; 2 · size leaves room for repeated uids
        pool = pool[pool["hash"] <= np.partition(pool["hash"], 2 * size)[2 * size]]
    pool = pool[np.lexsort([pool[field] for field in ("row", "shard", "f1", "f0", "hash")])]
    repeated = (pool["f0"][1:] == pool["f0"][:-1]) & (pool["f1"][1:] == pool["f1"][:-1])
    return pool[np.concatenate([[True], ~repeated])[: len(pool)]][:size]


def _joined(f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.void]:
    joined = np.empty(len(f0), dtype=UID_DTYPE)
    joined["f0"], joined["f1"] = f0, f1
    return joined


def _check_uids(f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> None:
    for name, half in (("f0", f0), ("f1", f1)):
        if half.dtype != np.uint64 or half.ndim != 1 or len(half) != len(f0):
            raise ValueError(
                f"{name} must be uint64 of shape [n], the same n as f0, not {half.dtype} {list(half.shape)}"
            )
