"""HYPE's equations as published, in float64 NumPy; NaN where they have no value in floating point."""

import math

import numpy as np


def time_part(x, c):
    """Return the time coordinate of points x [n, d] at curvature -c: [n]."""
    return np.sqrt(1 / c + (x**2).sum(-1))


def inner(x, y, c):
    """Return the Lorentzian inner product of every x [n, d] with every y [m, d]: [n, m]."""
    return x @ y.T - time_part(x, c)[:, None] * time_part(y, c)[None, :]


def published_distance(x, y, c):
    """Return the distance of x and y, row by row: [n]."""
    return np.arccosh(np.maximum(1, -c * np.diag(inner(x, y, c)))) / math.sqrt(c)


def published_aperture(x, c, k=0.1):
    """Return the half aperture of the entailment cone at every x: [n]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.arcsin(2 * k / (math.sqrt(c) * np.linalg.norm(x, axis=1)))


def published_exterior(x, y, c):
    """Return the exterior angle of every point y [n, d] at every apex x [m, d]: [n, m]."""
    product = c * inner(x, y, c)
    on = time_part(y, c)[None, :] + time_part(x, c)[:, None] * product
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.arccos(on / (np.linalg.norm(x, axis=1)[:, None] * np.sqrt(product**2 - 1))).T


def published_image_specificity(images, reference_captions, c, k=0.1):
    """Return ε_image: the mean over reference captions r of exterior(r, image) - aperture(r), [n]."""
    angles = published_exterior(reference_captions, images, c)  # [n, m]
    return (angles - published_aperture(reference_captions, c, k)[None, :]).mean(1)


def published_text_specificity(captions, reference_images, c, k=0.1):
    """Return ε_text: the mean over reference images r of exterior(caption, r) - aperture(caption), [n].

    Computed number by number and apart from the functions above, so that no mistake in an axis is shared.
    """
    result = []
    for t in captions.tolist():
        length = math.sqrt(sum(value * value for value in t))
        time = math.sqrt(1 / c + length * length)
        aperture = math.asin(2 * k / (math.sqrt(c) * length))
        total = 0.0
        for r in reference_images.tolist():
            r_time = math.sqrt(1 / c + sum(value * value for value in r))
            product = c * (sum(a * b for a, b in zip(t, r, strict=True)) - time * r_time)
            total += math.acos((r_time + time * product) / (length * math.sqrt(product * product - 1))) - aperture
        result.append(total / len(reference_images))
    return np.array(result)
