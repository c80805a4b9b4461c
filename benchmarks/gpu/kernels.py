"""The CUDA kernels: their error against float64, their speed, and the speed of their alternative block sizes.

The parts are generators that yield results by name as they become known. Without a GPU the kernels run in Triton's
interpreter, which multiplies bfloat16 wrongly; it is tested in float16 only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from selection import nearest_target, neg_clip_loss
from selection.similarity import reduction

TEMPERATURE = 0.01  # takes a running maximum in the kernels
FIXED_SHIFT = 0.05  # takes a fixed shift
REPEATS, WARM_UP = 20, 3

Results = Iterator[dict[str, Any]]


BOUND = 1e-5
"""Largest error of a similarity or of a sum's logarithm times τ, for τ up to 1; for larger τ, times τ."""


def parity(device: torch.device, *, problems: Sequence[tuple[int, int, int, float]]) -> Results:
    """Compare every kernel with the float64 oracle.

    Args:
        device: where the kernels run.
        problems: n, m, d and τ.

    Yields:
        For each problem and dtype, the largest error of each kernel; last, `largest_error`.

    Raises:
        RuntimeError: an error is above the bound, or a row's sum depends on its neighbours.
    """
    worst = 0.0
    for dtype in (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,):
        for n, m, d, temperature in problems:
            rows, columns = embeddings(n, d, 1, device, dtype), embeddings(m, d, 2, device, dtype)
            problem = f"{n} x {m} x {d}, temperature {temperature}, {str(dtype).removeprefix('torch.')}"
            errors = _errors(rows, columns, temperature)
            yield {problem: errors}
            for kernel, error in errors.items():
                if not error <= BOUND * max(1, temperature):
                    raise RuntimeError(f"{kernel} at {problem} differs from float64 by {error}")
            worst = max(worst, *errors.values())
    yield {"largest_error": worst, "bound": BOUND}


def _errors(rows: Tensor, columns: Tensor, temperature: float) -> dict[str, float]:
    """Return the largest difference between each kernel and float64.

    For `largest`, the error is that of the value, or by how much the similarity at the reported index is lower than
    the largest one.
    """
    from selection.similarity import triton_reduction as kernels

    s = rows.double() @ columns.double().T
    logits = s / temperature
    by_row, by_column = kernels.log_sum_exp_both(rows, columns, temperature=temperature)
    single = kernels.log_sum_exp(rows, columns, temperature=temperature)
    if not torch.equal(kernels.log_sum_exp(rows[:1], columns, temperature=temperature), single[:1]):
        raise RuntimeError("log_sum_exp of the first row alone has other bits than among all rows")
    expected = temperature * logits.logsumexp(1)
    errors = {
        "log_sum_exp": _difference(single, expected),
        "log_sum_exp_both, rows": _difference(by_row, expected),
        "log_sum_exp_both, columns": _difference(by_column, temperature * logits.logsumexp(0)),
        "largest": _missed(kernels.largest(rows, columns), s.abs()),
        "largest, signed": _missed(kernels.largest(rows, columns, signed=True), s),
    }
    before = 1 + len(columns) // 2  # at least one column for every row
    seen = torch.arange(len(columns), device=s.device) - torch.arange(len(rows), device=s.device)[:, None]
    s.masked_fill_(seen >= before, -math.inf)
    errors["largest, signed, before"] = _missed(kernels.largest(rows, columns, signed=True, before=before), s)
    return errors


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


def _missed(found: tuple[Tensor, Tensor], exact: Tensor) -> float:
    value, index = found
    best = exact.amax(1)
    return max(_difference(value, best), _difference(exact.gather(1, index[:, None])[:, 0], best))


def speed(device: torch.device, *, size: int, widths: tuple[int, ...]) -> Results:
    """Time the reductions and scores at n = m = size, in float16, beside the bare product and the unfused tiles.

    Yields:
        By width, TFLOP/s by name, counting the products alone: one of n · m · d multiply-adds for a reduction, two for
        negCLIPLoss with one draw. `<name>_of_product` is the bare product's time, per product, over the task's.

    Raises:
        RuntimeError: the device has no kernels for float16, so that tiles would be measured twice.
    """
    for width in widths:
        rows, columns = (embeddings(size, width, seed, device, torch.float16) for seed in (1, 2))
        if device.type == "cuda" and reduction._kernels(rows, "float32") is None:
            raise RuntimeError(f"{device} has no kernels: Triton is not installed, or its shared memory is too small")
        product = seconds(lambda rows=rows, columns=columns: torch.mm(rows, columns.T), device)
        rates = {"product_tflops": _tflops(rows, columns, product)}
        for name, products, task in _tasks(rows, columns):
            taken = seconds(task, device)
            rates[f"{name}_tflops"] = products * _tflops(rows, columns, taken)
            rates[f"{name}_of_product"] = products * product / taken
        yield {f"d={width}": rates}


def _tasks(rows: Tensor, columns: Tensor) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Yield names, numbers of products, and tasks: reductions with kernels, scores, reductions without kernels."""
    none = rows.new_full((len(rows),), -math.inf, dtype=torch.float32)

    def reductions() -> Iterator[tuple[str, int, Callable[[], Any]]]:
        for name, temperature in (("", TEMPERATURE), ("_fixed_shift", FIXED_SHIFT)):
            at = {"temperature": temperature}
            yield f"log_sum_exp{name}", 1, lambda at=at: reduction.log_sum_exp(rows, columns, none, **at)
            yield f"log_sum_exp_both{name}", 1, lambda at=at: reduction.log_sum_exp_both(rows, columns, **at)
        yield "largest", 1, lambda: reduction.largest(rows, columns)

    draw = rows[None], columns[None]
    yield from reductions()
    yield "neg_clip_loss", 2, lambda: neg_clip_loss(rows, columns, *draw, temperature=TEMPERATURE)
    yield "norm_sim_inf", 1, lambda: nearest_target(rows, columns)
    with _without_kernels():
        for name, products, task in reductions():
            yield f"tiles_{name}", products, task


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Make the reductions compute with tiles in plain torch, as they do where Triton is missing."""
    kept = reduction._triton
    reduction._triton = lambda device: None  # noqa: ARG005
    try:
        yield
    finally:
        reduction._triton = kept


def tuning(device: torch.device, *, size: int, width: int) -> Results:
    """Time the kernels with each of their listed block sizes.

    Yields:
        By kernel and sizes (rows-columns-width-warps-stages), TFLOP/s, or the error of sizes that cannot run; last, by
        kernel, the fastest sizes and those in use.
    """
    from selection.similarity import triton_reduction as kernels

    rows, columns = (embeddings(size, width, seed, device, torch.float16) for seed in (1, 2))
    tasks: dict[str, tuple[Any, Callable[..., Any], dict[str, float]]] = {
        "log_sum_exp": (kernels.SIZES, kernels.log_sum_exp, {"temperature": TEMPERATURE}),
        "log_sum_exp_both": (kernels.SIZES_BOTH, kernels.log_sum_exp_both, {"temperature": TEMPERATURE}),
        "largest": (kernels.SIZES, kernels.largest, {}),
    }
    for name, (used, kernel, options) in tasks.items():
        rates: dict[str, float] = {}
        for sizes in kernels.ALTERNATIVES:
            label = "-".join(map(str, sizes))
            try:
                taken = seconds(lambda s=sizes, k=kernel, o=options: k(rows, columns, sizes=s, **o), device)
            except Exception as error:  # noqa: BLE001 - such as too little shared memory: the other sizes are timed
                yield {f"{name} {label}": f"{type(error).__name__}: {error}"}
                continue
            rates[label] = _tflops(rows, columns, taken)
            yield {f"{name} {label}": rates[label]}
        if not rates:
            raise RuntimeError(f"{name} runs with none of the listed sizes")
        yield {f"{name} fastest": max(rates, key=rates.__getitem__), f"{name} in use": "-".join(map(str, used))}


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a task on a device; on CPU of two runs."""
    if device.type != "cuda":
        taken = []
        for _ in range(2):
            start = perf_counter()
            task()
            taken.append(perf_counter() - start)
        return median(taken)
    for _ in range(WARM_UP):
        task()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        task()
        mark.record()
    torch.cuda.synchronize(device)
    return median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


def _tflops(rows: Tensor, columns: Tensor, taken: float) -> float:
    return 2 * len(rows) * len(columns) * rows.shape[1] / taken / 1e12


def embeddings(rows: int, width: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random unit vectors [rows, width]."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, device=device)
    return torch.nn.functional.normalize(drawn, dim=1).to(dtype)
