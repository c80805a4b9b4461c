"""The one tiled reduction over similarities s = rows · columnsᵀ, and its operations.

Here: the three reductions that scores use (`log_sum_exp`, `log_sum_exp_both`, `largest`), the choice between kernels
and plain torch, the tiles in plain torch, and the checks of operands. Not here: the CUDA kernels (`triton_reduction`),
and the scores (`clip_loss`, `norm_sim`).

A matrix product may round differently when its shape changes, so every tile has the same shape and the last one is
padded with zeros. A row's result then depends only on the row and the columns, not on its neighbours.
"""

import math
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Arithmetic = Literal["float32", "bfloat16"]
"""Operands of products on CPU: as stored, or rounded to bfloat16 (see `Tiles`)."""

# Rows and columns of a tile, by the capability of the CPU as torch names it, or for CUDA. On CPU a tile of columns and
# its products fit the caches from one pass to the next; AVX2 has fewer registers, and wider tiles make up for them. On
# CUDA launches are the cost, so tiles are large. A table and not a measurement at run time, because another shape may
# round differently (docs/decisions/0004-engine.md).
_TILES = {"AVX512": (480, 512), "AVX2": (960, 1024), "cuda": (4096, 8192)}
_BFLOAT16_TILE = (960, 512)  # tall, because converting the columns costs more relative to the product

_GROUP = 16  # tiles of rows whose partial column sums are in memory

# Powers of two of a fixed shift: the highest, with room for sums below float32's 2^128; and the lowest total that
# loses nothing, with room for 2^16 terms below float32's 2^-126.
_HIGHEST, _LOWEST = 110, 86

# Use oneDNN for float32 products where torch has it: on no kind of CPU it is slower than MKL's `torch.mm`, on some half
# as slow, and unlike OpenBLAS it gives a row the same bits wherever it is in a tile (docs/decisions/0004-engine.md).
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    first: Tensor,
    *,
    temperature: float,
    arithmetic: Arithmetic = "float32",
) -> Tensor:
    """Compute τ · log( exp(first_i/τ) + Σ_j exp(s_ij/τ) ) for every row i.

    Args:
        rows: [n, d] float16, bfloat16 or float32.
        columns: [m, d], likewise; m may be 0.
        first: float32 [n], one more term of each sum; -inf for none.
        temperature: τ.
        arithmetic: see `Tiles`.

    Returns:
        float64 [n].
    """
    if (kernels := _kernels(rows, arithmetic)) and len(columns):
        return _add_first(kernels.log_sum_exp(rows, columns, temperature=temperature), first, temperature)
    if (shift := FixedShift.of(temperature)) is None:
        return _by_running_maximum(rows, columns, first, temperature, arithmetic)
    total = shift.power(first)

    def task(tiles: Tiles, at: slice) -> None:
        sums = torch.zeros(tiles.height, dtype=torch.float64, device=rows.device)
        for _, powers in tiles.powers(tiles.rows(rows, at), columns, shift):
            sums += powers.sum(1)
        total[at] += sums[: at.stop - at.start]

    for_each_tile(len(rows), rows, task, arithmetic)
    return _checked(total, rows, columns, first, shift, arithmetic)


def log_sum_exp_both(
    rows: Tensor, columns: Tensor, *, temperature: float, arithmetic: Arithmetic = "float32"
) -> tuple[Tensor, Tensor]:
    """Compute τ · log Σ exp(s/τ) along rows and along columns, where possible in one pass over the similarities.

    Args:
        rows: [n, d] float16, bfloat16 or float32.
        columns: [m, d], likewise, not empty.
        temperature: τ.
        arithmetic: see `Tiles`.

    Returns:
        For the rows, float64 [n]; for the columns, float64 [m].
    """
    if kernels := _kernels(rows, arithmetic):
        return kernels.log_sum_exp_both(rows, columns, temperature=temperature)
    none = torch.full((max(len(rows), len(columns)),), -math.inf, device=rows.device)
    sides = (rows, columns, none[: len(rows)]), (columns, rows, none[: len(columns)])
    if (shift := FixedShift.of(temperature)) is None:
        by_row, by_column = (_by_running_maximum(*side, temperature, arithmetic) for side in sides)
        return by_row, by_column
    by_row, by_column = (torch.zeros(len(side[0]), dtype=torch.float64, device=rows.device) for side in sides)
    height, _ = tile_shape(rows, arithmetic)
    for some in spans(len(rows), _GROUP * height):
        # Tiles of rows finish in any order, so their partial column sums are kept and then added in a fixed order.
        parts = by_column.new_zeros(_GROUP, len(columns))

        def task(tiles: Tiles, at: slice, some: slice = some, parts: Tensor = parts) -> None:
            of_columns = parts[at.start // height]
            sums = by_row.new_zeros(height)
            for where, powers in tiles.powers(tiles.rows(rows[some], at), columns, shift):
                sums += powers.sum(1)
                of_columns[where] = powers[: at.stop - at.start].sum(0)[: where.stop - where.start].double()
            by_row[some][at] = sums[: at.stop - at.start]

        for_each_tile(some.stop - some.start, rows, task, arithmetic)
        by_column += parts.sum(0)
    by_row, by_column = (
        _checked(total, *side, shift, arithmetic) for total, side in zip((by_row, by_column), sides, strict=True)
    )
    return by_row, by_column


def _checked(
    total: Tensor, rows: Tensor, columns: Tensor, first: Tensor, shift: "FixedShift", arithmetic: Arithmetic
) -> Tensor:
    """Return τ · log Σ exp(s/τ) for totals of powers, computed again where the fixed shift lost terms or overflowed."""
    result = shift.log(total)
    if len(lost := (~shift.holds(total, len(columns))).nonzero()[:, 0]):
        result[lost] = _by_running_maximum(rows[lost], columns, first[lost], shift.temperature, arithmetic)
    return result


def _by_running_maximum(
    rows: Tensor, columns: Tensor, first: Tensor, temperature: float, arithmetic: Arithmetic
) -> Tensor:
    """Compute `log_sum_exp` for any finite similarities and temperature, at the cost of more passes over a tile."""
    result = torch.empty(len(rows), dtype=torch.float64, device=rows.device)

    def task(tiles: Tiles, at: slice) -> None:
        start = torch.full((tiles.height,), -math.inf, device=rows.device)
        start[: at.stop - at.start] = first[at]
        sums = LogSumExp(start, temperature, torch.empty_like(tiles.products))
        for _, similarities in tiles.similarities(tiles.rows(rows, at), columns):
            sums.update(similarities)
        result[at] = sums.value()[: at.stop - at.start]

    for_each_tile(len(rows), rows, task, arithmetic)
    return result


def largest(
    rows: Tensor,
    columns: Tensor,
    *,
    arithmetic: Arithmetic = "float32",
    signed: bool = False,
    before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute max_j |s_ij|, or max_j s_ij, for every row i, and the j that attains it, the lowest of equals.

    In bfloat16 arithmetic rounded similarities decide j; the value is the similarity to j in float32.

    Args:
        rows: [n, d] float16, bfloat16 or float32.
        columns: [m, d], likewise, not empty.
        arithmetic: see `Tiles`.
        signed: maximise s instead of |s|.
        before: with `signed`, row i is compared only with columns j < before + i; None for all. A row without
            columns has value -inf and j = 0.

    Returns:
        The values float32 [n], and j int64 [n].
    """
    if before is not None and not signed:
        raise ValueError("before needs signed similarities")
    if kernels := _kernels(rows, arithmetic):
        return kernels.largest(rows, columns, signed=signed, before=before)
    value = torch.empty(len(rows), device=rows.device)
    index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)

    def task(tiles: Tiles, at: slice) -> None:
        best = Largest(tiles.height, rows.device, signed=signed)
        tile = tiles.rows(rows, at)
        seen = columns if before is None else columns[: max(before + at.stop - 1, 0)]
        for where, similarities in tiles.similarities(tile, seen):
            if before is not None and where.stop > before + at.start:  # the tile crosses the diagonal j = before + i
                unseen = torch.ones_like(similarities, dtype=torch.bool).triu_(before + at.start - where.start)
                similarities.masked_fill_(unseen, -math.inf)
            best.update(similarities, where)
        if tiles.rounds:
            found = row_dots(tile, columns[best.index])
            best.value = torch.where(best.value == -math.inf, best.value, found if signed else found.abs())
        value[at] = best.value[: at.stop - at.start]
        index[at] = best.index[: at.stop - at.start]

    for_each_tile(len(rows), rows, task, arithmetic)
    return value, index


def _kernels(like: Tensor, arithmetic: Arithmetic) -> ModuleType | None:
    """Return the CUDA kernels for operands that they support, or None to compute with tiles in plain torch."""
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(f"arithmetic must be one of {', '.join(get_args(Arithmetic))}, not {arithmetic!r}")
    if like.device.type != "cuda" or like.dtype == torch.float32:
        return None
    return _triton(like.device)


@cache
def _triton(device: torch.device) -> ModuleType | None:
    """Return the kernels if Triton is installed and the device has enough shared memory for their block sizes."""
    if find_spec("triton") is None:
        return None
    from selection.similarity import triton_reduction

    enough = torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= triton_reduction.SHARED_MEMORY
    return triton_reduction if enough else None


def _add_first(sums: Tensor, first: Tensor, temperature: float) -> Tensor:
    return temperature * torch.logaddexp(sums / temperature, first.double() / temperature)


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
            # A sum is finite only if all terms are; for halves it is twenty times faster than isfinite.
            if not all(torch.isfinite(part.float().sum()) for part in rows.split(2048)):
                raise ValueError(f"{name} holds NaN or infinity")


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each row of left [m, d] with the same row of right ([m, d] or [d]), float32 [m]."""
    return (left.float() * right.float()).sum(dim=1)


def processor(device: torch.device) -> str:
    """Return the kind of processor, which decides the last bits of a result: instructions and library, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    library = "oneDNN" if _ONEDNN else "torch.mm"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {library}"


def tile_shape(like: Tensor, arithmetic: Arithmetic = "float32") -> tuple[int, int]:
    """Return rows and columns of a tile on the device of an operand."""
    if like.device.type != "cpu":
        return _TILES["cuda"]
    if arithmetic == "bfloat16":
        return _BFLOAT16_TILE
    return _TILES.get(torch.backends.cpu.get_cpu_capability(), _TILES["AVX2"])


class Tiles:
    """Tiles of a matrix and of similarities for one device, dtype and embedding width.

    On CPU, arithmetic "float32" widens the operands to float32. "bfloat16" rounds them, and the products, to bfloat16,
    which is faster where the CPU has the instructions. To round small numbers only, the mean c of the first columns is
    subtracted first, and its product added in float32: s = r·c + r·(u - c). On CUDA operands stay as stored, and
    products accumulate in float32.

    Args:
        like: any of the operands; determines device, dtype and width.
        arithmetic: "float32" or "bfloat16".
    """

    def __init__(self, like: Tensor, arithmetic: Arithmetic = "float32") -> None:
        on_cpu = like.device.type == "cpu"
        self.rounds = on_cpu and arithmetic == "bfloat16"
        self.height, self.width = tile_shape(like, arithmetic)
        dtype = torch.float32 if on_cpu else like.dtype
        self._columns = like.new_empty(self.width, like.shape[-1], dtype=dtype)
        # Scratch of a tile's size, which operations may overwrite.
        self.products = torch.empty(self.height, self.width, device=like.device)

    def rows(self, matrix: Tensor, at: slice) -> Tensor:
        """Return rows `at`, at most `height`, of matrix [n, d] as a tile [height, d], padded with zeros."""
        return self._fill(self._columns.new_empty(self.height, matrix.shape[1]), matrix[at])

    def similarities(self, tile: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Multiply a row tile with the rows of matrix [n, d].

        Yields:
            A slice of columns, and their similarities [height, columns] in float32, which operations may overwrite.
        """
        for at, products in self._multiply(tile, matrix, 1.0, 0.0):
            yield at, products[:, : at.stop - at.start]

    def powers(self, tile: Tensor, matrix: Tensor, shift: "FixedShift") -> Iterator[tuple[slice, Tensor]]:
        """Compute powers of two of the shifted similarities of a row tile and the rows of matrix [n, d].

        Yields:
            A slice of columns, and `shift.power` of their similarities in a whole tile [height, width], float32. What
            the last slice does not cover is 0, so that a sum takes the same SIMD lanes for every row.
        """
        for at, products in self._multiply(tile, matrix, shift.scale, -shift.scale * shift.top):
            products[:, at.stop - at.start :] = -math.inf
            yield at, products.exp2_()

    def _multiply(self, tile: Tensor, matrix: Tensor, scale: float, offset: float) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of columns and scale · s + offset in a whole tile [height, width] of float32."""
        halves = not self.rounds and tile.dtype != torch.float32  # scaled after the product, for their bits are few
        tile = tile if halves or scale == 1 else tile * scale
        bias = self.products.new_full((self.width,), offset)
        if self.rounds and len(matrix):
            centre = matrix[: self.width].float().mean(0)
            common, rounded = row_dots(tile, centre)[:, None] + offset, tile.bfloat16()
        for at in spans(len(matrix), self.width):
            columns = self._fill(self._columns, matrix[at])
            products = self.products
            if self.rounds:
                residuals = torch.mm(rounded, columns.sub_(centre).bfloat16().T)
                products.copy_(residuals).add_(common)
            elif halves:  # without out_dtype torch rounds the product of halves to half
                torch.mm(tile, columns.T, out_dtype=torch.float32, out=products)
                if scale != 1:
                    products.mul_(scale).add_(offset)
            elif columns.is_cpu and _ONEDNN:
                products = torch.ops.mkldnn._linear_pointwise(tile, columns, bias, "none", [], "")
            else:
                torch.addmm(bias, tile, columns.T, out=products)
            yield at, products

    @staticmethod
    def _fill(buffer: Tensor, rows: Tensor) -> Tensor:
        buffer[: len(rows)] = rows
        buffer[len(rows) :] = 0
        return buffer


def spans(count: int, step: int) -> list[slice]:
    """Return slices of length `step` that cover range(count); the last may be shorter."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def for_each_tile(
    count: int, like: Tensor, task: Callable[[Tiles, slice], None], arithmetic: Arithmetic = "float32"
) -> None:
    """Call task(tiles, at) for each tile of `count` rows.

    On CPU each thread handles whole tiles by itself. The passes over a tile are too short to synchronise threads after
    each, and splitting a pass among threads could change a row's bits.

    Args:
        count: number of rows.
        like: an operand; determines device, dtype and width.
        task: handles the rows `at`; may use `tiles` freely, and writes results for those rows only.
        arithmetic: arithmetic of the tiles.
    """
    height, _ = tile_shape(like, arithmetic)
    todo = iter(spans(count, height))

    def work() -> None:
        tiles = Tiles(like, arithmetic)
        for at in todo:  # threads share this iterator; its steps are atomic
            task(tiles, at)

    def work_alone() -> None:
        torch.set_num_threads(1)  # for operations of this thread
        torch.set_flush_denormal(True)  # likewise; numbers below 2^-126 slow every operation on them
        with torch.no_grad():  # a setting of the thread, too
            work()

    if like.device.type != "cpu":
        work()
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work_alone) for _ in range(min(threads, -(-count // height)))]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # threads started later inherit it


@dataclass(frozen=True)
class FixedShift:
    """Powers 2^(scale · (s - top)) = exp((s - top)/τ) of similarities s in [-1, 1], which need no running maximum.

    The shift is a constant of τ, so that a row's terms do not depend on other rows. It is low enough for powers of
    s = -1 to be normal numbers where float32 has the range for it, and high enough for s = 1 not to overflow.

    Attributes:
        temperature: τ.
        scale: log2(e) / τ.
        top: the similarity whose power is 1.
    """

    temperature: float
    scale: float
    top: float

    @classmethod
    def of(cls, temperature: float) -> "FixedShift | None":
        """Return the shift for τ, or None if most rows would lose terms because τ is below 0.0074."""
        scale = math.log2(math.e) / temperature
        top = max(0.0, 1 - _HIGHEST / scale)
        return cls(temperature, scale, top) if top - _LOWEST / scale <= 0 else None

    def power(self, similarities: Tensor) -> Tensor:
        """Return the powers of any similarities, float64 of the same shape."""
        return (self.scale * (similarities.double() - self.top)).exp2()

    def log(self, total: Tensor) -> Tensor:
        """Return τ · log Σ exp(s/τ) for totals of powers, float64 of the same shape."""
        return self.top + total.log2() / self.scale

    def holds(self, total: Tensor, terms: int) -> Tensor:
        """Return which totals of so many terms are finite, and so large that terms below float32's range add nothing.

        A power below 2^-126 may count as 0. So many of them are less than 2^-24 of a total that holds.
        """
        return torch.isfinite(total) & (total >= terms * 2.0 ** (24 - 126))


class LogSumExp:
    """τ · log Σ exp(s/τ) along the rows of the similarities, without overflow for any finite s.

    A running maximum is subtracted from the exponents. The sum is of powers of two, because exp2 is cheaper than exp.

    Args:
        first: float32 [m], one more term of each sum; -inf for none.
        temperature: τ.
        scratch: float32 [m, width of a tile], overwritten.
    """

    def __init__(self, first: Tensor, temperature: float, scratch: Tensor) -> None:
        self._top = first.clone()
        self._total = torch.isfinite(first).double()
        self._scale = math.log2(math.e) / temperature
        self._scratch = scratch

    def update(self, tile: Tensor) -> None:
        """Add the terms of a tile of similarities [m, any]."""
        top = torch.maximum(self._top, tile.amax(1))
        terms = self._scratch
        torch.sub(tile, top[:, None], out=terms[:, : tile.shape[1]])
        # Sum whole, contiguous tiles even when the last is ragged, so that SIMD lanes are the same for every row.
        terms[:, tile.shape[1] :] = -math.inf
        added = terms.mul_(self._scale).exp2_().sum(1)
        # The total so far was relative to the old maximum: rescale it to the new one.
        self._total = self._total * ((self._top - top).double() * self._scale).exp2() + added
        self._top = top

    def value(self) -> Tensor:
        """Return τ · log Σ exp(s/τ), float64 [m]."""
        return self._top.double() + self._total.log2() / self._scale


class Largest:
    """max |s|, or max s, and its column, the lowest of equals, for each row of the similarities.

    Args:
        rows: number of rows m of a tile.
        device: of the tiles.
        signed: maximise s instead of |s|.
    """

    def __init__(self, rows: int, device: torch.device, *, signed: bool = False) -> None:
        self.value = torch.full((rows,), -math.inf, device=device)
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)
        self._signed = signed

    def update(self, tile: Tensor, at: slice) -> None:
        """Update with the similarities [m, columns at] of a tile."""
        value = tile.amax(1) if self._signed else torch.maximum(tile.amax(1), tile.amin(1).neg_())
        better = (value > self.value).nonzero().squeeze(1)
        if len(better):  # few after the first tiles, so the search for a column is rare
            self.value[better] = value[better]
            found = tile[better] if self._signed else tile[better].abs_()
            self.index[better] = found.argmax(1) + at.start


class PowerSum:
    """(Σ |s|^p)^(1/p) for each row of the similarities: the reference for the second moment.

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
        """Return (Σ |s|^p)^(1/p), float64 [m]."""
        return self._total ** (1 / self._p)
