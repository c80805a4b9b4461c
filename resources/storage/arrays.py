"""Arrays in .npy and .npz files, streamed in blocks of rows; a pickle is refused, never loaded.

`numpy.load` would hold a complete array of an .npz (768 MB for a DataComp shard) to return a part of it.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from core.errors import UserError
from resources.storage import files

_BLOCK_BYTES = 16 << 20
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError)


class ArrayError(UserError, ValueError):
    """A file's array cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class ArrayStream:
    """An open array.

    Attributes:
        where: file (and name in it), for messages.
        shape: rows first.
        dtype: as stored.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Any

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the array from its first row on, at most 16 MiB at a time. It can be read once.

        Raises:
            ArrayError: the file ends early or is damaged.
        """
        rows = self.shape[0]
        row_items = int(np.prod(self.shape[1:], dtype=np.int64))
        row_bytes = max(1, row_items * self.dtype.itemsize)
        step = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            try:
                data = _read_exactly(self.file, count * row_items * self.dtype.itemsize)
            except _UNREADABLE as error:
                raise _damaged(self.where, error) from error
            yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def all(self) -> np.ndarray:
        """Return the complete array, for small ones.

        Raises:
            ArrayError: the file ends early or is damaged.
        """
        return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *self.blocks()])


def array_names(url: str) -> list[str]:
    """Return the names of an .npz file's arrays.

    Raises:
        ArrayError: the file is missing, or no .npz.
    """
    with _npz(url) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextlib.contextmanager
def open_array(url: str, name: str | None = None) -> Iterator[ArrayStream]:
    """Open an .npy file, or an array of an .npz by its name.

    Raises:
        ArrayError: no such file or array, a pickle, or an array in column order.
    """
    where = url if name is None else f"{name} in {url}"
    with contextlib.ExitStack() as stack:
        try:
            if name is None:
                file: Any = stack.enter_context(files.open_binary(url))
            else:
                archive = stack.enter_context(_npz(url))
                file = stack.enter_context(archive.open(f"{name}.npy"))
        except KeyError as error:
            known = ", ".join(array_names(url))
            raise ArrayError(f"{url} has no array {name!r}; it has: {known}") from error
        except FileNotFoundError as error:
            raise ArrayError(f"{url} does not exist. Put it there, or correct the path.") from error
        try:
            shape, columns_first, dtype = _header(file)
        except _UNREADABLE as error:
            raise _damaged(where, error) from error
        if dtype.hasobject:
            raise ArrayError(
                f"{where} is a pickle, which can run code when it is loaded, and is refused. Save "
                "it as a plain number array."
            )
        if columns_first and len(shape) > 1:
            raise ArrayError(f"{where} is stored column by column (Fortran order). Save numpy.ascontiguousarray of it.")
        yield ArrayStream(where, shape, dtype, file)


@contextlib.contextmanager
def _npz(url: str) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(files.open_binary(url))
            archive = stack.enter_context(zipfile.ZipFile(file))
        except FileNotFoundError as error:
            raise ArrayError(f"{url} does not exist. Put it there, or correct the path.") from error
        except _UNREADABLE as error:
            raise _damaged(url, error) from error
        yield archive


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"unknown .npy version {version}")


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    parts = []
    missing = size
    while missing:
        part = file.read(missing)
        if not part:
            raise EOFError(f"the file ends {missing:,} bytes early")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged(where: str, error: Exception) -> ArrayError:
    return ArrayError(f"{where} cannot be read ({error}). Download or write the file again.")
