"""The world outside: raw pools, encoders, targets, files.

Nothing here knows Dagster's asset layer or the science in `selection`.
"""
