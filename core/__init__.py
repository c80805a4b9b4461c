"""Foundations that every other package uses: errors, hashes, SQL text and uids.

Modules here import numpy, DuckDB and the standard library, and nothing of this project.
"""
