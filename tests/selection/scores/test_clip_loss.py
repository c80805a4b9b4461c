"""CLIPScore and negCLIPLoss against float64 logsumexp.

Tolerance: the derivative of τ · log Σ exp(s/τ) by the s of its terms is a set of weights that sum to one, so at every
τ a score carries no more than the float32 rounding of a dot product (below 5e-7 here); that of the float32 sums,
below 2e-7 · τ; and that of its own float32, 6e-8 of its size.
"""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from selection import clip_score, neg_clip_loss, neg_clip_loss_in_batches

CLOSE = {"atol": 5e-7, "rtol": 2e-7, "check_dtype": False}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TEMPERATURES = [0.001, 0.01, 0.07, 1.0, 10.0]


def embeddings(*shape, seed=0, dtype=torch.float32, kind="random"):
    """Return unit rows: random, copies of few, or ± one direction (every cosine is 1 or -1)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator)
    if kind != "random":
        few = torch.randn(1 if kind == "poles" else 3, shape[-1], generator=torch.Generator().manual_seed(1))
        rows = few[torch.randint(len(few), shape[:-1], generator=generator)]
    if kind == "poles":
        rows = rows * (torch.randint(2, (*shape[:-1], 1), generator=generator) * 2 - 1)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


def problem(rows, draws, size, width, dtype=torch.float32, kind="random", seed=0):
    return (
        embeddings(rows, width, seed=seed, dtype=dtype, kind=kind),
        embeddings(rows, width, seed=seed + 1, dtype=dtype, kind=kind),
        embeddings(draws, size, width, seed=seed + 2, dtype=dtype, kind=kind),
        embeddings(draws, size, width, seed=seed + 3, dtype=dtype, kind=kind),
    )


def score_in_batch(v, t, batch_v, batch_t, temperature):
    """Compute the equation in float64, for one row and its batch."""
    v, t, batch_v, batch_t = (x.double() for x in (v, t, batch_v, batch_t))
    sums = torch.logsumexp(batch_t @ v / temperature, 0) + torch.logsumexp(batch_v @ t / temperature, 0)
    return v @ t - temperature / 2 * sums


def oracle(image, text, negative_image, negative_text, temperature, member=None):
    """Compute score and standard error in float64, row by row and draw by draw, from the definition of the batch."""
    by_draw = torch.empty(len(negative_image), len(image), dtype=torch.float64)
    for k, (draw_v, draw_t) in enumerate(zip(negative_image, negative_text, strict=True)):
        for i, (v, t) in enumerate(zip(image, text, strict=True)):
            batch_v, batch_t = draw_v, draw_t
            if member is None or not member[k, i]:
                batch_v, batch_t = torch.cat([v[None], draw_v[:-1]]), torch.cat([t[None], draw_t[:-1]])
            by_draw[k, i] = score_in_batch(v, t, batch_v, batch_t, temperature)
    draws = len(by_draw)
    spread = (by_draw - by_draw.mean(0)).square().sum(0)
    stderr = (spread / (draws - 1) / draws).sqrt() if draws > 1 else torch.full_like(spread, torch.nan)
    return by_draw.mean(0), stderr


@given(rows=st.integers(1, 300), width=st.integers(1, 80), dtype=st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_clip_score_is_the_dot_product_of_each_pair(rows, width, dtype):
    image, text = embeddings(rows, width, seed=1, dtype=dtype), embeddings(rows, width, seed=2, dtype=dtype)
    score = clip_score(image, text)
    assert score.dtype == torch.float32
    assert_close(score, (image.double() * text.double()).sum(1), **CLOSE)


@given(
    rows=st.integers(1, 260),
    draws=st.integers(1, 3),
    size=st.integers(1, 530),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["random", "copies", "poles"]),
    temperature=st.one_of(st.sampled_from(TEMPERATURES), st.floats(0.001, 10)),
    with_members=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_neg_clip_loss_is_the_equation_for_any_size_dtype_and_temperature(
    rows, draws, size, width, dtype, kind, temperature, with_members
):
    args = problem(rows, draws, size, width, dtype, kind)
    member = None
    if with_members:  # any flags: the equation says what they mean, whether or not the rows are really there
        member = torch.rand(draws, rows, generator=torch.Generator().manual_seed(5)) < 0.5
        for k, i in member.nonzero().tolist():  # but a row must be found in a draw that it is a member of
            j = (i * 7 + k) % size
            args[2][k, j], args[3][k, j] = args[0][i], args[1][i]
        member &= torch.stack([(args[2][k][:, None] == args[0]).all(2).any(0) for k in range(draws)])
        member &= torch.stack([(args[3][k][:, None] == args[1]).all(2).any(0) for k in range(draws)])
    score, stderr = neg_clip_loss(*args, temperature=temperature, member=member)
    expected, expected_stderr = oracle(*args, temperature, member)
    assert score.dtype == stderr.dtype == torch.float32
    close = {**CLOSE, "atol": 5e-7 + 2e-7 * temperature}
    assert_close(score, expected.clamp(max=0), **close)
    assert_close(stderr, expected_stderr, equal_nan=True, **close)
    assert (score <= 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sums_stay_finite_and_exact_when_every_term_is_at_an_end_of_the_range(temperature):
    u = embeddings(1, 24)
    up, down = u.expand(300, -1), -u.expand(300, -1)
    draws_up, draws_down = u.expand(1, 700, -1), -u.expand(1, 700, -1)
    cases = {
        "all cosines 1": (up, up, draws_up, draws_up),
        "all cosines -1": (up, down, draws_up, draws_down),
        "own cosine -1, others 1": (up, down, draws_down, draws_up),
        "own cosine 1, others -1": (up, up, draws_down, draws_down),
    }
    for name, args in cases.items():
        score, _ = neg_clip_loss(*args, temperature=temperature)
        expected, _ = oracle(*(x[:1] for x in args), temperature)
        assert score.isfinite().all(), name
        assert_close(score, expected.expand(300), **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_a_row_outside_the_draw_takes_the_place_of_the_last_row():
    image, text, negative_image, negative_text = problem(6, 2, 9, 8)
    score, _ = neg_clip_loss(image, text, negative_image, negative_text, temperature=0.05)
    changed_image, changed_text = negative_image.clone(), negative_text.clone()
    changed_image[:, -1], changed_text[:, -1] = 1, -1
    assert torch.equal(score, neg_clip_loss(image, text, changed_image, changed_text, temperature=0.05)[0])
    changed_image[:, -2] = -changed_image[:, -2]
    assert not torch.equal(score, neg_clip_loss(image, text, changed_image, changed_text, temperature=0.05)[0])


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_member_is_scored_in_the_draw_itself_wherever_it_stands(place):
    negative_image, negative_text = problem(1, 1, 9, 8)[2:]
    image, text = negative_image[0, place][None], negative_text[0, place][None]
    member = torch.tensor([[True]])
    score, _ = neg_clip_loss(image, text, negative_image, negative_text, temperature=0.05, member=member)
    expected = score_in_batch(image[0], text[0], negative_image[0], negative_text[0], 0.05)
    assert_close(score, expected[None], **CLOSE)


def test_membership_is_told_apart_draw_by_draw():
    image, text, negative_image, negative_text = problem(2, 2, 5, 8)
    negative_image[1, 2], negative_text[1, 2] = image[0], text[0]
    member = torch.tensor([[False, False], [True, False]])
    args = (image, text, negative_image, negative_text)
    score, stderr = neg_clip_loss(*args, temperature=0.1, member=member)
    expected, expected_stderr = oracle(*args, 0.1, member)
    assert_close(score, expected, **CLOSE)
    assert_close(stderr, expected_stderr, **CLOSE)
    assert not torch.equal(score, neg_clip_loss(*args, temperature=0.1)[0])


def test_a_batch_of_one_scores_zero():
    image, text, negative_image, negative_text = problem(5, 3, 1, 7)
    score, stderr = neg_clip_loss(image, text, negative_image, negative_text, temperature=0.01)
    assert torch.equal(score, torch.zeros(5))
    assert torch.equal(stderr, torch.zeros(5))
    score, _ = neg_clip_loss(
        image, text, image[None, :1], text[None, :1], temperature=0.01, member=torch.tensor([[True] + [False] * 4])
    )
    assert_close(score, torch.zeros(5), **CLOSE)


def test_the_standard_error_of_one_draw_is_nan():
    score, stderr = neg_clip_loss(*problem(4, 1, 6, 8), temperature=0.1)
    assert score.isfinite().all()
    assert stderr.isnan().all()


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float16, 2), (torch.bfloat16, 2), (torch.float16, 3)],
)
def test_scores_are_the_same_bits_however_the_rows_are_split(dtype, threads, arithmetic):
    image, text, negative_image, negative_text = problem(1001, 2, 1037, 96, dtype)
    member = torch.rand(2, 1001, generator=torch.Generator().manual_seed(5)) < 0.2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        settings = {"temperature": 0.01, "arithmetic": arithmetic}
        whole = neg_clip_loss(image, text, negative_image, negative_text, member=member, **settings)
        own = clip_score(image, text)
        bounds = [0, 1, 2, 5, 484, 965, 1000, 1001]
        for start, stop in pairwise(bounds):
            part = slice(start, stop)
            score, stderr = neg_clip_loss(
                image[part], text[part], negative_image, negative_text, member=member[:, part], **settings
            )
            assert torch.equal(score, whole[0][part])
            assert torch.equal(stderr, whole[1][part])
            assert torch.equal(clip_score(image[part], text[part]), own[part])
    finally:
        torch.set_num_threads(before)


def test_scores_follow_their_rows_and_ignore_the_order_of_the_negatives_before_the_last():
    image, text, negative_image, negative_text = problem(270, 2, 600, 48)
    score, stderr = neg_clip_loss(image, text, negative_image, negative_text, temperature=0.02)
    order = torch.randperm(270, generator=torch.Generator().manual_seed(3))
    moved = neg_clip_loss(image[order], text[order], negative_image, negative_text, temperature=0.02)
    assert torch.equal(moved[0], score[order])
    assert torch.equal(moved[1], stderr[order])
    order = torch.cat([torch.randperm(599, generator=torch.Generator().manual_seed(4)), torch.tensor([599])])
    again, _ = neg_clip_loss(image, text, negative_image[:, order], negative_text[:, order], temperature=0.02)
    assert_close(again, score, **CLOSE)


def test_bfloat16_scores_differ_from_the_equation_by_less_than_a_thousandth():
    """For both estimators, at the width and temperature of a real encoder; float32 is a thousand times closer."""
    args = problem(40, 2, 1000, 512, torch.float16)
    score, _ = neg_clip_loss(*args, temperature=0.01, arithmetic="bfloat16")
    expected, _ = oracle(*args, 0.01)
    assert 1e-6 < (score - expected).abs().max() < 1e-3
    image, text = args[2][0], args[3][0]
    settings = {"temperature": 0.01, "batch_size": 1000, "draws": 1, "seed": 0}
    rounded = neg_clip_loss_in_batches(image, text, arithmetic="bfloat16", **settings)
    exact = neg_clip_loss_in_batches(image, text, **settings)
    assert 1e-6 < (rounded - exact).abs().max() < 1e-3


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_the_mean_over_a_batch_is_minus_temperature_times_open_clips_loss(temperature):
    open_clip_loss = pytest.importorskip("open_clip.loss")
    image, text = embeddings(333, 64, seed=1), embeddings(333, 64, seed=2)
    text = torch.nn.functional.normalize(text + image, dim=-1)
    loss = open_clip_loss.ClipLoss()(image.double(), text.double(), 1 / temperature)
    member = torch.ones(1, 333, dtype=torch.bool)
    score, _ = neg_clip_loss(image, text, image[None], text[None], temperature=temperature, member=member)
    assert_close(score.double().mean(), -temperature * loss, atol=2e-7, rtol=2e-7)
    score = neg_clip_loss_in_batches(image, text, temperature=temperature, batch_size=333, draws=1, seed=0)
    assert_close(score.double().mean(), -temperature * loss, atol=2e-7, rtol=2e-7)


@given(
    rows=st.integers(1, 600),
    extra=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["random", "copies", "poles"]),
    temperature=st.one_of(st.sampled_from(TEMPERATURES), st.floats(0.001, 10)),
)
@settings(max_examples=25, deadline=None)
def test_one_batch_of_all_rows_is_the_equation_whatever_the_partition(rows, extra, dtype, kind, temperature):
    image = embeddings(rows, 20, seed=1, dtype=dtype, kind=kind)
    text = embeddings(rows, 20, seed=2, dtype=dtype, kind=kind)
    score = neg_clip_loss_in_batches(image, text, temperature=temperature, batch_size=rows + extra, draws=2, seed=0)
    s = image.double() @ text.double().T
    expected = s.diag() - temperature / 2 * ((s / temperature).logsumexp(1) + (s / temperature).logsumexp(0))
    assert_close(score, expected.clamp(max=0), **{**CLOSE, "atol": 5e-7 + 2e-7 * temperature})
    assert (score <= 0).all()


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 3), (10, 5), (700, 300), (5, 1), (9, 8)])
def test_every_batch_has_as_many_rows_as_asked_for_and_every_row_is_scored_once(rows, size):
    # With all embeddings alike a score is -τ log(terms in its sums), so it counts the terms.
    alike = torch.full((rows, 4), 0.5)
    score = neg_clip_loss_in_batches(alike, alike, temperature=1, batch_size=size, draws=3, seed=0)
    assert_close(score.exp(), torch.full((rows,), 1 / size), rtol=1e-6, atol=0)


@given(
    rows=st.integers(1, 60),
    missing=st.integers(0, 60),
    spare=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    temperature=st.one_of(st.sampled_from(TEMPERATURES), st.floats(0.001, 10)),
)
@settings(max_examples=25, deadline=None)
def test_rows_that_cannot_fill_a_batch_share_it_with_the_first_allowed_rows_of_the_fill(
    rows, missing, spare, dtype, temperature
):
    image, text, fill_image, fill_text = problem(rows, 3, missing + spare + 1, 20, dtype=dtype)
    order = torch.rand(fill_image.shape[:2], generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    allowed = order < missing + spare  # of each draw one row is forbidden
    score = neg_clip_loss_in_batches(
        image,
        text,
        temperature=temperature,
        batch_size=rows + missing,
        draws=3,
        seed=0,
        fill_image=fill_image,
        fill_text=fill_text,
        fill_allowed=allowed,
    )
    expected = torch.zeros(rows, dtype=torch.float64)
    for k in range(3):
        first = [place for place in range(missing + spare + 1) if allowed[k, place]][:missing]
        batch_image, batch_text = torch.cat([image, fill_image[k, first]]), torch.cat([text, fill_text[k, first]])
        assert len(batch_image) == rows + missing
        for i in range(rows):
            expected[i] += score_in_batch(image[i], text[i], batch_image, batch_text, temperature) / 3
    assert_close(score, expected.clamp(max=0), **{**CLOSE, "atol": 5e-7 + 2e-7 * temperature})


def test_a_fill_that_is_too_small_or_of_another_shape_is_refused():
    image, text, fill_image, fill_text = problem(4, 2, 3, 8)
    arguments = {"temperature": 0.1, "batch_size": 8, "draws": 2, "seed": 0}
    fill = {"fill_image": fill_image, "fill_text": fill_text}
    with pytest.raises(ValueError, match="fill_allowed leaves 3 rows of a draw, and each batch lacks 4"):
        neg_clip_loss_in_batches(image, text, **arguments, **fill)
    with pytest.raises(ValueError, match=r"fill_image must have shape \[K, F, d\] with K = 3"):
        neg_clip_loss_in_batches(image, text, **{**arguments, "draws": 3}, **fill)
    with pytest.raises(ValueError, match="fill_text has shape"):
        neg_clip_loss_in_batches(image, text, **arguments, **{**fill, "fill_text": fill_text[:, :2]})
    with pytest.raises(ValueError, match="fill_image and fill_text go together"):
        neg_clip_loss_in_batches(image, text, **arguments, fill_image=fill_image)
    with pytest.raises(ValueError, match=r"fill_allowed must be bool of shape \[K, F\] = \[2, 3\]"):
        neg_clip_loss_in_batches(image, text, **arguments, **fill, fill_allowed=torch.ones(2, 2, dtype=torch.bool))


def test_the_rows_of_a_batch_differ_and_each_is_in_one_batch_of_a_partition():
    # Orthogonal pairs: row i meets text j with s = 1 only for j = i, so a repeated row would count twice.
    eye = torch.eye(50)
    score = neg_clip_loss_in_batches(eye, eye, temperature=0.1, batch_size=20, draws=4, seed=3)
    once = 1 - 0.1 * torch.logsumexp(torch.tensor([10.0] + [0.0] * 19), 0)
    assert_close(score, once.expand(50), atol=1e-6, rtol=0)


def test_partitions_depend_on_the_seed_alone():
    image, text = embeddings(100, 16, seed=1), embeddings(100, 16, seed=2)

    def score(seed):
        return neg_clip_loss_in_batches(image, text, temperature=0.1, batch_size=30, draws=2, seed=seed)

    assert torch.equal(score(1), score(1))
    assert not torch.equal(score(1), score(2))


def test_partitions_estimate_what_reference_negatives_estimate():
    """Both are means over uniform batches that hold the row, so with many draws they meet."""
    image, text = embeddings(64, 16, seed=1), embeddings(64, 16, seed=2)
    draws = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(k))[:16] for k in range(100)])
    member = torch.stack([torch.isin(torch.arange(64), draw) for draw in draws])
    ours, stderr = neg_clip_loss(image, text, image[draws], text[draws], temperature=0.1, member=member)
    theirs = neg_clip_loss_in_batches(image, text, temperature=0.1, batch_size=16, draws=100, seed=0)
    assert ((ours - theirs).abs() < 7 * stderr).all()


def valid():
    image, text, negative_image, negative_text = problem(3, 2, 4, 8)
    return {
        "image": image,
        "text": text,
        "negative_image": negative_image,
        "negative_text": negative_text,
        "temperature": 0.1,
        "member": torch.zeros(2, 3, dtype=torch.bool),
    }


def with_nan(x):
    x = x.clone()
    x.flatten()[3] = torch.nan
    return x


@pytest.mark.parametrize("name", ["image", "text", "negative_image", "negative_text"])
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (with_nan, "NaN"),
        (lambda x: x / 0, "NaN or infinity"),
        (lambda x: x[..., 0], r"shape|width"),
        (lambda x: x[..., :5], r"shape|width"),
        (lambda x: x[:0], r"empty|shape"),
        (lambda x: x.half(), "dtype"),
        (lambda x: x.double(), "float32 tensor"),
        (lambda x: x.to("meta"), "device"),
        (lambda x: x[:, :2], "shape|width"),
    ],
)
def test_an_unusable_tensor_is_refused_by_name(name, break_it, reason):
    args = valid()
    args[name] = break_it(args[name])
    with pytest.raises(ValueError, match=reason) as error:
        neg_clip_loss(**args)
    assert any(word in str(error.value) for word in [name, "text has", "negative_text has"])
    assert name in str(error.value)


@pytest.mark.parametrize("temperature", [0, -1, 0.0009, 10.1, float("nan"), float("inf")])
def test_a_temperature_outside_the_range_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must lie between"):
        neg_clip_loss(**{**valid(), "temperature": temperature})
    with pytest.raises(ValueError, match="temperature must lie between"):
        neg_clip_loss_in_batches(
            valid()["image"], valid()["text"], temperature=temperature, batch_size=2, draws=1, seed=0
        )


@pytest.mark.parametrize(
    "member", [torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)]
)
def test_a_member_mask_of_the_wrong_shape_or_dtype_is_refused(member):
    with pytest.raises(ValueError, match=r"member must be bool of shape \[K, n\] = \[2, 3\]"):
        neg_clip_loss(**{**valid(), "member": member})


@pytest.mark.parametrize("name", ["batch_size", "draws"])
def test_no_batch_and_no_draw_are_refused(name):
    settings = {"temperature": 0.1, "batch_size": 2, "draws": 1, "seed": 0, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        neg_clip_loss_in_batches(valid()["image"], valid()["text"], **settings)


def test_text_of_another_length_is_refused():
    image, text = valid()["image"], valid()["text"][:2]
    with pytest.raises(ValueError, match="text has shape"):
        clip_score(image, text)
    with pytest.raises(ValueError, match="text has shape"):
        neg_clip_loss_in_batches(image, text, temperature=0.1, batch_size=2, draws=1, seed=0)


PEAK = """
import torch
from selection import neg_clip_loss, neg_clip_loss_in_batches, nearest_target, norm_sim, clip_score

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def score_all(image, text, target):
    clip_score(image, text)
    neg_clip_loss(image, text, target[None], target[None], temperature=0.01)
    neg_clip_loss_in_batches(image, text, temperature=0.01, batch_size=512, draws=1, seed=0)
    nearest_target(image, target)
    norm_sim(image, target, p=2)

torch.set_num_threads(1)
target = torch.full((512, 64), 1 / 8, dtype=torch.float16)
image = torch.full((100_000, 64), 1 / 8, dtype=torch.float16)
text = torch.full((100_000, 64), 1 / 8, dtype=torch.float16)
score_all(image[:1000], text[:1000], target)
before = status("VmRSS")
score_all(image, text, target)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_beyond_the_inputs_does_not_grow_with_the_rows():
    """The similarities of 100,000 rows would take 200 MB and a float32 copy of an input 25 MB."""
    child = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert float(child.stdout) < 20
