"""Tiled reductions over similarity matrices that are never stored whole, and their kernels."""
