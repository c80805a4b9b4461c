"""Reading the lake's files with their checksums: the bytes that a caller gets are verified, and only those are read.

Here: opening files, the ranges of bytes that columns take, and vectors that are verified as they are used. Not here:
the checksums themselves (`resources.storage.checksums`), and what follows from damage (`resources.lake.files`).
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources.storage.checksums import BLOCK, Checked, ChecksumError
from resources.storage.stores import Entry, Store

METADATA_KEY = b"clip_data_selection"
SEALED = {"checksums": "xxh3_64"}
"""Part of the record of a file that has checksums, so that one whose checksums can't be found counts as damaged."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Checked]]:
    """Open a local file for reading in ranges.

    Yields:
        The file, and its checksums.

    Raises:
        ChecksumError: its footer is damaged.
    """
    with open(path, "rb") as file:
        yield file, _checked(file)


def _checked(file: BinaryIO) -> Checked:
    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    return Checked(read, file.seek(0, os.SEEK_END))


def mapped(path: Path) -> tuple[pa.Buffer, Checked]:
    """Return the bytes of a local file, mapped into memory, and its checksums.

    Raises:
        ChecksumError: its footer is damaged.
    """
    if os.path.getsize(path):
        with pa.memory_map(str(path)) as source:
            buffer = source.read_buffer()
    else:
        buffer = pa.py_buffer(b"")
    view = memoryview(buffer)
    return buffer, Checked(lambda start, stop: view[start:stop], len(view))


def read_record(store: Store, location: str, entry: Entry | None = None) -> tuple[dict[str, Any], bool]:
    """Read the record of a file from its footer; of a remote file, only the end.

    Args:
        store: the file's store.
        location: its location.
        entry: the file as it was listed, which saves a request.

    Returns:
        The record, whose `rows` are the number of rows; and whether the file has checksums.

    Raises:
        ChecksumError: the footer is damaged.
        ArrowInvalid, OSError, KeyError, TypeError, ValueError: it is not a file with a record.
    """
    with store.open(location, entry) as file:
        checked = _checked(file)
        if location.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        else:
            schema, rows = pa.ipc.open_file(pa.PythonFile(file, "r")).schema, None
    record = json.loads((schema.metadata or {})[METADATA_KEY])
    if record.items() >= SEALED.items() and not checked.sealed:
        raise ChecksumError("its checksums are not where they were written")
    return {**record, "rows": record["rows"] if rows is None else rows}, checked.sealed


def read_parquet(path: Path, columns: list[str] | None) -> pa.Table:
    """Read columns of a local Parquet file, by default all, and verify them.

    Raises:
        ChecksumError: a block of them is damaged.
    """
    with opened(path) as (file, checked):
        parquet = pq.ParquetFile(file)
        verify_columns(parquet.metadata, checked, columns)
        return parquet.read(columns=columns)


def verify_columns(metadata: pq.FileMetaData, checked: Checked, columns: Collection[str] | None) -> None:
    """Verify the bytes of some columns of a Parquet file; of all bytes for None.

    Raises:
        ChecksumError: a block of them is damaged.
    """
    if columns is None or not checked.sealed:
        checked.verify()
        return
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            path = chunk.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in columns):
                start = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
                checked.verify(start, start + chunk.total_compressed_size)


def read_arrow(buffer: pa.Buffer, checked: Checked, columns: Collection[str] | None) -> pa.Table:
    """Return the table in an Arrow file, without a copy, and verify everything but the values of other columns.

    Args:
        buffer: the bytes of the file.
        checked: its checksums.
        columns: columns to verify; by default all.

    Raises:
        ChecksumError: a block is damaged.
    """
    checked.verify(0, min(BLOCK, len(buffer)))  # the schema and the first batch's header, before they are followed
    table = pa.ipc.open_file(buffer).read_all()
    others = [] if columns is None else [name for name in table.column_names if name not in columns]
    values = sorted(
        (part.address - buffer.address, part.size)
        for name in others
        for chunk in table[name].chunks
        for part in chunk.buffers()
        if part is not None
    )
    at = 0
    for start, size in values:
        checked.verify(at, start)
        at = max(at, start + size)
    checked.verify(at)
    return table


class Vectors:
    """Vectors in a memory-mapped file, `[n, d]` float16; indexing verifies the rows that it returns.

    Args:
        values: the vectors, not verified yet.
        verify: verifies the blocks of the file with these numbers.
        offset: of the first vector in the file.
    """

    def __init__(self, values: np.ndarray, verify: Callable[[np.ndarray], None], offset: int) -> None:
        self._values = values
        self._verify = verify
        self._offset = offset
        self.shape: tuple[int, int] = values.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return rows by a slice, without a copy, or by their numbers, integers `[m]`."""
        size = self._values.itemsize * self.shape[1]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"vectors are read in order, not with a step of {step}")
            first, last = self._offset + start * size, self._offset + stop * size
            if first < last:
                self._verify(np.arange(first // BLOCK, -(-last // BLOCK)))
        elif len(rows):
            numbers = np.arange(len(self))[rows]  # counts from the end, and refuses rows that do not exist
            first = (self._offset + numbers * size) // BLOCK
            last = (self._offset + (numbers + 1) * size - 1) // BLOCK
            longest = int((last - first).max()) + 1
            self._verify(np.unique(np.minimum(first[:, None] + np.arange(longest), last[:, None])))
        return self._values[rows]
