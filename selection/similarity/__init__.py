"""Tiled reductions over similarities that are never held whole, and their kernels."""
