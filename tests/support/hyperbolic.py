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
