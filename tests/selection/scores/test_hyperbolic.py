"""HYPE's parts against its equations in float64, and where those equations have no value in floating point."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from selection.scores.hyperbolic import (
    cosine,
    exterior_angle,
    half_aperture,
    image_specificity,
    lorentz_distance,
    text_specificity,
)
from tests.support.hyperbolic import (
    published_aperture,
    published_distance,
    published_exterior,
    published_image_specificity,
    published_text_specificity,
)

sizes = {
    "rows": st.integers(1, 40),
    "width": st.integers(1, 24),
    "curvature": st.floats(0.05, 4),
    "length": st.floats(0.3, 4),
}


def points(rows, width, *, seed, length=1.0, dtype=torch.float64):
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * length).to(dtype)


# The equations as they are published, for points that are no special case


@given(**sizes)
@settings(max_examples=40, deadline=None)
def test_the_distance_is_the_published_one(rows, width, curvature, length):
    x, y = points(rows, width, seed=1, length=length), points(rows, width, seed=2, length=length)
    expected = torch.from_numpy(published_distance(x.numpy(), y.numpy(), curvature))
    # arccosh loses half the digits near 1, in the oracle
    assert_close(lorentz_distance(x, y, curvature), expected, atol=1e-6, rtol=1e-7)


@given(references=st.integers(1, 60), **sizes)
@settings(max_examples=40, deadline=None)
def test_the_exterior_angle_is_the_published_one(rows, references, width, curvature, length):
    x, y = points(references, width, seed=1, length=length), points(rows, width, seed=2, length=length)
    expected = published_exterior(x.numpy(), y.numpy(), curvature)
    found = exterior_angle(x, y, curvature).numpy()
    assert found.shape == (rows, references)
    known = np.isfinite(expected)
    # arccos loses half the digits near ±1, in the oracle: the cosines are what can be compared
    np.testing.assert_allclose(np.cos(found[known]), np.cos(expected[known]), atol=1e-7)
    assert ((found >= 0) & (found <= math.pi)).all()


@given(references=st.integers(1, 40), **sizes)
@settings(max_examples=25, deadline=None)
def test_both_specificities_have_the_caption_as_the_apex(rows, references, width, curvature, length):
    x, r = points(rows, width, seed=1, length=length), points(references, width, seed=2, length=length)
    with np.errstate(invalid="ignore"):
        of_images = published_image_specificity(x.numpy(), r.numpy(), curvature)
        if np.isfinite(of_images).all():
            assert_close(image_specificity(x, r, curvature), torch.from_numpy(of_images), atol=1e-6, rtol=0)
    try:
        of_texts = published_text_specificity(x.numpy(), r.numpy(), curvature)
    except ValueError:  # an arcsin or arccos beyond 1
        return
    assert_close(text_specificity(x, r, curvature), torch.from_numpy(of_texts), atol=1e-6, rtol=0)


@given(width=st.integers(1, 12), curvature=st.floats(0.05, 4), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_caption_farther_out_is_more_specific(width, curvature, seed):
    direction, images = points(1, width, seed=seed), points(30, width, seed=seed + 1)
    distances = torch.linspace(0, 12, 40, dtype=torch.float64)[:, None]
    found = text_specificity(direction / direction.norm() * distances, images, curvature)
    assert found[0].item() == pytest.approx(0)  # at the origin: a right angle, and a cone that is all of one side
    assert (found.diff() >= -1e-9).all()
    assert found[-1] > found[0] + 0.5


@pytest.mark.parametrize("specificity", [image_specificity, text_specificity])
def test_specificity_does_not_depend_on_how_references_are_split(monkeypatch, specificity):
    x, y = points(50, 8, seed=1), points(7, 8, seed=2)
    whole = specificity(y, x, 1.0)
    monkeypatch.setattr("selection.scores.hyperbolic._PAIRS", 21)
    assert_close(specificity(y, x, 1.0), whole, atol=1e-14, rtol=0)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 3.0])
def test_a_small_distance_is_the_euclidean_one_to_all_digits(curvature):
    x = torch.zeros(1, 3, dtype=torch.float64)
    for step in (1e-3, 1e-6, 1e-9, 1e-12):
        y = torch.tensor([[step, 0, 0]], dtype=torch.float64)
        assert lorentz_distance(x, y, curvature).item() == pytest.approx(
            math.asinh(math.sqrt(curvature) * step) / math.sqrt(curvature), rel=1e-14
        )


def test_near_points_far_from_the_origin_are_apart_although_the_published_equation_says_nought():
    # Along a circle of radius ρ, sinh ρ = 50: an arc of length 50 α for a small angle α.
    angle = 1e-9
    x = torch.tensor([[50.0, 0]], dtype=torch.float64)
    y = torch.tensor([[50 * math.cos(angle), 50 * math.sin(angle)]], dtype=torch.float64)
    assert published_distance(x.numpy(), y.numpy(), 1.0)[0] != pytest.approx(50 * angle, rel=1e-3)
    assert lorentz_distance(x, y, 1.0).item() == pytest.approx(50 * angle, rel=1e-6)


@given(width=st.integers(1, 8), curvature=st.floats(0.05, 4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_distance_is_symmetric_and_keeps_the_triangle_inequality(width, curvature, seed):
    x, y, z = (points(20, width, seed=3 * seed + part) for part in range(3))
    there = lorentz_distance(x, y, curvature)
    assert_close(there, lorentz_distance(y, x, curvature), atol=1e-12, rtol=0)
    around = lorentz_distance(x, z, curvature) + lorentz_distance(z, y, curvature)
    assert (there <= around + 1e-12).all()


def test_a_point_on_the_way_out_has_angle_nought_and_one_behind_a_straight_angle():
    apex = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    ahead, behind, opposite = 2 * apex, apex / 2, -apex
    found = exterior_angle(apex, torch.cat([ahead, behind, opposite]), 1.0)[:, 0]
    assert_close(found, torch.tensor([0.0, math.pi, math.pi], dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_has_no_value_by_the_published_equations_has_one_here(dtype):
    point = points(1, 6, seed=1, dtype=dtype)
    odd = torch.cat([point, point, torch.zeros_like(point), point * 1e-4, point * 1e3, -point])
    published = published_exterior(odd.double().numpy(), odd.double().numpy(), 1.0)
    assert np.isnan(published).any()
    assert np.isnan(published_aperture(odd.double().numpy(), 1.0)).any()
    for values in (
        exterior_angle(odd, odd, 1.0),
        half_aperture(odd, 1.0),
        image_specificity(odd, odd, 1.0),
        text_specificity(odd, odd, 1.0),
        lorentz_distance(odd, odd.flip(0), 1.0),
        cosine(odd, odd.flip(0)),
    ):
        assert values.dtype == torch.float64
        assert torch.isfinite(values).all()
    assert (lorentz_distance(odd, odd, 1.0) == 0).all()
    assert exterior_angle(odd, odd, 1.0)[0, 0].item() == pytest.approx(0, abs=1e-7)
    assert half_aperture(odd, 1.0)[2].item() == half_aperture(odd, 1.0)[3].item() == math.pi / 2


def test_a_general_caption_is_less_specific_than_a_precise_one():
    # Images in all directions, far out; a caption near the origin entails them, one far out but few.
    images = points(200, 6, seed=1)
    images = images / images.norm(dim=1, keepdim=True) * 3
    captions = torch.tensor([[0.05, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    general, precise = text_specificity(captions, images, 1.0)
    assert general < precise
    general, precise = (image_specificity(images, caption[None], 1.0).mean() for caption in captions)
    assert general < precise


def test_the_cosine_of_spatial_parts_is_that_of_their_directions():
    x, y = points(30, 5, seed=1), points(30, 5, seed=2)
    expected = torch.nn.functional.cosine_similarity(x, y)
    assert_close(cosine(x, y), expected, atol=1e-14, rtol=0)
