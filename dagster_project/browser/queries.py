"""Rows of a pool, filtered and sorted: `project.browse.where(...).order_by(...).to_polars()`.

Here: which rows, in which order. A query reads only the columns that it filters or sorts by; the rest is read for the
rows that are returned. Not here: pages (`app`), recipes tried out (`trials`), embeddings (`search`).
"""

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
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

MEMORY, THREADS = "1GB", 2
POOL = "raw_pool"
RANDOM = "random"
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
        self._aligned: dict[tuple[str, str], tuple[str, ...]] = {}
        self._lock = Lock()
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

    def file(self, asset: str, shard: str, columns: frozenset[str]) -> str:
        """Return a verified file as an SQL string; an unchanged file is verified once for each set of columns."""
        stored = self.context.lake.stored(asset, shard)
        key = (asset, shard, columns)
        known = self._verified.get(key)
        if known is None or stored is None or known[0] != stored.fingerprint:
            path = self.context.lake.verified_path(asset, shard, columns)
            known = self._verified[key] = ("" if stored is None else stored.fingerprint, path)
        return sql.path(known[1])

    def run(self, query: str, tables: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """Run a query; `tables` are its further tables, by name.

        Raises:
            BrowseError: the query does not fit the types of the columns, or two files have different rows.
        """
        with self._lock:
            con = self._con.cursor()
            try:
                for name, table in (tables or {}).items():
                    con.register(name, table)
                return con.sql(query).to_arrow_table()
            except (duckdb.Error, ValueError) as error:
                raise BrowseError(str(error).split("\n", 1)[0]) from error
            finally:
                con.close()

    def scan(self, names: frozenset[str], *, uids: bool, shard: str | None = None) -> str:
        """Write a query of some columns, with `the shard` and `the row` of each row.

        Args:
            names: columns of the pool and scores.
            uids: include f0 and f1.
            shard: only this shard.

        Raises:
            BrowseError: no shard has all that it reads.
        """
        wanted: dict[str, dict[str, str]] = {}
        for name in sorted(names):
            asset, column = self.place(name)
            wanted.setdefault(asset, {})[name] = column
        wanted = wanted or {POOL: {}}
        shards = [name for name in self.shards(list(wanted)) if shard in (None, name)]
        if not shards:
            where = "no shard" if shard is None else f"shard {shard!r} does not exist or"
            raise BrowseError(f"{where} has {', '.join(wanted)}. Remedy: clip-select run computes what is missing")
        parts, selected = [], []
        for number, (asset, columns) in enumerate(wanted.items()):
            read = frozenset(columns.values()) | ({"f0", "f1"} if uids else set())
            files = ", ".join(self.file(asset, name, read) for name in shards)
            parts.append(f"read_parquet([{files}], file_row_number=true, filename=true) AS t{number}")
            selected += [f"t{number}.{sql.quoted(column)} AS {sql.quoted(name)}" for name, column in columns.items()]
        self._check_aligned(list(wanted), shards)
        identity = ['t0.filename AS "the file"', 't0.file_row_number AS "the row"']
        identity += ["t0.f0 AS f0", "t0.f1 AS f1"] if uids else []
        return f"SELECT {', '.join([*identity, *selected])} FROM {' POSITIONAL JOIN '.join(parts)}"

    def _check_aligned(self, assets: Sequence[str], shards: Sequence[str]) -> None:
        """Check once that the files of several assets have the same rows; unchanged files are not read again.

        Raises:
            BrowseError: they have not.
        """
        first, uids = assets[0], frozenset({"f0", "f1"})
        for other in assets[1:]:
            key = [self.context.lake.stored(asset, shard) for asset in (first, other) for shard in shards]
            prints = tuple("" if stored is None else stored.fingerprint for stored in key)
            if self._aligned.get((first, other)) == prints:
                continue
            left, right = (
                f"read_parquet([{', '.join(self.file(asset, shard, uids) for shard in shards)}], file_row_number=true)"
                for asset in (first, other)
            )
            same = " AND ".join(f"a.{c} IS NOT DISTINCT FROM b.{c}" for c in ("f0", "f1", "file_row_number"))
            found = self.run(f"SELECT count(*) AS n FROM {left} AS a POSITIONAL JOIN {right} AS b WHERE NOT ({same})")
            if found["n"][0].as_py():
                raise BrowseError(f"{other} has other rows than {first}. Remedy: clip-select run")
            self._aligned[first, other] = prints

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


@dataclass(frozen=True)
class Query:
    """Rows of the pool. Every method returns another query; nothing is read before `places`, `count` or `to_polars`.

    Attributes:
        table: the project's rows.
        predicates: DuckDB predicates over the pool's columns and scores, as in a recipe's `where`.
        only_shard: the one shard to read.
        marks: tables of f0 and f1 that the rows are in, by name.
        sort: a score, a column, or `random`; None for the pool's order.
        descending: largest first.
        seed: of the random order.
    """

    table: Table
    predicates: tuple[str, ...] = ()
    only_shard: str | None = None
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
        return replace(self, only_shard=name)

    def among(self, uids: pa.Table) -> "Query":
        """Return the rows whose uid is in a table with columns f0 and f1."""
        return replace(self, marks={**self.marks, f"uids{len(self.marks)}": uids})

    def places(self, limit: int, offset: int = 0) -> list[Place]:
        """Return where the rows are, in the query's order; equal values are in the pool's order."""
        order = ['"the file"', '"the row"']
        if self.sort == RANDOM:
            order.insert(0, f"hash(f0, f1, {self.seed:d})")
        elif self.sort is not None:
            order.insert(0, f"{sql.quoted(self.sort)} {'DESC' if self.descending else 'ASC'} NULLS LAST")
        query = f'SELECT "the file", "the row" FROM ({self._rows(sorting=True)}) ORDER BY {", ".join(order)}'
        found = self.table.run(f"{query} LIMIT {limit:d} OFFSET {offset:d}", self.marks)
        return [
            Place(Path(file).stem, row)
            for file, row in zip(found["the file"].to_pylist(), found["the row"].to_pylist(), strict=True)
        ]

    def count(self) -> int:
        """Return the number of rows."""
        found = self.table.run(f"SELECT count(*) AS n FROM ({self._rows(sorting=False)})", self.marks)
        return int(found["n"][0].as_py())

    def to_polars(self, *names: str, limit: int = MOST_ROWS) -> pl.DataFrame:
        """Return the rows as a frame: uid, shard, key, caption and these columns, by default all scores."""
        columns = list(dict.fromkeys(["uid", "shard", "key", "caption", *(names or self.table.scores.by_name)]))
        rows = self.table.read(self.places(limit), columns)
        return pl.DataFrame([{name: row[name] for name in columns} for row in rows], infer_schema_length=None)

    def _rows(self, *, sorting: bool) -> str:
        names = frozenset().union(*(self.table.checked(predicate) for predicate in self.predicates))
        if sorting and self.sort not in (None, RANDOM):
            names |= {str(self.sort)}
        uids = bool(self.marks) or (sorting and self.sort == RANDOM)
        query = f"SELECT * FROM ({self.table.scan(names, uids=uids, shard=self.only_shard)}) AS rows"
        for mark in self.marks:
            query += f" SEMI JOIN {mark} USING (f0, f1)"
        tests = [f"({predicate}\n)" for predicate in self.predicates]  # the line break ends a comment
        return query + (f" WHERE {' AND '.join(tests)}" if tests else "")


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
    found = Query(table).among(uid_table([uid])).places(1)
    if not found:
        raise BrowseError(f"there is no sample {uid} in the pool")
    return found[0]
