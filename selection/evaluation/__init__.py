"""Comparison of subsets by the models trained on them: which samples, which difference, how much to keep."""
