"""HYPE's parts, from hyperbolic embeddings (arXiv 2404.17507; entailment cones as in MERU, arXiv 2304.09172).

Here: distances, cones and specificity in the Lorentz model. Not here: a hyperbolic encoder, and the cluster term.

A point is given by its spatial part x in R^d; with curvature -c its time part is sqrt(1/c + |x|²). In units of 1/√c,
its radius ρ from the origin has sinh ρ = √c |x|. The code uses radii and the angle θ between directions:

    cosh d = cosh(ρ_x - ρ_y) + sinh ρ_x sinh ρ_y (1 - cos θ)
    exterior(x, y) = atan2(sinh ρ_y sin θ, cosh ρ_x sinh ρ_y cos θ - sinh ρ_x cosh ρ_y)

These equal the published distance and angle, by the laws of a hyperbolic triangle with one corner at the origin. In
this form nothing is divided by a distance and no cosine leaves [-1, 1], so equal points, points at the origin, and
points too near to it for a cone have finite values. Everything is computed in float64.
"""

import math

import torch
from torch import Tensor

APEX_RADIUS = 0.1
"""K of the paper: below the radius 2K (in units of 1/√c) the half-aperture of a cone is π/2."""

_PAIRS = 1 << 21  # of points and references in memory
_ONE_DIRECTION = 1e-14  # values of 1 - cos θ below this are rounding: the directions are equal


def lorentz_distance(x: Tensor, y: Tensor, curvature: float) -> Tensor:
    """Compute the length of the geodesic from each x to its y.

    Args:
        x: spatial parts [n, d].
        y: spatial parts [n, d].
        curvature: c > 0, of a space of curvature -c.

    Returns:
        d_L, float64 [n], at least 0.
    """
    (a, a_way), (b, b_way) = _polar(x, curvature), _polar(y, curvature)
    between = torch.asinh(a) - torch.asinh(b)
    # cosh d - 1 as a sum of terms that are never negative, so small distances keep all their digits
    excess = 2 * torch.sinh(between / 2) ** 2 + a * b * (a_way - b_way).square().sum(1) / 2
    return 2 * torch.asinh(torch.sqrt(excess / 2)) / math.sqrt(curvature)


def half_aperture(x: Tensor, curvature: float, apex_radius: float = APEX_RADIUS) -> Tensor:
    """Compute the half-aperture of each point's entailment cone: arcsin(2K / (√c |x|)), π/2 where that is undefined.

    Args:
        x: spatial parts [n, d].
        curvature: c.
        apex_radius: K.

    Returns:
        Radians, float64 [n], in (0, π/2].
    """
    radius, _ = _polar(x, curvature)
    return torch.asin((2 * apex_radius / radius).clamp(max=1))


def exterior_angle(x: Tensor, y: Tensor, curvature: float) -> Tensor:
    """Compute the angle at each x between the ray from the origin through x and the geodesic to each y.

    Args:
        x: spatial parts of the cones' apexes, [m, d].
        y: spatial parts [n, d].
        curvature: c.

    Returns:
        Radians, float64 [n, m], in [0, π]; 0 where x equals y, and π/2 where x is the origin.
    """
    (a, a_way), (b, b_way) = _polar(x, curvature), _polar(y, curvature)
    b = b[:, None]
    cosine = (b_way @ a_way.T).clamp(-1, 1)
    cosine = torch.where(cosine > 1 - _ONE_DIRECTION, 1.0, cosine)
    sine = torch.sqrt((1 - cosine) * (1 + cosine))
    on = torch.sinh(torch.asinh(b) - torch.asinh(a)) - torch.hypot(a, torch.ones_like(a)) * b * (1 - cosine)
    return torch.atan2(b * sine, on)


def image_specificity(images: Tensor, captions: Tensor, curvature: float, apex_radius: float = APEX_RADIUS) -> Tensor:
    """Compute how far images lie outside the cones of reference captions.

    Args:
        images: spatial parts [n, d].
        captions: spatial parts of the reference captions [m, d].
        curvature: c.
        apex_radius: K.

    Returns:
        ε_image, float64 [n], in [-π/2, π]: the mean over captions r of exterior(r, image) - aperture(r). It is small
        for an image that many captions entail.
    """
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for some in captions.split(_references_at_once(images)):
        total += (exterior_angle(some, images, curvature) - half_aperture(some, curvature, apex_radius)).sum(1)
    return total / len(captions)


def text_specificity(captions: Tensor, images: Tensor, curvature: float, apex_radius: float = APEX_RADIUS) -> Tensor:
    """Compute how far reference images lie outside the cones of captions.

    The caption is the apex here too, because text entails image.

    Args:
        captions: spatial parts [n, d].
        images: spatial parts of the reference images [m, d].
        curvature: c.
        apex_radius: K.

    Returns:
        ε_text, float64 [n], in [-π/2, π]: the mean over images r of exterior(caption, r) - aperture(caption). It is
        small for a caption that entails many images, and rises with the caption's distance from the origin.
    """
    total = torch.zeros(len(captions), dtype=torch.float64, device=captions.device)
    for some in images.split(_references_at_once(captions)):
        total += exterior_angle(captions, some, curvature).sum(0)
    return total / len(images) - half_aperture(captions, curvature, apex_radius)


def _references_at_once(points: Tensor) -> int:
    return max(1, _PAIRS // max(1, len(points)))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Compute the cosine of each pair's spatial parts, float64 [n]; 0 where one is the origin."""
    return (_polar(x, 1.0)[1] * _polar(y, 1.0)[1]).sum(1)


def _polar(x: Tensor, curvature: float) -> tuple[Tensor, Tensor]:
    """Return sinh of the radius [n] and the direction [n, d], zero for the origin."""
    wide = x.double()
    length = torch.linalg.vector_norm(wide, dim=1)
    return math.sqrt(curvature) * length, wide / torch.where(length > 0, length, 1)[:, None]
