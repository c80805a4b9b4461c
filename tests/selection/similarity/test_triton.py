"""The CUDA kernels, on CPU: run by Triton's interpreter against float64 and the tiles, and compiled for an H100.

The interpreter is chosen before Triton is imported, so the kernels run in processes of their own. It multiplies
bfloat16 wrongly (as if they were integers), so the kernels are run in float16 only.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from selection.similarity.reduction import largest, log_sum_exp, log_sum_exp_both

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

# n, m, d, τ: one of each, blocks that are full, ragged and more than one, columns beyond one span, both shifts.
CASES = [
    (1, 1, 1, 0.07),
    (128, 256, 64, 0.01),
    (130, 300, 97, 0.001),
    (257, 8500, 40, 0.01),
    (300, 257, 64, 10.0),
    (3, 700, 768, 0.05),
]
TIED = len(CASES)

RUN = """
import sys, torch
from selection.similarity import triton_reduction as kernels

folder, cases = sys.argv[1], int(sys.argv[2])
for case in range(cases):
    rows, columns, temperature = torch.load(f"{folder}/{case}.pt")
    found = {
        "rows": kernels.log_sum_exp(rows, columns, temperature=temperature),
        "both": kernels.log_sum_exp_both(rows, columns, temperature=temperature),
        "largest": kernels.largest(rows, columns),
        "signed": kernels.largest(rows, columns, signed=True),
        "before": [kernels.largest(rows, columns, signed=True, before=before) for before in (-2, 0, 130)],
        "first": kernels.log_sum_exp(rows[:1], columns, temperature=temperature),
    }
    kernels._COLUMN_PARTS = 1  # one block of rows at a time
    found["in parts"] = kernels.log_sum_exp_both(rows, columns, temperature=temperature)
    kernels._COLUMN_PARTS = 2**25
    torch.save(found, f"{folder}/{case}.found")
"""


def in_a_process(code, *arguments, **environment):
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | environment,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def embeddings(rows, width, seed):
    rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1).half()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    problems = [(embeddings(n, d, 1), embeddings(m, d, 2), temperature) for n, m, d, temperature in CASES]
    # Copies and opposites of one vector; a quarter times a quarter, an odd number of times, is exact and never 0.
    signs = torch.randint(2, (140, 15), generator=torch.Generator().manual_seed(3)).half() / 2 - 0.25
    copies = signs[:1].repeat(9000, 1) * torch.tensor([[1.0], [-1.0]]).half().repeat(4500, 1)
    copies[:300] = 0
    problems.append((signs, copies, 0.05))
    for case, problem in enumerate(problems):
        torch.save(problem, folder / f"{case}.pt")
    in_a_process(RUN, str(folder), str(len(problems)), TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")
    return [(*problem, torch.load(folder / f"{case}.found")) for case, problem in enumerate(problems)]


def close(found, expected, temperature):
    """Float32 sums, in the order of numpy, which is worse than that of a GPU, are within 1e-6 of their size."""
    assert_close(found, expected, atol=5e-7 + 1e-6 * temperature, rtol=0, check_dtype=False)


@pytest.mark.parametrize("case", range(len(CASES) + 1))
def test_sums_are_those_of_float64_and_of_the_tiles(results, case):
    rows, columns, temperature, found = results[case]
    s = rows.double() @ columns.double().T / temperature
    close(found["rows"], temperature * s.logsumexp(1), temperature)
    close(
        found["rows"],
        log_sum_exp(rows, columns, torch.full((len(rows),), -math.inf), temperature=temperature),
        temperature,
    )
    for side, ours, tiles in zip(
        (1, 0), found["both"], log_sum_exp_both(rows, columns, temperature=temperature), strict=True
    ):
        close(ours, temperature * s.logsumexp(side), temperature)
        close(ours, tiles, temperature)


@pytest.mark.parametrize("case", range(len(CASES) + 1))
def test_sums_of_columns_are_the_same_however_many_rows_are_taken_at_once(results, case):
    _, _, temperature, found = results[case]
    close(found["in parts"][0], found["both"][0], temperature)
    close(found["in parts"][1], found["both"][1], temperature)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_largest_similarity_is_that_of_float64_and_of_the_tiles(results, case):
    rows, columns, _, found = results[case]
    value, index = found["largest"]
    exact = (rows.double() @ columns.double().T).abs()
    assert_close(value.double(), exact.amax(1), atol=5e-7, rtol=0)
    assert torch.equal(index, exact.argmax(1))
    assert torch.equal(index, largest(rows, columns)[1])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_largest_signed_similarity_to_earlier_columns_is_that_of_float64_and_of_the_tiles(results, case):
    rows, columns, _, found = results[case]
    exact = rows.double() @ columns.double().T
    seen = torch.arange(len(columns)) - torch.arange(len(rows))[:, None]
    for before, (value, index) in zip((len(columns), -2, 0, 130), [found["signed"], *found["before"]], strict=True):
        expected = exact.masked_fill(seen >= before, -math.inf)
        assert_close(value.double(), expected.amax(1), atol=5e-7, rtol=0)
        assert torch.equal(index, expected.argmax(1))
        assert torch.equal(index, largest(rows, columns, signed=True, before=before)[1])


def test_the_lowest_of_equally_large_columns_is_named(results):
    rows, _, _, found = results[TIED]
    value, index = found["largest"]
    assert (value > 0).all()
    assert torch.equal(index, torch.full((len(rows),), 300))


@pytest.mark.parametrize("case", range(len(CASES) + 1))
def test_a_rows_sum_does_not_depend_on_its_neighbours(results, case):
    found = results[case][3]
    assert torch.equal(found["first"], found["rows"][:1])


COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from selection.similarity import triton_reduction as kernels

def build(kernel, sizes, **constants):
    constants |= {"SPAN": 8192, "BM": sizes.rows, "BN": sizes.columns, "BK": sizes.width}
    types = {"n": "i32", "m": "i32", "d": "i32", "first": "i32", "scale": "fp32", "indices": "*i32"}
    types |= {"rows": f"tensordesc<fp16[{sizes.rows}, {sizes.width}]>"}
    types |= {"columns": f"tensordesc<fp16[{sizes.columns}, {sizes.width}]>"}
    types |= {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages, "enable_fp_fusion": True}
    built = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    return {"shared": built.metadata.shared, "tensor cores": "wgmma.mma_async" in built.asm["ptx"]}

print(json.dumps([
    build(kernels._sum_kernel, kernels.SIZES, FIXED=False, BOTH=False),
    build(kernels._sum_kernel, kernels.SIZES, FIXED=True, BOTH=False),
    build(kernels._sum_kernel, kernels.SIZES_BOTH, FIXED=False, BOTH=True),
    build(kernels._sum_kernel, kernels.SIZES_BOTH, FIXED=True, BOTH=True),
    build(kernels._largest_kernel, kernels.SIZES, SIGNED=False),
    build(kernels._largest_kernel, kernels.SIZES, SIGNED=True),
    kernels.SHARED_MEMORY,
]))
"""


def test_kernels_compile_for_an_h100_to_its_tensor_cores_within_its_shared_memory(tmp_path):
    *built, most = json.loads(in_a_process(COMPILE, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(built) == 6
    for kernel in built:
        assert kernel["tensor cores"]
        assert kernel["shared"] <= most


def test_the_fixed_shift_is_taken_only_where_no_term_that_counts_underflows():
    import selection.similarity.triton_reduction as kernels

    for temperature in (0.001, 0.01, 0.028, 0.029, 0.07, 10):
        smallest = torch.tensor(-2 / temperature, dtype=torch.float32).exp()
        exact = smallest * 2**-24 >= torch.finfo(torch.float32).tiny
        assert kernels.has_fixed_shift(temperature) == exact


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    rows, columns = (embeddings(n, 96, seed).to(dtype) for n, seed in ((300, 1), (9001, 2)))
    first = torch.full((300,), 0.3)
    for temperature in (0.001, 0.01, 0.07):
        found = log_sum_exp(rows.cuda(), columns.cuda(), first.cuda(), temperature=temperature).cpu()
        close(found, log_sum_exp(rows, columns, first, temperature=temperature), temperature)
        both = log_sum_exp_both(rows.cuda(), columns.cuda(), temperature=temperature)
        for side, expected in zip(both, log_sum_exp_both(rows, columns, temperature=temperature), strict=True):
            close(side.cpu(), expected, temperature)
    value, index = largest(rows.cuda(), columns.cuda())
    expected_value, expected_index = largest(rows, columns)
    close(value.cpu(), expected_value, 0)
    assert (index.cpu() == expected_index).float().mean() > 0.99
    value, index = largest(rows.cuda(), columns.cuda(), signed=True, before=5)
    expected_value, expected_index = largest(rows, columns, signed=True, before=5)
    close(value.cpu(), expected_value, 0)
    assert (index.cpu() == expected_index).float().mean() > 0.99
