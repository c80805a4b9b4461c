"""Raw pools, models, targets, the lake and the catalog.

Independent of Dagster's asset layer and of `selection`.
"""
