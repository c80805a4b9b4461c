"""Rows of a pool, filtered and sorted: `project.browse.where(...).order_by(...).to_polars()`.

Here: which rows, in which order. A query reads only the columns that it filters or sorts by; the rest is read for the
rows that are returned. Not here: pages (`app`), recipes tried out (`trials`), embeddings (`search`).
"""

import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from assets.base.context import Context
from assets.base.score_kind import Scores
from core import sql
from core.errors import UserError
from core.machine import close_duckdb, open_duckdb
from core.names import suggestion
from core.uids import parse_uids
from resources.pools.base import RAW_POOL_SCHEMA
from selection.recipes.predicates import predicate_columns

MEMORY, THREADS = "512MB", 2
POOL = "raw_pool"
RANDOM = "random"
BATCH = 32
"""Shards that are joined by position in one query."""
DEEPEST = 10_000
"""Rows before and on a page, up to which batches are sorted one by one."""
MOST_ROWS = 1_000_000
"""Rows of `to_polars` at most, unless it is asked for more."""


class BrowseError(UserError):
    """A filter, an order or a name is wrong; the message has the remedy."""


@dataclass(frozen=True)
class Place:
    """A row: its shard, and its number there from 0."""

    shard: str
    row: int


class Table:
    """A project's rows, read with one DuckDB of bounded memory; safe for several threads.

    Args:
        context: the opened project.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.scores = Scores(context.settings)
        spill = tempfile.mkdtemp(prefix="browse-")
        self._con = open_duckdb(spill, memory=MEMORY, threads=THREADS)
        self._verified: dict[tuple[str, str, frozenset[str]], tuple[str, Path]] = {}
        self._shards: dict[str, str] = {}  # by the name of a file, which is a hash for the copy of a remote one
        self._aligned: dict[tuple[str, str, str], tuple[str, ...]] = {}
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(THREADS)
        self._close = weakref.finalize(self, close_duckdb, self._con, spill)

    def close(self) -> None:
        """Close the connection and remove its temporary files."""
        self._close()

    @property
    def columns(self) -> list[str]:
        """Every column of the pool and every score."""
        return [*(name for name in RAW_POOL_SCHEMA.names if name not in ("f0", "f1")), *self.scores.by_name]

    @property
    def numbers(self) -> list[str]:
        """The scores that hold numbers."""
        return [name for name, score in self.scores.by_name.items() if score.column.is_number]

    def checked(self, predicate: str) -> frozenset[str]:
        """Check a predicate as a recipe's `where` is checked, and return the columns that it reads.

        Raises:
            BrowseError: it is no predicate over one row, or it names an unknown column.
        """
        try:
            found = predicate_columns(predicate)
        except ValueError as error:
            raise BrowseError(str(error)) from error
        for name in sorted(found - set(self.columns)):
            what = "score" if "/" in name else "column"
            raise BrowseError(f"where: there is no {what} {name!r}; {suggestion(name, self.columns)}")
        return found

    def place(self, name: str) -> tuple[str, str]:
        """Return the asset and the column of a score or of a column of the pool."""
        score = self.scores.by_name.get(name)
        return (POOL, name) if score is None else (score.asset, score.column.name)

    def shards(self, assets: Sequence[str]) -> list[str]:
        """List the shards of which all these assets have a file, sorted."""
        listed = [set(self.context.lake.shards(asset)) for asset in assets]
        return sorted(set.intersection(*listed))

    def sizes(self, assets: Sequence[str]) -> dict[str, int]:
        """Return the rows of each shard of which all these assets have a file; by the file of the first one."""
        return self.context.lake.rows(assets[0], self.shards(assets))

    def file(self, asset: str, shard: str, columns: frozenset[str]) -> str:
        """Return a file as an SQL string, for reading these columns, verified once for each version of the file."""
        stored = self.context.lake.stored(asset, shard)
        key = (asset, shard, columns)
        known = self._verified.get(key)
        if known is None or stored is None or known[0] != stored.fingerprint:
            path = self.context.lake.verified_path(asset, shard, columns)
            known = self._verified[key] = ("" if stored is None else stored.fingerprint, path)
            self._shards[path.name] = shard
        return sql.path(known[1])

    def run(self, query: str, tables: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """Run a query; `tables` are its further tables, by name.

        Raises:
            BrowseError: the query does not fit the types of the columns.
        """
        (found,) = self.run_all([query], tables)
        return found

    def run_all(self, queries: Sequence[str], tables: Mapping[str, pa.Table] | None = None) -> list[pa.Table]:
        """Run several queries, some at the same time, because DuckDB joins by position in one thread.

        Raises:
            BrowseError: as `run` does.
        """

        def one(query: str) -> pa.Table:
            con = self._con.cursor()
            try:
                for name, table in (tables or {}).items():
                    con.register(name, table)
                return con.sql(query).to_arrow_table()
            finally:
                con.close()

        try:
            with self._lock:
                return [one(queries[0])] if len(queries) == 1 else list(self._threads.map(one, queries))
        except (duckdb.Error, ValueError) as error:
            raise BrowseError(str(error).split("\n", 1)[0]) from error

    def scan(self, names: frozenset[str], *, uids: bool, only: Sequence[str] | None = None) -> str:
        """Write a query of some columns, with `the file` and `the row` of each row.

        Args:
            names: columns of the pool and scores.
            uids: include f0 and f1.
            only: the shards to read; by default all that have the columns.

        Raises:
            BrowseError: no shard has all that it reads, or two files of a shard have different rows.
        """
        (query,) = self.scans(names, uids=uids, only=only, size=None)
        return query

    def scans(
        self, names: frozenset[str], *, uids: bool, only: Sequence[str] | None = None, size: int | None
    ) -> list[str]:
        """Write what `scan` writes as several queries, of `size` shards each."""
        wanted: dict[str, dict[str, str]] = {}
        for name in sorted(names):
            asset, column = self.place(name)
            wanted.setdefault(asset, {})[name] = column
        wanted = wanted or {POOL: {}}
        shards = [name for name in self.shards(list(wanted)) if only is None or name in only]
        if not shards:
            where = f"shard {only[0]} has no" if only and len(only) == 1 else "no shard has"
            raise BrowseError(f"{where} {' and '.join(wanted)}. Remedy: clip-select run computes what is missing")
        self._check_aligned(list(wanted), shards)
        self._verify({(a, n, _read(c, uids)) for a, c in wanted.items() for n in shards} - self._verified.keys())
        size = size or len(shards)
        return [self._joined(wanted, shards[at : at + size], uids) for at in range(0, len(shards), size)]

    def _verify(self, files: Collection[tuple[str, str, frozenset[str]]]) -> None:
        """Verify files for `file`, several at the same time."""
        list(self._threads.map(lambda key: self.file(*key), sorted(files, key=str)))

    def _joined(self, wanted: Mapping[str, Mapping[str, str]], shards: Sequence[str], uids: bool) -> str:
        """Write the query of these columns by asset, in which files are joined by position."""
        parts, selected = [], []
        for number, (asset, columns) in enumerate(wanted.items()):
            files = ", ".join(self.file(asset, name, _read(columns, uids)) for name in shards)
            parts.append(f"read_parquet([{files}], file_row_number=true, filename=true) AS t{number}")
            selected += [f"t{number}.{sql.quoted(column)} AS {sql.quoted(name)}" for name, column in columns.items()]
        identity = ['t0.filename AS "the file"', 't0.file_row_number AS "the row"']
        identity += ["t0.f0 AS f0", "t0.f1 AS f1"] if uids else []
        return f"SELECT {', '.join([*identity, *selected])} FROM {' POSITIONAL JOIN '.join(parts)}"

    def _check_aligned(self, assets: Sequence[str], shards: Sequence[str]) -> None:
        """Check that the files of several assets have the same rows.

        Files that were computed from the same `raw_pool` have; their provenance records it. The uids of other files
        are compared, once for unchanged files.

        Raises:
            BrowseError: they have not.
        """
        first, uids = assets[0], frozenset({"f0", "f1"})
        for other in assets[1:]:
            for shard in shards:
                sources = [self._source(asset, shard) for asset in (first, other)]
                if sources[0] is not None and sources[0] == sources[1]:
                    continue
                key = (first, other, shard)
                stored = [self.context.lake.stored(asset, shard) for asset in (first, other)]
                prints = tuple("" if found is None else found.fingerprint for found in stored)
                if self._aligned.get(key) == prints:
                    continue
                left, right = (self.context.lake.read(asset, shard, sorted(uids)) for asset in (first, other))
                if not left.equals(right):
                    raise BrowseError(f"{other} has other rows than {first} in shard {shard}. Remedy: clip-select run")
                self._aligned[key] = prints

    def _source(self, asset: str, shard: str) -> str | None:
        """Return the fingerprint of the `raw_pool` that a file's rows are of; None if its inputs have changed since."""
        stored = self.context.lake.stored(asset, shard)
        if stored is None or asset == POOL:
            return None if stored is None else stored.fingerprint
        inputs = stored.provenance.inputs
        if POOL in inputs:
            return inputs[POOL]
        for name, fingerprint in inputs.items():
            found = self.context.lake.stored(name, shard) if name.startswith("embeddings/") else None
            if found is not None and found.fingerprint == fingerprint:
                return self._source(name, shard)
        return None

    def find(self, f0: int, f1: int) -> Place:
        """Return the first row with a uid; Bloom filters leave out most files. `read` verifies the row that is shown.

        Raises:
            BrowseError: there is none.
        """
        lake = self.context.lake
        paths = {shard: lake.store.local(lake.path(POOL, shard)) for shard in self.shards([POOL])}
        if not paths:
            raise BrowseError("the lake has no shard yet. Remedy: clip-select run")
        self._shards |= {path.name: shard for shard, path in paths.items()}
        files = ", ".join(map(sql.path, paths.values()))
        found = self.run(
            f'SELECT filename AS "the file", file_row_number AS "the row" FROM '
            f"read_parquet([{files}], file_row_number=true, filename=true) "
            f"WHERE f0 = {f0:d}::UBIGINT AND f1 = {f1:d}::UBIGINT ORDER BY ALL LIMIT 1"
        ).to_pylist()
        if not found:
            raise BrowseError(f"there is no sample {f0:016x}{f1:016x} in the pool")
        return self.place_of(found[0]["the file"], found[0]["the row"])

    def place_of(self, file: str, row: int) -> Place:
        """Return a row's place by the path of a file that a query read."""
        return Place(self._shards[Path(file).name], row)

    def read(self, places: Sequence[Place], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return columns of some rows, in their order; a score without a file is None."""
        by_shard: dict[str, list[int]] = {}
        for place in places:
            by_shard.setdefault(place.shard, []).append(place.row)
        wanted: dict[str, list[str]] = {POOL: []}
        for name in names:
            wanted.setdefault(self.place(name)[0], []).append(name)
        found: dict[Place, dict[str, Any]] = {place: dict.fromkeys(names) for place in places}
        for shard, rows in by_shard.items():
            for asset, columns in wanted.items():
                self._read_into(found, asset, shard, rows, columns)
        return [{"shard": place.shard, "row": place.row, **found[place]} for place in places]

    def _read_into(
        self, found: dict[Place, dict[str, Any]], asset: str, shard: str, rows: list[int], names: list[str]
    ) -> None:
        if self.context.lake.stored(asset, shard) is None:
            return
        columns = [self.place(name)[1] for name in names]
        file = self.file(asset, shard, frozenset({"f0", "f1", *columns}))
        listed = ", ".join(
            f"{sql.quoted(column)} AS {sql.quoted(name)}" for column, name in zip(columns, names, strict=True)
        )
        table = self.run(
            f'SELECT file_row_number AS "the row", f0, f1{", " + listed if listed else ""} FROM '
            f"read_parquet([{file}], file_row_number=true) WHERE file_row_number IN ({', '.join(map(str, rows))})"
        )
        for values in table.to_pylist():
            row = found[Place(shard, values.pop("the row"))]
            identity = (values.pop("f0"), values.pop("f1"))
            if row.setdefault("words", identity) != identity:
                raise BrowseError(f"{asset} has other rows than shard {shard}. Remedy: clip-select run")
            row.update(values)


def _read(columns: Mapping[str, str], uids: bool) -> frozenset[str]:
    return frozenset(columns.values()) | ({"f0", "f1"} if uids else set())


@dataclass(frozen=True)
class Query:
    """Rows of the pool. Every method returns another query; nothing is read before `places`, `count` or `to_polars`.

    Attributes:
        table: the project's rows.
        predicates: DuckDB predicates over the pool's columns and scores, as in a recipe's `where`.
        only: the shards to read; None for all.
        marks: tables of f0 and f1 that the rows are in, by name.
        sort: a score, a column, or `random`; None for the pool's order.
        descending: largest first.
        seed: of the random order.
    """

    table: Table
    predicates: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    marks: Mapping[str, pa.Table] = field(default_factory=dict)
    sort: str | None = None
    descending: bool = True
    seed: int = 0

    def where(self, predicate: str) -> "Query":
        """Return the rows for which a predicate holds; it is checked as a recipe's `where` is."""
        self.table.checked(predicate)
        return replace(self, predicates=(*self.predicates, predicate))

    def order_by(self, name: str, *, descending: bool = True, seed: int = 0) -> "Query":
        """Return the rows sorted by a score or column, or by `random`: a hash of the uid and the seed.

        Raises:
            BrowseError: there is no such column.
        """
        if name != RANDOM and name not in self.table.columns:
            raise BrowseError(f"there is no score {name!r} to sort by; {suggestion(name, self.table.columns)}")
        return replace(self, sort=name, descending=descending, seed=seed)

    def shard(self, name: str) -> "Query":
        """Return the rows of one shard."""
        return self.within((name,))

    def within(self, shards: Collection[str]) -> "Query":
        """Return the rows of some shards."""
        kept = shards if self.only is None else [name for name in self.only if name in shards]
        return replace(self, only=tuple(kept))

    def among(self, uids: pa.Table) -> "Query":
        """Return the rows whose uid is in a table with columns f0 and f1."""
        return replace(self, marks={**self.marks, f"uids{len(self.marks)}": uids})

    def places(self, limit: int, offset: int = 0) -> list[Place]:
        """Return where the rows are, in the query's order; equal values are in the order of the files."""
        order, selected = ['"the file"', '"the row"'], ""
        if self.sort is not None:
            key = f"hash(f0, f1, {self.seed:d})" if self.sort == RANDOM else sql.quoted(self.sort)
            selected = f', {key} AS "the key"'
            falling = "DESC" if self.descending and self.sort != RANDOM else "ASC"
            order.insert(0, f'"the key" {falling} NULLS LAST')
        ordered = f"ORDER BY {', '.join(order)} LIMIT"
        parts = self._rows(sorting=True, size=BATCH if limit + offset <= DEEPEST else None)
        first = [f'SELECT "the file", "the row"{selected} FROM ({part}) {ordered}' for part in parts]
        if len(first) == 1:
            found = self.table.run(f"{first[0]} {limit:d} OFFSET {offset:d}", self.marks)
        else:
            best = self.table.run_all([f"{query} {limit + offset:d}" for query in first], self.marks)
            listed = {"listed": pa.concat_tables(best)}
            found = self.table.run(f"FROM listed {ordered} {limit:d} OFFSET {offset:d}", listed)
        return [
            self.table.place_of(file, row)
            for file, row in zip(found["the file"].to_pylist(), found["the row"].to_pylist(), strict=True)
        ]

    @property
    def restricts(self) -> bool:
        """Whether anything but the order was asked for."""
        return bool(self.predicates or self.marks) or self.only is not None

    def rows_of(self, shard: str) -> np.ndarray:
        """Return the numbers of the rows of a shard, int64, ascending; empty where the shard lacks a score."""
        within = replace(self.shard(shard), sort=None)
        if not within.only:
            return np.empty(0, np.int64)
        if not self.table.shards([self.table.place(name)[0] for name in within._names(sorting=False)] or [POOL]):
            return np.empty(0, np.int64)
        (rows,) = within._rows(sorting=False)
        found = self.table.run(f'SELECT "the row" FROM ({rows}) ORDER BY ALL', self.marks)
        return np.asarray(found["the row"].to_numpy(), np.int64)

    @property
    def is_counted(self) -> bool:
        """Whether `count` reads no rows, because the files state their number."""
        return not self.predicates and not self.marks

    def count(self) -> int:
        """Return the number of rows."""
        if self.is_counted:
            sizes = self.table.sizes([POOL])
            return sum(rows for shard, rows in sizes.items() if self.only is None or shard in self.only)
        queries = [f"SELECT count(*) AS n FROM ({part})" for part in self._rows(sorting=False, size=BATCH)]
        return sum(found["n"][0].as_py() for found in self.table.run_all(queries, self.marks))

    def to_polars(self, *names: str, limit: int = MOST_ROWS) -> pl.DataFrame:
        """Return the rows as a frame: uid, shard, key, caption and these columns, by default all scores."""
        columns = list(dict.fromkeys(["uid", "shard", "key", "caption", *(names or self.table.scores.by_name)]))
        rows = self.table.read(self.places(limit), columns)
        return pl.DataFrame([{name: row[name] for name in columns} for row in rows], infer_schema_length=None)

    def _names(self, *, sorting: bool) -> frozenset[str]:
        names: frozenset[str] = frozenset().union(*(self.table.checked(predicate) for predicate in self.predicates))
        return names | {str(self.sort)} if sorting and self.sort not in (None, RANDOM) else names

    def _rows(self, *, sorting: bool, size: int | None = None) -> list[str]:
        """Write the queries of the rows, of `size` shards each where that is faster."""
        names = self._names(sorting=sorting)
        uids = bool(self.marks) or (sorting and self.sort == RANDOM)
        joins = len({self.table.place(name)[0] for name in names}) > 1
        parts = self.table.scans(names, uids=uids, only=self.only, size=size if joins and not self.marks else None)
        members = "".join(f" SEMI JOIN {mark} USING (f0, f1)" for mark in self.marks)
        tests = [f"({predicate}\n)" for predicate in self.predicates]  # the line break ends a comment
        condition = f" WHERE {' AND '.join(tests)}" if tests else ""
        return [f"SELECT * FROM ({part}) AS rows{members}{condition}" for part in parts]


def uid_table(uids: Sequence[str]) -> pa.Table:
    """Return uids as a table with columns f0 and f1.

    Raises:
        ValueError: a text is no uid.
    """
    return pa.table(dict(zip(("f0", "f1"), map(pa.array, parse_uids(uids)), strict=True)))


def find(table: Table, uid: str) -> Place:
    """Return the first row with a uid.

    Raises:
        BrowseError: there is none, or it is no uid.
    """
    if len(uid) != 32 or not set(uid) <= set("0123456789abcdef"):
        raise BrowseError("a uid is 32 hexadecimal digits in lower case")
    return table.find(int(uid[:16], 16), int(uid[16:], 16))
