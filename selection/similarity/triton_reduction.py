"""The reductions over similarities as CUDA kernels, for float16 and bfloat16 embeddings.

Here: the kernels, their block sizes, and the merge of their partial results. `reduction` decides when to use them; its
functions of the same names document the results.

A program handles a block of rows and a span of columns and keeps the similarities in registers. Spans, blocks and the
order of every sum are fixed, and partial sums are merged without atomics, so a row's result depends only on the row and
the columns and is the same in every run. Block sizes are constants for the same reason, instead of being autotuned at
run time; `python -m benchmarks.gpu` times the alternatives.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Sizes(NamedTuple):
    """Block sizes of a kernel: rows and columns, embedding width of a step, warps, and steps loaded ahead."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


SIZES = Sizes(128, 256, 64, 8, 3)
SIZES_BOTH = Sizes(128, 128, 64, 8, 4)  # column sums need registers for two more numbers per similarity
ALTERNATIVES = [
    SIZES,
    SIZES_BOTH,
    Sizes(128, 256, 64, 8, 4),
    Sizes(128, 128, 64, 4, 3),
    Sizes(256, 128, 64, 8, 3),
]
SHARED_MEMORY = 200 * 1024
"""Bytes of shared memory that a block needs; H100, H200 and B200 have them."""

_SPAN = 8192  # columns of a program; neighbouring programs read the same columns, which stay in the L2 cache
_ROWS = 65_536  # rows of a launch, which bounds the memory of partial sums
_COLUMN_PARTS = 2**25  # partial column sums in memory


def log_sum_exp(rows: Tensor, columns: Tensor, *, temperature: float, sizes: Sizes = SIZES) -> Tensor:
    """Compute τ · log Σ_j exp(s_ij/τ), float64 [n]; rows [n, d] and columns [m, d] float16 or bfloat16, not empty."""
    result = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), _ROWS):
        at = slice(start, start + _ROWS)
        tops, totals, _, _ = _sums(rows[at], columns, temperature, sizes, both=False)
        result[at] = _merged(tops, totals, temperature)
    return result


def log_sum_exp_both(
    rows: Tensor, columns: Tensor, *, temperature: float, sizes: Sizes = SIZES_BOTH
) -> tuple[Tensor, Tensor]:
    """Compute `log_sum_exp` along rows and along columns in one pass: float64 [n] and [m]."""
    by_row = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    by_column = torch.full((len(columns),), -math.inf, dtype=torch.float64, device=rows.device)
    step = max(1, _COLUMN_PARTS // len(columns)) * sizes.rows
    for start in range(0, len(rows), step):
        at = slice(start, start + step)
        tops, totals, column_tops, column_totals = _sums(rows[at], columns, temperature, sizes, both=True)
        by_row[at] = _merged(tops, totals, temperature)
        part = _merged(column_tops, column_totals, temperature)
        by_column = temperature * torch.logaddexp(by_column / temperature, part / temperature)
    return by_row, by_column


def largest(
    rows: Tensor, columns: Tensor, *, signed: bool = False, before: int | None = None, sizes: Sizes = SIZES
) -> tuple[Tensor, Tensor]:
    """Compute max_j |s_ij|, or max_j s_ij, float32 [n], and its j, int64 [n], the lowest of equals."""
    value = torch.empty(len(rows), device=rows.device)
    index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), _ROWS):
        at = slice(start, start + _ROWS)
        some = rows[at]
        parts = -(-len(columns) // _SPAN), len(some)
        values = torch.empty(parts, device=rows.device)
        indices = torch.empty(parts, dtype=torch.int32, device=rows.device)
        # Row i of a launch is compared with the columns below `first` + i.
        first = len(columns) if before is None else before + start
        _launch(_largest_kernel, some, columns, sizes, values, indices, first=first, SIGNED=signed)
        value[at] = values.amax(0)
        last = torch.iinfo(torch.int32).max  # larger than any column, so equal spans resolve to the lowest
        index[at] = torch.where(values == value[at], indices, last).amin(0).long()
    return value, index


def _sums(
    rows: Tensor, columns: Tensor, temperature: float, sizes: Sizes, *, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return shifts and sums by span of columns, [., n], and, if `both`, by block of rows, [., m]."""
    spans, blocks = -(-len(columns) // _SPAN), -(-len(rows) // sizes.rows)
    by_row = torch.empty(2, spans, len(rows), device=rows.device)
    by_column = torch.empty((2, blocks, len(columns)) if both else (2, 1, 1), device=rows.device)
    options = {"scale": math.log2(math.e) / temperature, "FIXED": has_fixed_shift(temperature), "BOTH": both}
    _launch(_sum_kernel, rows, columns, sizes, *by_row, *by_column, **options)
    return by_row[0], by_row[1], by_column[0], by_column[1]


def has_fixed_shift(temperature: float) -> bool:
    """Return whether 1 can replace the running maximum: no exp((s - 1)/τ) with s in [-1, 1] may lose precision.

    The smallest such term is 2^(-2 log2(e)/τ). It and terms that are 2^-24 of it must be normal float32 numbers, at
    least 2^-126; smaller terms do not change the sum.
    """
    return 2 * math.log2(math.e) / temperature + 24 <= 126


def _merged(tops: Tensor, totals: Tensor, temperature: float) -> Tensor:
    """Merge partial sums [parts, n]: return τ · log Σ_parts exp(top/τ) · total, float64 [n]."""
    return temperature * torch.logsumexp(tops.double() / temperature + totals.double().log(), 0)


def _launch(kernel: Any, rows: Tensor, columns: Tensor, sizes: Sizes, *results: Tensor, **options: Any) -> None:
    grid = triton.cdiv(len(rows), sizes.rows) * triton.cdiv(len(columns), _SPAN)
    with torch.cuda.device_of(rows):
        kernel[(grid,)](
            _descriptor(rows, sizes.rows, sizes.width),
            _descriptor(columns, sizes.columns, sizes.width),
            *results,
            len(rows),
            len(columns),
            rows.shape[1],
            **options,
            SPAN=_SPAN,
            BM=sizes.rows,
            BN=sizes.columns,
            BK=sizes.width,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
            enable_fp_fusion=True,
        )


def _descriptor(matrix: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Return a descriptor that loads blocks [rows, width] of a matrix, with zeros outside it."""
    # The hardware's bulk copies need rows that start at multiples of 16 bytes.
    if matrix.stride(1) != 1 or matrix.stride(0) % 8 or matrix.data_ptr() % 16:
        matrix = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8)).contiguous()
    return TensorDescriptor.from_tensor(matrix, [rows, width])


@triton.jit
def _similarities(rows, columns, row, column, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    products = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, d, BK):
        products = tl.dot(rows.load([row, k]), columns.load([column, k]).T, products)
    return products


@triton.jit(do_not_specialize=["n", "m", "d"])
def _sum_kernel(
    rows,
    columns,
    row_top,
    row_total,
    column_top,
    column_total,
    n,
    m,
    d,
    scale,
    FIXED: tl.constexpr,
    BOTH: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Programs with neighbouring numbers take different rows and the same span of columns.
    blocks = tl.cdiv(n, BM)
    block = tl.program_id(0) % blocks
    span = tl.program_id(0) // blocks
    row = block * BM + tl.arange(0, BM)
    # Sums are relative to `top`: 1 if FIXED (no cosine exceeds it), else the running maximum.
    top = tl.full((BM,), 1.0 if FIXED else -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, m), BN):
        s = _similarities(rows, columns, block * BM, start, d, BM, BN, BK)
        column = start + tl.arange(0, BN)
        if start + BN > m:  # the block reaches past the last column
            s = tl.where((column < m)[None, :], s, -float("inf"))
        if FIXED:
            terms = tl.exp2(s * scale - scale)
            total += tl.sum(terms, 1)
        else:
            higher = tl.maximum(top, tl.max(s, 1))
            terms = tl.exp2(s * scale - (higher * scale)[:, None])
            total = total * tl.exp2((top - higher) * scale) + tl.sum(terms, 1)
            top = higher
        if BOTH:
            # Each block of rows stores a partial sum per column; `_merged` adds them, so no atomics are needed.
            real = (row < n)[:, None]
            if FIXED:
                own = tl.full((BN,), 1.0, tl.float32)
                terms = tl.where(real, terms, 0.0)
            else:
                s = tl.where(real, s, -float("inf"))
                own = tl.max(s, 0)
                own = tl.where(column < m, own, 0.0)  # -inf - -inf would be NaN in columns past the end
                terms = tl.exp2(s * scale - (own * scale)[None, :])
            at = block.to(tl.int64) * m + column  # int64: blocks · m may exceed 2^31
            tl.store(column_top + at, own, column < m)
            tl.store(column_total + at, tl.sum(terms, 0), column < m)
    at = span.to(tl.int64) * n + row
    tl.store(row_top + at, top, row < n)
    tl.store(row_total + at, total, row < n)


@triton.jit(do_not_specialize=["n", "m", "d", "first"])
def _largest_kernel(
    rows,
    columns,
    values,
    indices,
    n,
    m,
    d,
    first,
    SIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(n, BM)
    block = tl.program_id(0) % blocks
    span = tl.program_id(0) // blocks
    row = block * BM + tl.arange(0, BM)
    best = tl.full((BM,), -float("inf"), tl.float32)
    where = tl.zeros((BM,), tl.int32)
    seen = tl.minimum(m, first + block * BM + BM - 1)  # columns that the last row of the block is compared with
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, seen), BN):
        s = _similarities(rows, columns, block * BM, start, d, BM, BN, BK)
        if not SIGNED:
            s = tl.abs(s)
        column = start + tl.arange(0, BN)
        if start + BN > tl.minimum(m, first + block * BM):  # the block crosses the diagonal or the last column
            s = tl.where((column < m)[None, :] & (column[None, :] < first + row[:, None]), s, -float("inf"))
        value = tl.max(s, 1)
        if tl.max((value > best).to(tl.int32), 0) > 0:  # rare after the first blocks, so the search costs little
            place = tl.min(tl.where(s == value[:, None], column[None, :], 0x7FFFFFFF), 1)
            where = tl.where(value > best, place, where)
            best = tl.maximum(best, value)
    at = span.to(tl.int64) * n + row
    tl.store(values + at, best, row < n)
    tl.store(indices + at, where, row < n)
