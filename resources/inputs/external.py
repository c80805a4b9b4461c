"""Imported files with one row per uid: scores and lists of uids.

Here: finding such files, reading them once into a table of (f0, f1, values), and looking up pool rows. Not here: the
assets made from them.

The table is in DuckDB, so a file larger than memory uses temporary files. NaN, infinity and null count as missing.
"""

import contextlib
import csv
import fnmatch
import glob
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from core import sql
from core.errors import UserError
from core.machine import open_duckdb
from resources.storage import files
from resources.storage.arrays import ArrayError, open_array

SUFFIXES = (".parquet", ".csv", ".npy", ".txt")
_WORDS = ("f0", "f1")
_NO_UID = "is no uid"
_BATCH_ROWS = 1 << 17
_LARGEST_BLOCK = 64 << 20


class ExternalError(UserError, ValueError):
    """An imported file cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class Coverage:
    """The overlap of a table and the pool.

    Attributes:
        shards: number of compared shards.
        rows: number of their rows.
        covered: number of these rows whose uid is in the table.
        uids: number of different uids in the table.
        unknown: number of these uids that no compared row has.
    """

    shards: int
    rows: int
    covered: int
    uids: int
    unknown: int


def find(patterns: Sequence[str]) -> list[files.Listed]:
    """Find files, in the order of the patterns and of their names.

    Args:
        patterns: files, folders (all their files with one of `SUFFIXES`), or patterns such as `dfn_*.parquet`.

    Raises:
        ExternalError: one of them matches no file, or a file of another kind.
    """
    found: list[files.Listed] = []
    for pattern in patterns:
        some = _find(pattern)
        if not some:
            raise ExternalError(f"{pattern}: no such file. Remedy: correct the path; it starts at the config's folder")
        found += some
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise ExternalError(f"{file.url}: files of this kind are not read. Remedy: {', '.join(SUFFIXES)}")
    return found


def _find(pattern: str) -> list[files.Listed]:
    with contextlib.suppress(FileNotFoundError):
        if glob.has_magic(pattern):
            folder, _, last = pattern.rpartition("/")
            return [file for file in files.list_folder(folder) if fnmatch.fnmatchcase(file.name, last)]
        if pattern.endswith(SUFFIXES):
            return [files.stat(pattern)]
        try:
            return [file for file in files.list_folder(pattern) if file.name.endswith(SUFFIXES)]
        except NotADirectoryError:
            return [files.stat(pattern)]
    return []


@contextlib.contextmanager
def opened(
    found: Sequence[files.Listed], *, uid: str = "uid", columns: Mapping[str, str] | None = None
) -> Iterator["Table"]:
    """Read files into a table that exists until the block ends.

    Args:
        found: the files, as `find` returns them.
        uid: name of the column with uids as text. A file without it may have f0 and f1 (unsigned 64-bit).
        columns: for each column of the table, its name in the files.

    Raises:
        ExternalError: a column is missing or not numeric, a uid is invalid, or a file cannot be read.
    """
    names = dict(columns or {})
    with tempfile.TemporaryDirectory() as spill, open_duckdb(spill) as con:
        typed = ["f0 UBIGINT", "f1 UBIGINT", *(f"{sql.quoted(name)} DOUBLE" for name in names)]
        con.execute(f"CREATE TEMP TABLE listed ({', '.join(typed)})")
        values = [f"CASE WHEN isfinite({sql.quoted(name)}) THEN {sql.quoted(name)} END" for name in names]
        for file in found:
            with contextlib.ExitStack() as stack:
                try:
                    reader = _reader(file.url, uid, names, stack)
                    words = list(_WORDS) if "f0" in reader.schema.names else [_word(1), _word(17)]
                    con.register("read", reader)
                    con.execute(f"INSERT INTO listed SELECT {', '.join([*words, *values])} FROM read").fetchall()
                except (pa.ArrowException, duckdb.Error, ArrayError, OSError) as error:
                    raise _explained(file.url, error) from error
                finally:
                    con.unregister("read")
        ((rows,),) = con.execute("SELECT count(*) FROM listed").fetchall()
        if not rows:
            raise ExternalError(f"{', '.join(file.url for file in found)}: no row. Remedy: another file")
        yield Table(con, tuple(names), rows)


class Table:
    """The table that `opened` read.

    Args:
        con: the connection that holds it.
        columns: names of its values.
        rows: number of rows, repeated uids included.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, columns: tuple[str, ...], rows: int) -> None:
        self.con = con
        self.columns = columns
        self.rows = rows

    def look_up(self, f0: np.ndarray, f1: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Look rows up by uid.

        A uid may occur several times in the table with the same values.

        Args:
            f0: first halves of the uids, uint64 [n].
            f1: second halves, uint64 [n].

        Returns:
            The values by column, float64 [n], NaN where missing; and a mask of rows whose uid has several different
            values, bool [n].
        """
        wanted = pa.table({"f0": f0, "f1": f1, "place": np.arange(len(f0))})
        self.con.register("wanted", wanted)
        selected = "".join(f", l.{sql.quoted(column)}" for column in self.columns)
        found = self.con.execute(
            f'SELECT w.place AS "pool row"{selected} FROM wanted AS w JOIN listed AS l ON w.f0 = l.f0 AND w.f1 = l.f1'
        ).fetchnumpy()
        self.con.unregister("wanted")
        places = found["pool row"]  # a name with a blank cannot clash with a user's column
        values = {column: np.full(len(f0), np.nan) for column in self.columns}
        differs = np.zeros(len(f0), bool)
        for column, all_rows in values.items():
            read = np.ma.filled(found[column].astype(np.float64), np.nan)
            all_rows[places] = read
            kept = all_rows[places]
            differs[places[(read != kept) & ~(np.isnan(read) & np.isnan(kept))]] = True
        return values, differs

    def uids(self) -> pa.Table:
        """Return the different uids: columns f0 and f1, sorted."""
        return self.con.sql("SELECT DISTINCT f0, f1 FROM listed ORDER BY f0, f1").to_arrow_table()

    def coverage(self, raw_pool: Sequence[Path]) -> Coverage:
        """Count the overlap with the pool.

        Args:
            raw_pool: `raw_pool` files of the shards.
        """
        self.con.execute("CREATE TEMP TABLE uids AS SELECT DISTINCT f0, f1 FROM listed")
        pool = "(SELECT NULL::UBIGINT AS f0, NULL::UBIGINT AS f1 WHERE false)"
        if raw_pool:
            listed = ", ".join(sql.path(path) for path in raw_pool)
            pool = f"read_parquet([{listed}])"
        ((rows,),) = self.con.execute(f"SELECT count(*) FROM {pool}").fetchall()
        ((covered,),) = self.con.execute(f"SELECT count(*) FROM {pool} SEMI JOIN uids USING (f0, f1)").fetchall()
        ((known,),) = self.con.execute(f"SELECT count(*) FROM uids SEMI JOIN {pool} USING (f0, f1)").fetchall()
        ((uids,),) = self.con.execute("SELECT count(*) FROM uids").fetchall()
        self.con.execute("DROP TABLE uids")
        return Coverage(len(raw_pool), rows, covered, uids, uids - known)


# Reading: every kind of file becomes batches of (uid or f0, f1) and values


def _reader(url: str, uid: str, names: Mapping[str, str], stack: contextlib.ExitStack) -> pa.RecordBatchReader:
    if url.endswith(".npy"):
        stream = stack.enter_context(open_array(url))
        if stream.dtype.names is None or len(stream.shape) != 1:
            raise ExternalError(f"{url}: dtype {stream.dtype}, not u8,u8. Remedy: a structured array with f0 and f1")
        keys = _keys(url, stream.dtype.names, uid, names)
        batches: Iterator[pa.RecordBatch] = (
            pa.RecordBatch.from_pydict({name: np.ascontiguousarray(block[name]) for name in block.dtype.names or ()})
            for block in stream.blocks()
        )
    elif url.endswith(".parquet"):
        parquet = pq.ParquetFile(stack.enter_context(files.open_binary(url)))
        keys = _keys(url, parquet.schema_arrow.names, uid, names)
        _refuse_types(url, parquet.schema_arrow, keys, names)
        batches = parquet.iter_batches(_BATCH_ROWS, columns=[*keys, *names.values()])
    else:
        if url.endswith(".txt"):
            uid, header = "uid", ["uid"]
        else:
            with files.open_binary(url) as file:
                header = next(csv.reader([file.readline().decode("utf-8-sig")]), [])
        keys = _keys(url, header, uid, names)
        types = {key: pa.string() if key == uid else pa.uint64() for key in keys}
        batches = pa_csv.open_csv(
            stack.enter_context(files.open_binary(url)),
            pa_csv.ReadOptions(column_names=header if url.endswith(".txt") else None, block_size=_LARGEST_BLOCK),
            convert_options=pa_csv.ConvertOptions(
                include_columns=[*keys, *names.values()],
                column_types={**{column: pa.float64() for column in names.values()}, **types},
            ),
        )
    uids = [("f0", pa.uint64()), ("f1", pa.uint64())] if len(keys) == 2 else [("uid", pa.string())]
    schema = pa.schema([*uids, *((name, pa.float64()) for name in names)])
    return pa.RecordBatchReader.from_batches(
        schema, (_cast(batch, schema, [*keys, *names.values()]) for batch in batches)
    )


def _keys(url: str, there: Sequence[str], uid: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns that hold the uids; refuse a file that lacks a column."""
    keys = (uid,) if uid in there or not set(_WORDS) <= set(there) else _WORDS
    missing = [column for column in dict.fromkeys([*keys, *names.values()]) if column not in there]
    if missing:
        raise ExternalError(
            f"{url}: no column {', '.join(missing)}; it has {', '.join(there)}. Remedy: correct `uid` or `columns`"
        )
    return keys


def _refuse_types(url: str, schema: pa.Schema, keys: Sequence[str], names: Mapping[str, str]) -> None:
    for column in [*keys, *names.values()]:
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = column in keys and len(keys) == 1
        if not any(is_one(kind) for is_one in (_TEXTS if text else _NUMBERS)):
            raise ExternalError(
                f"{url}: column {column} is {kind}. Remedy: a column of {'texts' if text else 'numbers'}"
            )


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)


def _cast(batch: pa.RecordBatch, schema: pa.Schema, columns: Sequence[str]) -> pa.RecordBatch:
    arrays = []
    for column, field in zip(columns, schema, strict=True):
        array = batch.column(column)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        arrays.append(array.cast(field.type, safe=field.name in _WORDS))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _word(place: int) -> str:
    """Write half of a uid as a number; DuckDB raises an error with the text if it is no uid."""
    return (
        f"CASE WHEN regexp_full_match(trim(uid), '[0-9a-fA-F]{{32}}') "
        f"THEN ('0x' || substr(trim(uid), {place}, 16))::UBIGINT "
        f"ELSE error(concat('\"', coalesce(uid, 'NULL'), '\" {_NO_UID}')) END"
    )


def _explained(url: str, error: Exception) -> ExternalError:
    if isinstance(error, ArrayError):
        return ExternalError(str(error))  # it names the file
    what = str(error).split("\n", 1)[0]
    if _NO_UID in what:
        what = what.removeprefix("Invalid Input Error: ")
        return ExternalError(f"{url}: {what}, which is 32 hexadecimal digits. Remedy: correct `uid`, or the file")
    return ExternalError(f"{url}: cannot be read ({what}). Remedy: write the file again")
