"""Concept balance: common concepts are cut to a cap, rare ones stay.

NumPy only. Here: which rows stay. Not here: the concepts of a row, and their counts. Two forms: every row stays or goes
by itself with a probability (MetaCLIP, arXiv 2309.16671), or rows are taken greedily (CABS-DM, CVPR 2026).
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selection.scores.negatives import keyed_hash

# Draw number in the keyed hash; those of other uses are below or above (`distribution`, `sampling`).
_APART = 5 << 60


@dataclass(frozen=True)
class RowConcepts:
    """The concepts of n rows, one after the other.

    Attributes:
        concept: Numbers from 0 to d − 1, each at most once in a row, int64 of shape [total].
        starts: Place of each row's first concept, and at last the total, int64 of shape [n + 1].
        counts: n_c, the rows that have each concept, int64 of shape [d].
    """

    concept: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def of(self, row: int) -> NDArray[np.int64]:
        """Return the concepts of a row."""
        return self.concept[self.starts[row] : self.starts[row + 1]]


def chances(rows: RowConcepts, cap: int) -> NDArray[np.float64]:
    """Compute 1 − Π_{c∈C_j} (1 − t / max(t, n_c)) of each row, with t the cap; 0 for a row without concepts."""
    misses = 1 - cap / np.maximum(cap, rows.counts)
    chance = np.zeros(len(rows.starts) - 1)
    some = np.flatnonzero(np.diff(rows.starts))
    if len(some):
        chance[some] = 1 - np.multiply.reduceat(misses[rows.concept], rows.starts[some])
    return chance


def keep_by_chance(
    chance: NDArray[np.float64], f0: NDArray[np.uint64], f1: NDArray[np.uint64], *, seed: int
) -> NDArray[np.bool_]:
    """Return whether each row's keyed hash, as a number from 0 to 1, is below its chance."""
    uniform = (keyed_hash(seed, _APART, f0, f1) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    kept: NDArray[np.bool_] = uniform < chance
    return kept


def keep_greedily(
    rows: RowConcepts, f0: NDArray[np.uint64], f1: NDArray[np.uint64], *, cap: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Take the row with the largest gain until `count` are taken or no row has a gain; the smaller uid wins ties.

    h(j) = (1 / |C_j|) Σ_{c∈C_j, m_c<t} [(t − m_c) / t + 1 / n_c], with t the cap and m_c the taken rows that have c.
    Gains never rise, so a row is computed again only when it is the best by its last gain.

    Returns:
        Positions of the taken rows in order, int64, and their gains, float64.
    """
    taken = np.zeros(len(rows.counts), np.int64)

    def gain(row: int) -> float:
        own = rows.of(row)
        have = taken[own]
        parts = np.where(have < cap, (cap - have) / cap + 1 / rows.counts[own], 0.0)
        return float(parts.sum()) / len(own) if len(own) else 0.0

    ranked = np.lexsort((f1, f0)).tolist()
    heap = [(-gain(row), rank, row) for rank, row in enumerate(ranked)]
    heapq.heapify(heap)
    found: list[int] = []
    gains: list[float] = []
    while heap and len(found) < count:
        known, rank, row = heap[0]
        now = gain(row)
        if now < -known:
            heapq.heapreplace(heap, (-now, rank, row))
            continue
        if not now:
            break
        heapq.heappop(heap)
        found.append(row)
        gains.append(now)
        taken[rows.of(row)] += 1
    return np.array(found, np.int64), np.array(gains)
