"""Records of a lake's files, kept on this machine under the version tag of each file.

A pass that finds nothing new then lists the lake's folders, and reads no file. The cache is one SQLite file, which can
be deleted at any time.
"""

import contextlib
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resources.lake.stored import Stored, as_record, from_record
from resources.storage.stores import Entry

KNOWN_FILES = 100_000  # whose records are kept in memory; some 4 kB each, so 400 MB at most
AHEAD = 1000  # records that are fetched together, because files are mostly asked for in order


class Records:
    """Records by file and tag, in memory and in a cache that outlives the process.

    Args:
        path: the cache, an SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache = RecordCache(path)
        self._known: dict[str, tuple[str, Stored]] = {}

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Records, (self._path,)  # a lake is pickled for the workers of a DataLoader

    def get(self, entry: Entry) -> Stored | None:
        """Return the record of a file as it was listed; None if it is not known."""
        tag, stored = self._known.get(entry.location, ("", None))
        if stored is not None and tag == entry.tag:
            return stored
        record = self._cache.get(entry.location, entry.tag)
        if record is None:
            return None
        stored = from_record(record)
        self._know([(entry, stored)])
        return stored

    def keep(self, found: Sequence[tuple[Entry, Stored]]) -> None:
        """Keep records that were read from their files."""
        self._know(found)
        self._cache.put([(entry.location, entry.tag, as_record(stored)) for entry, stored in found])

    def _know(self, found: Sequence[tuple[Entry, Stored]]) -> None:
        if len(self._known) >= KNOWN_FILES:
            self._known.clear()
        self._known |= {entry.location: (entry.tag, stored) for entry, stored in found}


class RecordCache:
    """Records by location and tag.

    Args:
        path: the SQLite file; the first `put` creates it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, sqlite3.Connection] | None = None
        self._fetched: dict[str, tuple[str, bytes]] = {}
        self._until = ("", "")  # the first location that was fetched, and the last up to which nothing was left out

    def get(self, location: str, tag: str) -> dict[str, Any] | None:
        """Return the record of a file with this tag; None if it is not known, or the cache can't be read."""
        with contextlib.suppress(OSError, sqlite3.Error, zlib.error, ValueError):
            packed = self._packed(location, tag)
            if packed is not None:
                return dict(json.loads(zlib.decompress(packed)))
        return None

    def _packed(self, location: str, tag: str) -> bytes | None:
        kept = self._fetched.get(location)
        if kept is not None and kept[0] == tag:
            return kept[1]
        if not self._path.exists():
            return None
        with self._connection() as con:
            if self._until[0] <= location <= self._until[1]:  # another process may have written it since
                query = "SELECT record FROM records WHERE location = ? AND tag = ?"
                found: tuple[bytes] | None = con.execute(query, (location, tag)).fetchone()
                return None if found is None else found[0]
            after_folder = location.rpartition("/")[0] + chr(ord("/") + 1)
            query = "SELECT location, tag, record FROM records WHERE location >= ? AND location < ? ORDER BY 1 LIMIT ?"
            rows = con.execute(query, (location, after_folder, AHEAD)).fetchall()
            self._fetched = {where: (its_tag, record) for where, its_tag, record in rows}
            self._until = (location, rows[-1][0] if len(rows) == AHEAD else after_folder)
        kept = self._fetched.get(location)
        return kept[1] if kept is not None and kept[0] == tag else None

    def put(self, found: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Keep records of files by location and tag. A cache that can't be written costs time only."""
        packed = [(location, tag, zlib.compress(json.dumps(record).encode())) for location, tag, record in found]
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as con, con:
            con.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", packed)
            for location, _, _ in packed:
                self._fetched.pop(location, None)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Yield this process's connection; a forked process opens one of its own."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid() or not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                con = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
                con.execute("PRAGMA synchronous = OFF")
                con.execute("CREATE TABLE IF NOT EXISTS records (location TEXT PRIMARY KEY, tag TEXT, record BLOB)")
                self._opened = (os.getpid(), con)
            yield self._opened[1]
