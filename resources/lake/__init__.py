"""The lake: atomic files with provenance, versions of subsets, and scratch files of long computations."""
