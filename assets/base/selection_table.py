"""The table that recipes select from: pool rows and scores of the lake's files, cached for the next recipe.

Here: which files become that table, and when it can be reused. Not here: how files are joined
(`resources.lake.pool_scores`), how a recipe selects (`selection.recipes.execute`), and writing a selection
(`assets.subsets.subset`).
"""

import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from core.machine import close_duckdb, open_duckdb
from core.sql import quoted
from resources.lake.files import Lake
from resources.lake.pool_scores import Source, mark_sets, source_relation
from selection.recipes.execute import Selection, select, set_column
from selection.recipes.recipe import Recipe
from selection.recipes.step_report import StepReport

IDENTITY = ("f0", "f1")

_Mark = tuple[str, str, tuple[str, ...]]
"""A score's asset, its column there, and the fingerprint of each shard's file."""


class CachedTable:
    """The pool's rows with every score that was asked for so far; built again when other shards are asked for.

    Args:
        memory: DuckDB's `memory_limit`; by default half of the memory.
        threads: of DuckDB; by default one per core.
    """

    def __init__(self, *, memory: str | None = None, threads: int | None = None) -> None:
        self._memory, self._threads = memory, threads
        self._finalizer: weakref.finalize[..., CachedTable] | None = None
        self._pool: dict[str, str] = {}
        self._scores: dict[str, _Mark] = {}
        self._columns: set[str] = set()

    def open(
        self,
        lake: Lake,
        scores: Mapping[str, tuple[str, str]],
        pool_columns: Collection[str],
        shards: Mapping[str, Mapping[str, str]],
    ) -> tuple[duckdb.DuckDBPyConnection, Source]:
        """Return a connection whose table `source` has these shards' rows and at least these columns.

        Args:
            lake: the lake.
            scores: asset and column of every score.
            pool_columns: columns of `raw_pool` apart from uid, shard and key.
            shards: the fingerprint of each file, by shard and asset.
        """
        pool = {shard: read["raw_pool"] for shard, read in shards.items()}
        wanted = {
            score: (asset, column, tuple(read[asset] for read in shards.values()))
            for score, (asset, column) in scores.items()
        }
        if pool != self._pool:
            self.close()
        if not self._pool or not (wanted.items() <= self._scores.items() and self._columns.issuperset(pool_columns)):
            wanted |= {s: mark for s, mark in self._scores.items() if s not in wanted and _is_there(lake, mark, shards)}
            columns = self._columns | set(pool_columns)
            self.close()
            self._make(lake, wanted, columns, list(shards))
            self._pool, self._scores, self._columns = pool, wanted, columns
        return self._con, self._source

    def close(self) -> None:
        """Close the table and remove its temporary files."""
        if self._finalizer is not None:
            self._finalizer()
        self._pool, self._scores, self._columns = {}, {}, set()

    def _make(self, lake: Lake, scores: Mapping[str, _Mark], columns: set[str], shards: list[str]) -> None:
        spill = tempfile.mkdtemp(prefix="selection-")
        self._con = open_duckdb(spill, memory=self._memory, threads=self._threads)
        self._finalizer = weakref.finalize(self, close_duckdb, self._con, spill)
        self._source = source_relation(
            self._con,
            "source",
            **_files(lake, shards, {score: (asset, column) for score, (asset, column, _) in scores.items()}, columns),
            pool_columns=sorted(columns),
        )


@contextmanager
def open_selection(
    lake: Lake,
    name: str,
    recipe: Recipe,
    scores: Mapping[str, tuple[str, str]],
    shards: Mapping[str, Mapping[str, str]],
    sets: Mapping[str, pa.Table],
    cached: CachedTable | None = None,
    begun: Sequence[StepReport] = (),
) -> Iterator[tuple[Selection, int]]:
    """Run a recipe over the lake's files.

    Args:
        lake: the lake.
        name: the recipe's name.
        recipe: the recipe.
        scores: asset and column of every score that it reads.
        shards: the shards to select from, with the fingerprints of their files, by asset.
        sets: f0 and f1 of each of the recipe's sets, by name, and of those that `begun` reads.
        cached: reused by the next recipe; without it the rows are read for this recipe alone.
        begun: as `select` takes it.

    Yields:
        The selection, valid within the block, and the number of rows left out because an earlier row has their uid.
    """
    table = CachedTable() if cached is None else cached
    columns = {set_column(other): f"uids of {other}" for other in sets}
    con, source = table.open(lake, scores, recipe.columns().pool, shards)
    try:
        for other, uids in sets.items():
            con.register(columns[set_column(other)], uids)
        for key in recipe.tables:
            con.register(key, _without_vectors(lake.read(key)))
        mark_sets(con, "source", columns)
        yield select(con, name, recipe, begun=begun), source.duplicates
    finally:
        if cached is None:
            table.close()
        else:
            _remove_temporaries(con, columns, recipe.tables)


def _without_vectors(table: pa.Table) -> pa.Table:
    """Return the columns of single values; no step reads others, and DuckDB does not take float16 from Arrow."""
    return table.select([column.name for column in table.schema if not pa.types.is_nested(column.type)])


def _remove_temporaries(con: duckdb.DuckDBPyConnection, sets: Mapping[str, str], tables: Collection[str]) -> None:
    """Remove the columns, tables and sets that one recipe added."""
    made = con.execute(
        "SELECT 'VIEW', view_name FROM duckdb_views() WHERE temporary AND NOT internal UNION ALL "
        "SELECT 'TABLE', table_name FROM duckdb_tables() WHERE temporary AND NOT internal AND table_name <> 'source'"
    ).fetchall()
    for listed in (*sets.values(), *tables):
        con.unregister(listed)
    for kind, name in made:
        con.execute(f"DROP {kind} IF EXISTS {quoted(name)}")
    for column in sets:
        con.execute(f"ALTER TABLE source DROP COLUMN IF EXISTS {quoted(column)}")


@contextmanager
def rows_of(
    lake: Lake,
    shards: Collection[str],
    manifest: str | None,
    scores: Mapping[str, tuple[str, str]],
    pool_columns: Collection[str],
) -> Iterator[tuple[duckdb.DuckDBPyConnection, Source]]:
    """Open the rows of some shards, for an asset that compares all of them.

    Args:
        lake: the lake.
        shards: the shards.
        manifest: path of the manifest of a subset, to restrict the rows to; None for all.
        scores: asset and column of every score.
        pool_columns: as `source_relation` takes them.

    Yields:
        The connection, valid within the block, with a view `wanted` of the rows, each uid once, and a view `copies` of
        the rows left out because an earlier row has their uid; and the numbers of both.
    """
    with tempfile.TemporaryDirectory() as spill, open_duckdb(spill) as con:
        if manifest is not None:
            con.execute("CREATE TEMP TABLE listed AS SELECT f0, f1 FROM read_parquet(?)", [manifest])
        found = source_relation(
            con,
            "source",
            **_files(lake, shards, scores, pool_columns),
            pool_columns=pool_columns,
            sets={} if manifest is None else {"listed": "listed"},
        )
        con.execute(f"CREATE TEMP VIEW wanted AS FROM source {'' if manifest is None else 'WHERE listed'}")
        con.execute('CREATE TEMP VIEW copies AS FROM "source copies"')
        yield con, found


def _files(
    lake: Lake, shards: Collection[str], scores: Mapping[str, tuple[str, str]], pool_columns: Collection[str]
) -> dict[str, Any]:
    """Verify the columns that a table is made of, and return the files as `source_relation` takes them.

    Raises:
        LakeError: a file is missing or damaged.
    """
    columns = {"raw_pool": {*IDENTITY, "shard", "key", *pool_columns}}
    for asset, column in scores.values():
        columns.setdefault(asset, set(IDENTITY)).add(column)
    paths = {
        asset: {shard: lake.verified_path(asset, shard, read) for shard in shards} for asset, read in columns.items()
    }
    return {
        "raw_pool": list(paths["raw_pool"].items()),
        "scores": {score: (column, paths[asset]) for score, (asset, column) in scores.items()},
    }


def _is_there(lake: Lake, mark: _Mark, shards: Collection[str]) -> bool:
    asset, _, fingerprints = mark
    stored = (lake.stored(asset, shard) for shard in shards)
    return all(
        found is not None and found.fingerprint == fingerprint
        for found, fingerprint in zip(stored, fingerprints, strict=True)
    )
