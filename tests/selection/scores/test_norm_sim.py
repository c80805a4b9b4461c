"""NormSim against float64; tolerances as float32 rounding gives them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from selection import nearest_target, norm_sim, norm_sim_from_moment, second_moment
from selection.scores.norm_sim import same_images
from selection.similarity.reduction import PowerSum, Tiles, spans

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def embeddings(rows, width, *, seed, dtype=torch.float32):
    rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


sizes = {
    "rows": st.integers(1, 300),
    "targets": st.integers(1, 1100),
    "width": st.integers(1, 70),
    "dtype": st.sampled_from(DTYPES),
}


@given(**sizes)
@settings(max_examples=25, deadline=None)
def test_norm_sim_2_is_the_root_of_the_sum_of_squares(rows, targets, width, dtype):
    image, target = embeddings(rows, width, seed=1, dtype=dtype), embeddings(targets, width, seed=2, dtype=dtype)
    score = norm_sim(image, target, p=2)
    assert score.dtype == torch.float32
    expected = (image.double() @ target.double().T).norm(dim=1)
    assert_close(score.double(), expected, atol=1e-6 * math.sqrt(targets), rtol=0)


@given(**sizes)
@settings(max_examples=25, deadline=None)
def test_norm_sim_inf_is_the_largest_absolute_similarity(rows, targets, width, dtype):
    image, target = embeddings(rows, width, seed=1, dtype=dtype), embeddings(targets, width, seed=2, dtype=dtype)
    score = norm_sim(image, target, p=math.inf)
    expected = (image.double() @ target.double().T).abs()
    assert score.dtype == torch.float32
    assert_close(score.double(), expected.amax(1), atol=5e-7, rtol=0)
    value, index = nearest_target(image, target)
    assert torch.equal(value, score)
    assert_close(expected.gather(1, index[:, None])[:, 0], expected.amax(1), atol=5e-7, rtol=0)


def test_an_opposite_target_is_as_near_as_an_equal_one():
    image = embeddings(1, 16, seed=1)
    value, index = nearest_target(image, torch.cat([embeddings(700, 16, seed=2), -image]))
    assert index.tolist() == [700]
    assert_close(value, torch.ones(1))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_lowest_of_equally_near_targets_is_named(threads):
    image = embeddings(300, 33, seed=1)
    # Copies and opposites of one vector, in places where a matrix product may take different paths.
    nearest = embeddings(1, 33, seed=3)
    target = torch.cat([nearest * sign for sign in (1, -1)] * 600)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert nearest_target(image, target)[1].unique().tolist() == [0]
        target[:2] = 0
        assert nearest_target(image, target)[1].unique().tolist() == [2]
    finally:
        torch.set_num_threads(before)


def test_an_image_orthogonal_to_every_target_scores_almost_zero():
    eye = torch.eye(64)
    target = eye[:32].repeat(50, 1)
    assert (norm_sim(eye[32:], target, p=2) < 1e-6 * math.sqrt(len(target))).all()
    assert torch.equal(norm_sim(eye[32:], target, p=math.inf), torch.zeros(32))


def test_the_power_sum_is_the_brute_force_of_norm_sim_2_and_the_norm_for_other_powers():
    image, target = embeddings(250, 48, seed=1), embeddings(1300, 48, seed=2)
    tiles = Tiles(image)
    for p in (1, 2, 3.5):
        score = torch.empty(250)
        for at in spans(250, tiles.height):
            total = PowerSum(tiles.height, p, image.device)
            for _, similarities in tiles.similarities(tiles.rows(image, at), target):
                total.update(similarities)
            score[at] = total.value()[: at.stop - at.start]
        expected = (image.double() @ target.double().T).norm(p, dim=1).float()
        assert_close(score, expected, rtol=1e-6, atol=0)
        if p == 2:
            assert_close(score, norm_sim(image, target, p=2), rtol=1e-6, atol=0)


def test_the_second_moment_is_symmetric_and_serves_many_calls():
    image, target = embeddings(10, 24, seed=1), embeddings(9000, 24, seed=2, dtype=torch.float16)
    moment = second_moment(target)
    assert moment.dtype == torch.float64
    assert torch.equal(moment, moment.T)
    assert_close(moment, target.double().T @ target.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(norm_sim_from_moment(image.half(), moment), norm_sim(image.half(), target, p=2))


@pytest.mark.parametrize(("p", "arithmetic"), [(2, "float32"), (math.inf, "float32"), (math.inf, "bfloat16")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_the_same_bits_however_the_rows_are_split(p, arithmetic, dtype):
    image, target = embeddings(1001, 97, seed=1, dtype=dtype), embeddings(1037, 97, seed=2, dtype=dtype)
    rounds = {"arithmetic": arithmetic}
    whole, (_, nearest) = norm_sim(image, target, p=p, **rounds), nearest_target(image, target, **rounds)
    bounds = [0, 1, 2, 5, 484, 965, 1000, 1001]
    for start, stop in pairwise(bounds):
        assert torch.equal(norm_sim(image[start:stop], target, p=p, **rounds), whole[start:stop])
        assert torch.equal(nearest_target(image[start:stop], target, **rounds)[1], nearest[start:stop])


def test_scores_follow_their_rows_and_ignore_the_order_of_targets():
    image, target = embeddings(270, 40, seed=1), embeddings(700, 40, seed=2)
    rows = torch.randperm(270, generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(700, generator=torch.Generator().manual_seed(2))
    for p in (2, math.inf):
        score = norm_sim(image, target, p=p)
        assert torch.equal(norm_sim(image[rows], target, p=p), score[rows])
        assert_close(norm_sim(image, target[columns], p=p), score, rtol=1e-6, atol=0)
    assert torch.equal(columns[nearest_target(image, target[columns])[1]], nearest_target(image, target)[1])


@pytest.mark.parametrize("p", [0, 1, 3, -math.inf, math.nan])
def test_other_powers_are_refused(p):
    image = embeddings(2, 4, seed=1)
    with pytest.raises(ValueError, match="p must be 2 or infinity"):
        norm_sim(image, image, p=p)


@pytest.mark.parametrize("score", [lambda *a: norm_sim(*a, p=2), nearest_target])
@pytest.mark.parametrize("name", ["image", "target"])
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda x: x * math.nan, "NaN"),
        (lambda x: x / 0, "infinity"),
        (lambda x: x[0], "shape"),
        (lambda x: x[:, :3], "width"),
        (lambda x: x[:0], "empty"),
        (lambda x: x[:, :0], "empty"),
        (lambda x: x.half(), "dtype"),
        (lambda x: x.long(), "float32 tensor"),
        (lambda x: x.to("meta"), "device"),
    ],
)
def test_an_unusable_tensor_is_refused_by_name(score, name, break_it, reason):
    args = {"image": embeddings(5, 8, seed=1), "target": embeddings(6, 8, seed=2)}
    args[name] = break_it(args[name])
    with pytest.raises(ValueError, match=reason) as error:
        score(args["image"], args["target"])
    assert name in str(error.value)


@pytest.mark.parametrize("width", [8, 512])
def test_copies_of_targets_are_found_whatever_rounding_does_to_their_norm(width):
    target = embeddings(400, width, seed=1, dtype=torch.float16)
    image = torch.cat([target[::2], embeddings(300, width, seed=2, dtype=torch.float16)])
    near = torch.nn.functional.normalize(target[:50].double() + 0.02 * embeddings(50, width, seed=3).double(), dim=1)
    image = torch.cat([image, near.half()])
    value, nearest = nearest_target(image, target)
    unit = [torch.nn.functional.normalize(side.double(), dim=1) for side in (image, target)]
    expected = (unit[0] @ unit[1].T).abs().max(1).values > 0.99999
    found = same_images(image, target, nearest, value)
    assert found.tolist() == expected.tolist()
    assert found[:200].all()
    assert not found[500:].any()
    assert (value[:200] < 0.99999).any()  # a bound on the product alone would miss some copies


@pytest.mark.parametrize("moment", [torch.eye(7).double(), torch.eye(8), torch.eye(8).double() * math.nan])
def test_an_unusable_second_moment_is_refused(moment):
    with pytest.raises(ValueError, match="moment"):
        norm_sim_from_moment(embeddings(5, 8, seed=1), moment)
