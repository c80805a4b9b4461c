"""The one tiled reduction over similarities s = queries · columnsᵀ, and its three operations.

Here belong the tiles, the operations that consume them (sum of exp, largest |s|, power sum) and the checks of
their operands. What the sums mean belongs to `clip_loss` and `target_similarity`.

A matrix product may round differently when its shape changes, so every tile has the same shape, the last one
being padded with zeros: a row's result then depends on the row and the columns alone, not on its neighbours.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows and columns of a tile. On CPU a tile of products and its exponentials (0.5 MB each) stay in cache between
# one pass and the next. Torch splits an elementwise pass of this size over at most 4 threads, and a thread's
# share must end on a whole vector, or the scalar code at its end rounds differently: 240 * 512 / 1, 2, 3 and 4
# are all multiples of 16. On CUDA launches are what costs, so tiles are large.
TILE = {"cpu": (240, 512), "cuda": (4096, 8192)}


def check_matrices(**matrices: Tensor) -> None:
    """Raise ValueError, naming the argument, unless all are embeddings that can be multiplied together.

    Args:
        **matrices: by argument name, [..., d] tensors of float16, bfloat16 or float32: not empty, finite, and of
            one dtype, device and width d.
    """
    (first, like), *_ = matrices.items()
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor) or matrix.dtype not in DTYPES:
            raise ValueError(f"{name} must be a float16, bfloat16 or float32 tensor")
        if matrix.numel() == 0:
            raise ValueError(f"{name} is empty: its shape is {tuple(matrix.shape)}")
        for what in ("dtype", "device"):
            if getattr(matrix, what) != getattr(like, what):
                mine, other = getattr(matrix, what), getattr(like, what)
                raise ValueError(f"{name} has {what} {mine}, but {first} has {other}: convert one")
        if matrix.shape[-1] != like.shape[-1]:
            raise ValueError(
                f"{name} has embeddings of width {matrix.shape[-1]}, but {first} of width {like.shape[-1]}"
            )
    for name, matrix in matrices.items():
        for rows in matrix if matrix.ndim == 3 else [matrix]:
            # A sum is finite only if all its terms are, and is found twenty times faster than isfinite in halves.
            if not all(torch.isfinite(part.float().sum()) for part in rows.split(2048)):
                raise ValueError(f"{name} holds NaN or infinity")


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each row of left [m, d] with the same row of right ([m, d] or [d]), as float32 [m]."""
    return (left.float() * right.float()).sum(dim=1)


class Tiles:
    """Tiles of a matrix and of similarities for one device, dtype and embedding width, in reused buffers.

    On CPU operands are widened to float32; on CUDA they stay as stored. Products accumulate in float32 either way.

    Args:
        like: any of the operands; gives device, dtype and width.
    """

    def __init__(self, like: Tensor) -> None:
        self.height, self.width = TILE["cpu" if like.device.type == "cpu" else "cuda"]
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self._columns = like.new_empty(self.width, like.shape[-1], dtype=dtype)
        self._products = torch.empty(self.height, self.width, device=like.device)
        self.scratch = torch.empty_like(self._products)

    def rows(self, matrix: Tensor, index: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which rows, tile [height, d]) for matrix [n, d] or, given an index, for matrix[index].

        The tile is one buffer, filled anew at each step; beyond the last row it holds zeros.
        """
        return self._fill(self._columns.new_empty(self.height, matrix.shape[1]), matrix, index)

    def similarities(self, tile: Tensor, matrix: Tensor, index: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which columns, similarities [height, m] in float32) of a row tile with matrix [n, d], tile by tile.

        Operations may overwrite what they are given.
        """
        for at, columns in self._fill(self._columns, matrix, index):
            if columns.dtype == torch.float32:
                torch.mm(tile, columns.T, out=self._products)
            else:  # without out_dtype the product of halves would be rounded to half
                torch.mm(tile, columns.T, out_dtype=torch.float32, out=self._products)
            yield at, self._products[:, : at.stop - at.start]

    @staticmethod
    def _fill(buffer: Tensor, matrix: Tensor, index: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        count = len(matrix) if index is None else len(index)
        for start in range(0, count, len(buffer)):
            at = slice(start, min(start + len(buffer), count))
            buffer[: at.stop - start] = matrix[at] if index is None else matrix[index[at]]
            buffer[at.stop - start :] = 0
            yield at, buffer


class LogSumExp:
    """τ · log Σ exp(s/τ) along one dimension of the similarities, exact for any finite s.

    A running maximum is taken out of the exponent; powers of two are summed, because exp2 is the cheaper.

    Args:
        first: float32 [m], a term that each sum starts with; -inf for none.
        temperature: τ.
        dim: 1 to sum along the rows of a tile, 0 along its columns.
        scratch: float32 of a tile's shape; overwritten.
    """

    def __init__(self, first: Tensor, temperature: float, dim: int, scratch: Tensor) -> None:
        self._top = first.clone()
        self._total = torch.isfinite(first).double()
        self._scale = math.log2(math.e) / temperature
        self._dim = dim
        self._scratch = scratch

    def update(self, tile: Tensor, at: slice = slice(None)) -> None:
        """Add the terms of a tile of similarities to the sums at the given rows (dim 1) or columns (dim 0)."""
        height, width = tile.shape
        old = self._top[at]
        top = torch.maximum(old, tile.amax(self._dim))
        terms = self._scratch
        torch.sub(tile, top.unsqueeze(self._dim), out=terms[:height, :width])
        # Whole and contiguous even when ragged, so that vectors fall alike for every row.
        terms[height:] = -math.inf
        terms[:, width:] = -math.inf
        added = terms.mul_(self._scale).exp2_().sum(self._dim)[: len(top)]
        self._total[at] = self._total[at] * ((old - top).double() * self._scale).exp2() + added
        self._top[at] = top

    def value(self) -> Tensor:
        """τ · log Σ exp(s/τ), float64 [m]."""
        return self._top.double() + self._total.log2() / self._scale


class MaxAbs:
    """max |s| and its column, for each row of the similarities; of equal ones the lowest column.

    Args:
        rows: number of rows m of a tile.
        device: of the tiles.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.value = torch.full((rows,), -1.0, device=device)
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)

    def update(self, tile: Tensor, at: slice) -> None:
        """Take in a tile of similarities [m, columns at]."""
        value = torch.maximum(tile.amax(1), tile.amin(1).neg_())
        better = (value > self.value).nonzero().squeeze(1)
        if len(better):  # few after the first tiles, so the search for the column is rare
            self.value[better] = value[better]
            self.index[better] = tile[better].abs_().argmax(1) + at.start


class PowerSum:
    """(Σ |s|^p)^(1/p) for each row of the similarities: the brute force beside the second moment.

    Args:
        rows: number of rows m of a tile.
        p: exponent, > 0.
        device: of the tiles.
    """

    def __init__(self, rows: int, p: float, device: torch.device) -> None:
        self._p = p
        self._total = torch.zeros(rows, dtype=torch.float64, device=device)

    def update(self, tile: Tensor) -> None:
        """Add the terms of a tile of similarities [m, any]."""
        self._total += tile.abs_().pow_(self._p).sum(1)

    def value(self) -> Tensor:
        """(Σ |s|^p)^(1/p), float64 [m]."""
        return self._total ** (1 / self._p)
