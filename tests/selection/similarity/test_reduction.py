"""The tiles and the operations on them, and the imports of the science."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from selection.similarity.reduction import (
    FixedShift,
    Largest,
    LogSumExp,
    Tiles,
    for_each_tile,
    largest,
    log_sum_exp,
    log_sum_exp_both,
    spans,
)
from selection.similarity.streaming import resident


def imported_by(statement):
    """List the top-level packages in sys.modules after a statement in a fresh interpreter."""
    child = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    return set(child.stdout.split())


def test_importing_selection_needs_nothing_but_python():
    assert not imported_by("import selection") & {"torch", "numpy", "pydantic", "duckdb", "yaml"}


def test_the_tensor_part_needs_torch_alone():
    tensors = imported_by(
        "import selection.scores.clip_loss, selection.scores.norm_sim, selection.scores.near_duplicates"
    )
    assert "torch" in tensors
    others = {"dagster", "open_clip", "pyarrow", "duckdb", "polars", "pydantic", "yaml", "pandas"}
    assert not tensors & others
    assert not imported_by("import selection.scores.negatives") & {*others, "torch"}


def test_public_names_are_found_in_the_package_and_others_are_not():
    import selection

    assert all(callable(getattr(selection, name)) for name in selection.__all__)
    assert set(selection.__all__) <= set(dir(selection))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = selection.nonsense


@given(rows=st.integers(1, 500), columns=st.integers(1, 1100), width=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_tiles_cover_every_row_and_column_once(rows, columns, width, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (rows, width), generator=generator).half()
    right = torch.randint(-3, 4, (columns, width), generator=generator).half()
    product = torch.full((rows, columns), math.nan)
    tiles = Tiles(left)
    for at in spans(rows, tiles.height):
        for where, similarities in tiles.similarities(tiles.rows(left, at), right):
            assert similarities.dtype == torch.float32
            product[at, where] = similarities[: at.stop - at.start]
    assert torch.equal(product, left.float() @ right.float().T)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 64, 97, 768])
def test_a_tile_of_equal_rows_gives_equal_sums_to_the_bit(width, arithmetic):
    """A row's sum must not depend on its place in a tile: not in the product, in exp2, or in the sum."""
    generator = torch.Generator().manual_seed(width)
    row, columns = torch.randn(width, generator=generator), torch.randn(700, width, generator=generator)
    row, columns = row / row.norm(), columns / columns.norm(dim=1, keepdim=True)
    seen = []

    def task(tiles, _):
        tile = row.repeat(tiles.height, 1)
        sums = LogSumExp(torch.full((tiles.height,), -math.inf), 0.01, torch.empty_like(tiles.products))
        for _, similarities in tiles.similarities(tile, columns):
            sums.update(similarities)
        seen.append(sums.value())
        seen.append(sum(powers.sum(1) for _, powers in tiles.powers(tile, columns, FixedShift.of(0.01))))

    for_each_tile(1, row, task, arithmetic)
    assert [len(sums.unique()) for sums in seen] == [1, 1]


def test_a_row_has_the_same_bits_anywhere_on_a_cpu_with_avx2_alone():
    """Another kind of CPU has other tiles and instructions; these variables make the libraries act as on one."""
    emulated = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    }
    names = [
        "test_a_tile_of_equal_rows_gives_equal_sums_to_the_bit",
        "test_a_row_s_sum_has_the_same_bits_beside_any_other",
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", " or ".join(names)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | emulated,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert child.returncode == 0, child.stdout
    assert child.stdout.startswith("." * 16)


def with_common_part(rows, width, seed):
    """Return unit rows with pairwise cosines of about 0.9, as images of one kind have."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, width, generator=generator) / math.sqrt(width) / 3
    return torch.nn.functional.normalize(noise + torch.eye(width)[0], dim=1)


def test_bfloat16_rounds_what_columns_do_not_have_in_common():
    """Plain bfloat16 products lie on a grid of 2^-8 near 0.9; what differs between columns is a tenth of that."""
    left, right = with_common_part(300, 64, seed=1), with_common_part(700, 64, seed=2)
    tiles = Tiles(left, "bfloat16")
    product = torch.cat([s[:300].clone() for _, s in tiles.similarities(tiles.rows(left, slice(0, 300)), right)], 1)
    error = (product.double() - left.double() @ right.double().T).abs().max()
    assert 1e-5 < error < 5e-4
    assert (torch.mm(left.bfloat16(), right.bfloat16().T).double() - product).abs().max() > 2e-3


@given(rows=st.integers(1, 600), columns=st.integers(1, 700), width=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_bfloat16_is_within_its_bound_and_names_a_column_by_its_own_similarity(rows, columns, width, seed):
    """Two operands and one product are rounded, each by 2^-9 of its size; differences of unit vectors are below 2."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, width, generator=generator) for n in (rows, columns))
    left, right = left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)
    exact = left.double() @ right.double().T
    bound = 2 * 3 * 2**-9 * 1.01
    first = torch.full((rows,), -0.5)
    sums = log_sum_exp(left, right, first, temperature=0.05, arithmetic="bfloat16")
    expected = 0.05 * torch.cat([first[:, None].double(), exact], 1).div(0.05).logsumexp(1)
    assert_close(sums, expected, atol=bound, rtol=0)
    value, index = largest(left, right, arithmetic="bfloat16")
    assert_close(value.double(), exact.gather(1, index[:, None])[:, 0].abs(), atol=5e-7, rtol=0)
    assert (value >= exact.abs().amax(1) - 2 * bound).all()


def test_an_arithmetic_that_is_not_known_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="arithmetic must be one of float32, bfloat16, not 'float16'"):
        largest(one, one, arithmetic="float16")


def unit_rows(cosines, width, seed):
    """Return unit rows [n, width] with the given cosines to the first axis."""
    noise = torch.randn(len(cosines), width - 1, generator=torch.Generator().manual_seed(seed))
    beside = torch.nn.functional.normalize(noise, dim=1) * (1 - cosines**2).clamp(min=0).sqrt()[:, None]
    return torch.cat([cosines[:, None], beside], 1)


@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 700),
    temperature=st.sampled_from([0.001, 0.005, 0.0074, 0.0075, 0.01, 0.0145, 0.07, 1, 10]) | st.floats(0.001, 10),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    opposite=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_exact_for_every_similarity_and_temperature(rows, columns, temperature, dtype, opposite, seed):
    """Rows lie anywhere between the columns' direction and its opposite; with `opposite` all columns are alike."""
    generator = torch.Generator().manual_seed(seed)
    left = unit_rows(torch.rand(rows, generator=generator) * 2 - 1, 16, seed).to(dtype)
    cosines = torch.full((columns,), 0.999) if opposite else torch.rand(columns, generator=generator) * 2 - 1
    right = unit_rows(cosines, 16, seed + 1).to(dtype)
    some = min(rows, columns, 5)
    right[:some] = left[:some]
    left[some : 2 * some] = -right[: len(left[some : 2 * some])]
    first = torch.where(torch.rand(rows, generator=generator) < 0.5, left[:, 0].float(), -math.inf)
    s = left.double() @ right.double().T
    expected = torch.cat([first[:, None].double(), s], 1).div(temperature).logsumexp(1) * temperature
    bounds = {"atol": 3e-7 + 3e-7 * temperature, "rtol": 3e-7}
    assert_close(log_sum_exp(left, right, first, temperature=temperature), expected, **bounds)
    by_row, by_column = log_sum_exp_both(left, right, temperature=temperature)
    assert_close(by_row, temperature * (s / temperature).logsumexp(1), **bounds)
    assert_close(by_column, temperature * (s / temperature).logsumexp(0), **bounds)


@pytest.mark.parametrize("cosine", [-1.0, -0.9, -0.61, 3.0])
def test_a_row_outside_the_range_of_the_fixed_shift_is_computed_with_a_running_maximum(cosine):
    """At τ = 0.01 powers of -0.9 are below the numbers of float32, and those of 3 above."""
    shift = FixedShift.of(0.01)
    columns = torch.eye(4)[:1].repeat(600, 1)
    rows = torch.zeros(700, 4)
    rows[:, 0] = 0.3
    rows[[5, 480, 699], 0] = cosine
    assert not shift.holds(600 * shift.power(torch.tensor(cosine)).float(), 600)
    none = torch.full((700,), -math.inf)
    sums = log_sum_exp(rows, columns, none, temperature=0.01)
    assert_close(sums, rows[:, 0].double() + 0.01 * math.log(600), atol=1e-7, rtol=1e-7)
    by_row, by_column = log_sum_exp_both(columns, rows[[5, 480]], temperature=0.01)
    assert_close(by_column, torch.full((2,), cosine + 0.01 * math.log(600)).double(), atol=1e-7, rtol=1e-7)
    assert_close(by_row, torch.full((600,), cosine + 0.01 * math.log(2)).double(), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.07, 10])
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_a_row_s_sum_has_the_same_bits_beside_any_other_rows(temperature, arithmetic):
    """Rows of one call share tiles; some of them lie outside the range of the fixed shift and are computed again."""
    left = unit_rows(torch.linspace(-1, 1, 1100), 48, seed=1)
    right = unit_rows(torch.linspace(0.97, 1, 530), 48, seed=2)
    first = torch.full((1100,), -math.inf)
    first[::3] = left[::3, 0]
    of_all = log_sum_exp(left, right, first, temperature=temperature, arithmetic=arithmetic)
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(3))
    for rows in (order, order[:7], order[100:700]):
        alone = log_sum_exp(left[rows], right, first[rows], temperature=temperature, arithmetic=arithmetic)
        assert torch.equal(alone, of_all[rows])


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_both_sides_are_those_of_the_whole_over_many_tiles(threads):
    generator = torch.Generator().manual_seed(1)
    left, right = torch.rand(17 * 480 + 5, 3, generator=generator) - 0.5, torch.rand(530, 3, generator=generator) - 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        by_row, by_column = log_sum_exp_both(left, right, temperature=0.1)
    finally:
        torch.set_num_threads(before)
    s = left.double() @ right.double().T
    assert_close(by_row, 0.1 * (s / 0.1).logsumexp(1), atol=3e-7, rtol=0)
    assert_close(by_column, 0.1 * (s / 0.1).logsumexp(0), atol=3e-7, rtol=0)
    assert torch.equal(by_column, log_sum_exp_both(left, right, temperature=0.1)[1])


@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
    ],
)
def test_each_row_passes_once_and_in_order(count, device):
    rows = torch.arange(count * 3.0).view(count, 3)
    asked = []

    def read(at):
        asked.append(at)
        return [rows[at], rows[at, 0]]

    passed = list(resident(count, 4, torch.device(device), read))
    assert asked == [at for at, _ in passed]
    for at, (whole, column) in passed:
        assert whole.device.type == device
        assert len(whole) <= 4
        assert torch.equal(whole.cpu(), rows[at])
        assert torch.equal(column.cpu(), rows[at, 0])
    assert torch.equal(torch.cat([torch.empty(0, 3), *(parts[0].cpu() for _, parts in passed)]), rows)


def test_log_sum_exp_counts_its_first_term():
    first = torch.tensor([0.5, -math.inf, -1.0])
    sums = LogSumExp(first, 0.5, torch.empty(3, 4))
    tile = torch.tensor([[0.1, 0.2], [0.1, 0.2], [1.0, 1.0]])
    sums.update(tile)
    expected = 0.5 * (torch.cat([first[:, None], tile], 1).double() / 0.5).logsumexp(1)
    assert_close(sums.value(), expected, atol=1e-7, rtol=0)


def test_the_largest_keeps_the_first_of_equal_values_within_and_across_tiles():
    best = Largest(2, torch.device("cpu"))
    best.update(torch.tensor([[0.1, -0.7, 0.7], [0.0, 0.0, 0.0]]), slice(0, 3))
    best.update(torch.tensor([[0.7, -0.7], [0.0, -0.5]]), slice(3, 5))
    assert best.index.tolist() == [1, 4]
    assert_close(best.value, torch.tensor([0.7, 0.5]))


@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 1100),
    before=st.integers(-20, 700) | st.none(),
    arithmetic=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_row_finds_the_largest_signed_similarity_among_the_columns_that_it_sees(
    rows, columns, before, arithmetic, seed
):
    """Products of integers are exact, so many are equal."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-2, 3, (n, 3), generator=generator).half() for n in (rows, columns))
    exact = left.float() @ right.float().T
    if before is not None:
        exact[torch.arange(columns) >= before + torch.arange(rows)[:, None]] = -math.inf
    value, index = largest(left, right, arithmetic=arithmetic, signed=True, before=before)
    assert torch.equal(value, exact.amax(1))
    if arithmetic == "float32":
        assert torch.equal(index, exact.argmax(1))


def test_only_signed_similarities_are_looked_at_in_part():
    with pytest.raises(ValueError, match="before needs signed similarities"):
        largest(torch.ones(1, 1), torch.ones(1, 1), before=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_row_is_in_one_task_and_torch_keeps_its_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = torch.zeros(2000)
        inside = set()

        def task(_, at):
            inside.add(torch.get_num_threads())
            seen[at] += 1

        for_each_tile(2000, seen[:, None], task)
        assert torch.equal(seen, torch.ones(2000))
        assert inside == {1}
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_task_reaches_the_caller():
    def task(_, at):
        raise RuntimeError(f"row {at.start}")

    with pytest.raises(RuntimeError, match="row "):
        for_each_tile(2000, torch.zeros(1, 1), task)
