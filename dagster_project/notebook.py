"""A project in a notebook: its pool, scores, subsets and their history as Polars frames.

    from dagster_project.notebook import open_project

    project = open_project("config/demo.yaml")
    project.scores("neg_clip_loss/tiny", where="width >= 200", limit=1000)

`docs/python.md` shows every method. Here: calls of the catalog. Not here: SQL of the answers (`resources.catalog`).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from core import sql
from core.errors import UserError
from dagster_project.location import config_path, lake_of
from resources.catalog.build import read_catalog
from resources.lake.versions import Version, Versions

if TYPE_CHECKING:
    from dagster_project.browser.queries import Query
    from resources.training.subset_samples import SubsetSamples

MAX_ROWS = 5_000_000
"""Rows that a method returns at most, unless it is asked for more."""

IDENTITY = ("uid", "shard", "key")
"""Columns that `scores` puts before the scores."""

KEYS = ("uid", "f0", "f1", "shard", "key")
"""Columns of the catalog's view `scores` that are no scores."""


class NotebookError(UserError):
    """A score or a version does not exist, or a result is too large."""


def open_project(config: Path | str | None = None, *, max_rows: int | None = MAX_ROWS) -> "Project":
    """Open a project for reading.

    Args:
        config: the project's YAML; by default the one in the environment variable CLIP_SELECTION_CONFIG, else the
            demo's.
        max_rows: largest result of `pool`, `scores`, `subset` and `sql`; None for no limit.

    Raises:
        ConfigError: the YAML is missing or wrong.
    """
    return Project(Path(config or config_path()), max_rows)


class Project:
    """A project, for reading. Methods about rows return Polars frames; `.to_arrow()` of a frame is its Arrow table.

    The catalog is opened for every call, so an answer always comes from the newest one.

    Args:
        config: the project's YAML.
        max_rows: largest result in rows; None for no limit.
    """

    def __init__(self, config: Path, max_rows: int | None = MAX_ROWS) -> None:
        self.config = config
        self.lake = lake_of(config)
        self.catalog = self.lake.catalog
        self.max_rows = max_rows

    @cached_property
    def browse(self) -> "Query":
        """All rows of the pool, to be filtered and sorted: `browse.where(...).order_by(...).to_polars()`."""
        from assets.settings import open_project as open_context
        from dagster_project.browser.queries import Query, Table

        return Query(Table(open_context(self.config)))

    # Rows

    def pool(
        self, *, columns: Sequence[str] | None = None, where: str | None = None, limit: int | None = None
    ) -> pl.DataFrame:
        """Return rows of the pool.

        Args:
            columns: to read; by default all.
            where: a DuckDB predicate over the pool's columns.
            limit: rows at most.

        Raises:
            NotebookError: more than `max_rows` rows.
        """
        return self._collect(_select("pool", columns, where, limit))

    def scan_pool(self, *, columns: Sequence[str] | None = None, where: str | None = None) -> pl.LazyFrame:
        """Return the pool as a lazy frame: rows are read when it is collected, and only the columns in use."""
        return self._scan(_select("pool", columns, where, None))

    def scores(
        self,
        *names: str,
        columns: Sequence[str] = IDENTITY,
        where: str | None = None,
        limit: int | None = None,
    ) -> pl.DataFrame:
        """Return scores with the rows that they belong to; a score that is not computed yet is null.

        Args:
            names: of scores, as in recipes; by default all.
            columns: of the pool, before the scores.
            where: a DuckDB predicate over the pool's columns and all scores; quote names that contain a slash.
            limit: rows at most.

        Raises:
            NotebookError: an unknown score, or more than `max_rows` rows.
        """
        return self._collect(_select("pool_scores", [*columns, *self._known(names)], where, limit))

    def scan_scores(self, *names: str, columns: Sequence[str] = IDENTITY, where: str | None = None) -> pl.LazyFrame:
        """Return scores as a lazy frame; see `scores`."""
        return self._scan(_select("pool_scores", [*columns, *self._known(names)], where, None))

    def subset(
        self,
        recipe: str,
        version: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        where: str | None = None,
        limit: int | None = None,
    ) -> pl.DataFrame:
        """Return the selected rows of a subset: uid, shard, key, and value and rank at every step.

        Args:
            recipe: name of the recipe.
            version: such as v0001; by default the newest.
            columns: to read; by default all.
            where: a DuckDB predicate over the columns.
            limit: rows at most.

        Raises:
            NotebookError: the recipe has no version, or more than `max_rows` rows.
            LakeError: it has no such version.
        """
        return self._collect(_select(self._manifest(recipe, version), columns, where, limit))

    def scan_subset(
        self,
        recipe: str,
        version: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        where: str | None = None,
    ) -> pl.LazyFrame:
        """Return the selected rows of a subset as a lazy frame; see `subset`."""
        return self._scan(_select(self._manifest(recipe, version), columns, where, None))

    def training_samples(
        self, recipe: str, version: str | None = None, *, seed: int = 0, shuffle: bool = True
    ) -> "SubsetSamples":
        """Return the samples of a subset as a source for a webdataset pipeline, read from the pool without an export.

        Args:
            recipe: name of the recipe.
            version: such as v0001; by default the newest.
            seed: of the order.
            shuffle: whether every epoch has another order.

        Raises:
            NotebookError: the recipe has no version, or the pool has no images.
            LakeError: it has no such version.
        """
        from assets.settings import open_project as open_context
        from resources.training.subset_samples import SubsetSamples

        pool = open_context(self.config).pool
        if not pool.has_images:
            raise NotebookError(f"{pool.settings.path}: this pool has no images. Remedy: train on the downloaded ones")
        return SubsetSamples(pool, self.lake, self._version(recipe, version), seed=seed, shuffle=shuffle)

    # Subsets and their history

    def subsets(self) -> pl.DataFrame:
        """Return one row for each recipe with a version: its newest version, rows, sources and fingerprint."""
        return self.sql("FROM subsets WHERE current")

    def versions(self, recipe: str) -> pl.DataFrame:
        """Return the versions of a subset, oldest first."""
        return self.sql("FROM versions($recipe)", recipe=recipe)

    def lineage(self, recipe: str, version: str | None = None) -> pl.DataFrame:
        """Return everything that a version was made from, as rows of what, name, value; by default the newest."""
        return self.sql("FROM lineage($recipe, $version)", recipe=recipe, version=version)

    def diff(self, recipe: str, a: str, b: str) -> pl.DataFrame:
        """Return the rows that entered or left from version `a` to version `b`, each with its step and reason."""
        return self.sql("FROM diff($recipe, $a, $b)", recipe=recipe, a=a, b=b)

    def overlap(self, a: str, b: str) -> pl.DataFrame:
        """Return how many rows the newest versions of two recipes have in common, and their Jaccard index."""
        return self.sql("FROM overlap($a, $b)", a=a, b=b)

    def explain(self, uid: str) -> pl.DataFrame:
        """Return a row for each step of each recipe: the sample's value, the threshold, and the verdict."""
        return self.sql("FROM explain($uid)", uid=uid)

    def sql(self, query: str, **parameters: object) -> pl.DataFrame:
        """Return the rows of a DuckDB query over the catalog, in which `$name` stands for the parameter `name`.

        Raises:
            FileNotFoundError: there is no catalog yet.
            NotebookError: more than `max_rows` rows.
        """
        return self._collect(query, parameters)

    def _collect(self, query: str, parameters: dict[str, object] | None = None) -> pl.DataFrame:
        with read_catalog(self.catalog) as con:
            found = con.sql(query, params=parameters or None)
            if self.max_rows is None:
                return found.pl()
            rows = found.limit(self.max_rows + 1).pl()
        if len(rows) > self.max_rows:
            raise NotebookError(
                f"the result has more than {self.max_rows:,} rows. Remedy: `where` or `limit`; a lazy frame "
                "(scan_pool, scan_scores, scan_subset); or open_project(..., max_rows=None)"
            )
        return rows

    def _scan(self, query: str) -> pl.LazyFrame:
        return read_catalog(self.catalog).sql(query).pl(lazy=True)  # the frame keeps the connection open

    def _known(self, names: Sequence[str]) -> Sequence[str]:
        with read_catalog(self.catalog) as con:
            known = [name for name in con.sql("FROM scores").columns if name not in KEYS]
        for name in names:
            if name not in known:
                raise NotebookError(f"{name}: no such score. Remedy: one of {', '.join(known)}")
        return names or known

    def _version(self, recipe: str, version: str | None) -> Version:
        versions = Versions(self.lake, recipe)
        found = versions.current() if version is None else versions.read(version)
        if found is None:
            raise NotebookError(f"{recipe}: this recipe has no version yet. Remedy: `clip-select run`")
        return found

    def _manifest(self, recipe: str, version: str | None) -> str:
        found = self._version(recipe, version)
        return f"read_parquet({sql.path(Versions(self.lake, recipe).verified_path(found))})"


def _select(table: str, columns: Sequence[str] | None, where: str | None, limit: int | None) -> str:
    """Return a query of some columns and rows of a table."""
    selected = "*" if columns is None else ", ".join(sql.quoted(column) for column in columns)
    query = f"SELECT {selected} FROM {table}"
    if where is not None:
        query += f" WHERE ({where}\n)"  # the line break ends a comment in the predicate
    return query if limit is None else f"{query} LIMIT {limit:d}"
