"""Names, values and paths written as SQL text for DuckDB."""

import glob
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

_HASHES_AT_ONCE = 1 << 25


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: object) -> str:
    """Return `str(value)` as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def path(value: object) -> str:
    """Return a path as an SQL string in which DuckDB sees no pattern."""
    return text(glob.escape(str(value)))


def pattern(root: object, files: str) -> str:
    """Return the files in a folder as an SQL string: DuckDB sees a pattern in `files` and none in `root`."""
    return text(f"{glob.escape(str(root))}/{files}")


def literal(number: float) -> str:
    """Return a float64 as SQL that DuckDB reads as the same float64; it would read a bare 0.1 as a decimal."""
    return f"'{number!r}'::DOUBLE"


def one(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """Run a query and return its only row. Uses `fetchall`, because an open result blocks its connection."""
    return con.execute(sql).fetchall()[0]


def repeated_hashes(con: duckdb.DuckDBPyConnection, hash_: str, rows: str, count: int) -> Iterator[NDArray[np.uint64]]:
    """Find the hashes that several rows have, by sorting them a part at a time, so that memory does not grow with rows.

    Args:
        con: A connection.
        hash_: A hash of a row, as SQL.
        rows: What follows FROM.
        count: About how many rows there are.

    Yields:
        For each part, its repeated hashes: uint64, ascending, each once. Equal hashes are in the same part.
    """
    parts = count // _HASHES_AT_ONCE + 1
    for part in range(parts):
        some = con.execute(f"SELECT h FROM (SELECT {hash_} AS h FROM {rows}) WHERE h % {parts} = {part}")
        hashes = some.fetchnumpy()["h"]
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if len(twice):
            yield twice
