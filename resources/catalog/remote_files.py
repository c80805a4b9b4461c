"""A lake in an object store as DuckDB reads it: one listing of a folder, local copies of small files, ranges of others.

DuckDB asks Python for what it needs: the files that fit a pattern, a file's size, its bytes. With fsspec's usual
answers each file would cost several requests in each query.
"""

import datetime
import errno
import fnmatch
import glob
import io
import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from resources.storage.objects import ObjectStore
from resources.storage.stores import Entry

COPIED = 1 << 20
"""Bytes of the files that are copied to the local cache as a whole; of larger ones, ranges are read."""
AHEAD = 128
"""How many files are copied together at most."""
READERS = 16
LISTED_SECONDS = 5.0
"""How long a listing answers: a query looks at the same folder several times."""


def remote_files(root: str) -> AbstractFileSystem:
    """Return the file system of a lake in an object store, for `DuckDBPyConnection.register_filesystem`."""
    # DuckDB takes the scheme from the class.
    scheme = urlsplit(root).scheme
    found: AbstractFileSystem = type("RemoteFiles", (_RemoteFiles,), {"protocol": scheme})(root)
    return found


class _RemoteFiles(AbstractFileSystem):
    cachable = False

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = root
        self._store = ObjectStore(root)
        self._listed: dict[str, tuple[float, dict[str, Entry]]] = {}
        self._entries: dict[str, Entry] = {}
        self._copies: dict[str, Path] = {}
        self._ahead = 2
        self._copying = Lock()

    def glob(self, path: str, **_: Any) -> list[str]:
        """List the files that fit a pattern, whose folder is `glob.escape` of the root and what is in it."""
        parts = path.removeprefix(f"{self._root}/").removeprefix(f"{glob.escape(self._root)}/").split("/")
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
        listed = self._files("/".join([self._root, *fixed]), deep=len(fixed) < len(parts) - 1)
        return [location for location in listed if _fits(location.removeprefix(f"{self._root}/"), parts)]

    def _files(self, folder: str, *, deep: bool) -> dict[str, Entry]:
        at, found = self._listed.get(folder, (-math.inf, {}))
        if time.monotonic() - at > LISTED_SECONDS:
            found = {entry.location: entry for entry in self._store.files(folder, deep=deep)}
            self._listed[folder] = (time.monotonic(), found)
            self._entries |= found
        return found

    def _entry(self, path: str) -> Entry:
        location = path if "://" in path else f"{self.protocol}://{path}"
        entry = self._entries.get(location) or self._store.stat(location)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", location)
        return entry

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return a file's name and size."""
        entry = self._entry(path)
        return {"name": entry.location, "size": entry.size, "type": "file"}

    def modified(self, path: str) -> datetime.datetime:
        """Return when a file was written."""
        return datetime.datetime.fromtimestamp(self._entry(path).modified, datetime.UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        """Open a file for reading: a local copy of a small one, ranges of another.

        Raises:
            ReplacedError: it was replaced since its folder was listed.
        """
        if mode != "rb":
            raise ValueError(f"{path}: a catalog only reads")
        entry = self._entry(path)
        if entry.size > COPIED:
            return self._store.open(entry.location, entry)
        copy = self._known_copy(entry)
        if copy is None:
            with self._copying:  # another thread of DuckDB may be copying this file ahead
                copy = self._known_copy(entry) or self._copy_ahead(entry)
        return cast("BinaryIO", _Copy(os.open(copy, os.O_RDONLY)))

    def _known_copy(self, entry: Entry) -> Path | None:
        copy = self._copies.get(entry.location)
        return copy if copy is not None and copy.exists() else None

    def _copy_ahead(self, entry: Entry) -> Path:
        """Copy a file, and at the same time the next ones of its folder: more of them each time."""
        self._copies[entry.location] = copy = self._store.local(entry.location, entry)
        _, listed = self._listed.get(entry.location.rpartition("/")[0], (0.0, {}))
        after = itertools.islice(itertools.dropwhile(lambda one: one != entry, listed.values()), 1, self._ahead)
        self._ahead = min(2 * self._ahead, AHEAD)
        wanted = []
        for one in after:
            if one.size > COPIED or one.location in self._copies:
                continue
            found = self._store.copied(one)
            if found is None:
                wanted.append(one)
            else:  # a thread for each would wait for the interpreter, which DuckDB's own threads take turns with
                self._copies[one.location] = found
        if wanted:
            with ThreadPoolExecutor(READERS) as pool:
                copies = zip(wanted, pool.map(self._copy, wanted), strict=True)
                self._copies |= {one.location: path for one, path in copies if path is not None}
        return copy

    def _copy(self, entry: Entry) -> Path | None:
        """Return a local copy; None where it fails, which is an error when it is that file's turn."""
        try:
            return self._store.local(entry.location, entry)
        except OSError:
            return None


class _Copy(io.RawIOBase):
    """A local file that closes with its last reference: DuckDB does not close what it opens."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def readinto(self, buffer: Any) -> int:
        return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _fits(name: str, parts: list[str]) -> bool:
    found = name.split("/")
    return len(found) == len(parts) and all(map(fnmatch.fnmatchcase, found, parts))
