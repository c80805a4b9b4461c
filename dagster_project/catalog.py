"""The catalog from Python, for notebooks: every question of `catalog.duckdb` as a method that gives a DataFrame.

    from dagster_project.catalog import open_catalog

    catalog = open_catalog("config/demo.yaml")
    catalog.diff("clip_score_30", "v0001", "v0002")

Here: nothing but the calls; the answers are SQL macros (`resources.catalog.build`, `docs/lineage.md`).
"""

from pathlib import Path
from typing import Any

import polars as pl

from assets.settings import open_project
from dagster_project.definitions import config_path
from resources.catalog.build import read_catalog


def open_catalog(config: Path | str | None = None) -> "Catalog":
    """Open the catalog of a project.

    Args:
        config: the project's YAML; without it the one that the environment names, else the demo's.

    Raises:
        ConfigError: see `assets.settings.load_settings`.
    """
    return Catalog(open_project(Path(config or config_path())).catalog_path())


class Catalog:
    """Questions to a catalog. It is opened for each, so that a newer catalog is seen as soon as it is there.

    Args:
        path: of `catalog.duckdb`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def sql(self, query: str, **parameters: Any) -> pl.DataFrame:
        """Run a query; `$name` in it stands for the parameter of that name.

        Raises:
            FileNotFoundError: there is no catalog yet.
        """
        with read_catalog(self.path) as con:
            return con.sql(query, params=parameters).pl()

    def versions(self, subset: str) -> pl.DataFrame:
        """List a subset's versions, oldest first."""
        return self.sql("FROM versions($subset)", subset=subset)

    def lineage(self, subset: str, version: str | None = None) -> pl.DataFrame:
        """Say what a version was made from, as rows of what, name and value; without a version, of the newest."""
        return self.sql("FROM lineage($subset, $version)", subset=subset, version=version)

    def diff(self, subset: str, a: str, b: str) -> pl.DataFrame:
        """Say what entered and what left from version `a` to version `b`, and for each the step and the reason."""
        return self.sql("FROM diff($subset, $a, $b)", subset=subset, a=a, b=b)

    def explain(self, uid: str) -> pl.DataFrame:
        """Say what each step of each recipe did with a sample: value, threshold, verdict, nearest target."""
        return self.sql("FROM explain($uid)", uid=uid)

    def overlap(self, a: str, b: str) -> pl.DataFrame:
        """Count the rows that the current versions of two subsets share."""
        return self.sql("FROM overlap($a, $b)", a=a, b=b)
