"""Readers of raw pools, one module per format."""
