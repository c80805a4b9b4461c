"""Near duplicates in an ordered set: the similarity of each row to the most similar row before it.

Here: the search. Not here: which rows, in which order, and where results are kept. The rule is that of SemDeDup
(arXiv 2303.09540), applied to the whole set instead of clusters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from selection.similarity.reduction import check_matrices, largest
from selection.similarity.streaming import resident

CHUNK_ROWS = 65_536
_BLOCK = {
    "cpu": 16_384,
    "cuda": 262_144,
}  # larger blocks read earlier rows less often; smaller ones lose less on interruption
_SPAN = {"cpu": 2, "cuda": 64}  # chunks of earlier rows that one pair has, so that workers share a block


class Pair(NamedTuple):
    """A block of rows, and earlier rows that it is compared with.

    Attributes:
        start, stop: the block's first row, and the one after its last.
        first, last: likewise of the others; `first` is a multiple of `CHUNK_ROWS`.
    """

    start: int
    stop: int
    first: int
    last: int


Nearest = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Of each row of a block, the largest similarity to another row, and that row; −inf and −1 where there is none."""


def nearest_before(
    vectors: NDArray[np.float16],
    *,
    device: torch.device,
    done: int = 0,
    block: int | None = None,
    compute: Callable[[Iterator[Pair]], Iterator[Nearest]] | None = None,
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.int64]]]:
    """Compute max_{j<i} v_i · v_j for every row i, and the j that attains it, the lowest of equals.

    Every pair is compared once. A row's bits depend only on the rows before it, not on `done`, `block` or threads.
    Memory holds a block, a chunk of `CHUNK_ROWS` rows and the tiles, whatever n is.

    Args:
        vectors: float16 `[n, d]`, unit norm, in order; may be memory-mapped.
        device: computes the products.
        done: number of rows to skip, because an interrupted run has their results.
        block: rows to compare with all earlier rows at a time; the default suits the device.
        compute: yields `compare` of each pair, in order, such as by several workers; by default here.

    Yields:
        For each block its slice of rows, their values, float32, and their j, int64. Row 0 has −1 and −1.

    Raises:
        ValueError: vectors are not float16 `[n, d]`, or not finite.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise ValueError(f"vectors must be float16 [n, d], not {vectors.dtype} {list(vectors.shape)}")
    pairs = list(_pairs(len(vectors), done, block or _BLOCK[device.type], _SPAN[device.type] * CHUNK_ROWS))
    found = map(partial(compare, vectors, device=device), pairs) if compute is None else compute(iter(pairs))
    for (start, stop), some in groupby(zip(pairs, found, strict=True), lambda one: one[0][:2]):
        value = np.full(stop - start, -np.inf, np.float32)
        index = np.full(stop - start, -1, np.int64)
        for _, (higher, place) in some:  # earlier rows first, so that of equals the lowest stays
            better = higher > value
            value[better], index[better] = higher[better], place[better]
        value[index < 0] = -1.0
        yield slice(start, stop), value, index


def _pairs(rows: int, done: int, block: int, span: int) -> Iterator[Pair]:
    for start in range(done, rows, block):
        stop = min(start + block, rows)
        for first in range(0, stop, span):
            yield Pair(start, stop, first, min(first + span, stop))


@torch.no_grad()
def compare(vectors: NDArray[np.float16], pair: Pair, *, device: torch.device) -> Nearest:
    """Compute max_j v_i · v_j for every row i of a block, over the rows j < i that the pair has.

    Args:
        vectors: float16 `[n, d]`, unit norm, in order; may be memory-mapped.
        pair: the block, and the rows that it is compared with.
        device: computes the products.

    Raises:
        ValueError: a row of the block is not finite.
    """

    def read(at: slice) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(vectors[pair.first + at.start : pair.first + at.stop]))]

    rows = torch.from_numpy(np.array(vectors[pair.start : pair.stop])).to(device)
    check_matrices(vectors=rows)
    value = torch.full((len(rows),), -torch.inf, device=device)
    index = torch.full((len(rows),), -1, dtype=torch.int64, device=device)
    # Chunks start at multiples of a tile's width, so a column has the same place in its tile in every block.
    for some, (columns,) in resident(pair.last - pair.first, CHUNK_ROWS, device, read):
        before = None if pair.first + some.stop <= pair.start else pair.start - pair.first - some.start
        found, place = largest(rows, columns, signed=True, before=before)
        better = found > value
        value = torch.where(better, found, value)
        index = torch.where(better, place + pair.first + some.start, index)
    return value.cpu().numpy(), index.cpu().numpy()


@torch.no_grad()
def count_similar(rows: torch.Tensor, others: torch.Tensor, least: float) -> torch.Tensor:
    """Count for each row the others with a cosine of `least` or more, int64 `[n]`.

    Args:
        rows: `[n, d]` float16, bfloat16 or float32, unit norm.
        others: `[m, d]` of the same dtype, unit norm.
        least: The smallest cosine that counts.

    Raises:
        ValueError: an argument is empty or not finite, or they do not fit.
    """
    check_matrices(rows=rows, others=others)
    count = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for part in others.split(4_096):
        count += (rows.float() @ part.float().T >= least).sum(dim=1)
    return count
