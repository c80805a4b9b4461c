"""Evaluations: which subset trains the better model, with lineage like any other asset."""
