"""Comparisons of a subset's versions."""

from pathlib import Path

import pyarrow.parquet as pq

from tests.support.scenario import Scenario


def assert_same_bytes(scenario: Scenario, recipe: str, folder: Path) -> None:
    """Check that a folder holds the subset and manifest of a recipe's newest version, byte for byte and row for row."""
    version = scenario.subset(recipe)
    assert Path(version.uids).read_bytes() == (folder / "subset.npy").read_bytes()
    assert pq.read_table(version.manifest).equals(pq.read_table(folder / "manifest.parquet"))
