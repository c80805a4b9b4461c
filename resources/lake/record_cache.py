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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class RecordCache:
    """Records by location and tag.

    Args:
        path: the SQLite file; the first `put` creates it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, sqlite3.Connection] | None = None

    def get(self, location: str, tag: str) -> dict[str, Any] | None:
        """Return the record of a file with this tag; None if it is not known, or the cache can't be read."""
        if not self._path.exists():
            return None
        with contextlib.suppress(OSError, sqlite3.Error, zlib.error, ValueError), self._connection() as con:
            found = con.execute("SELECT record FROM records WHERE location = ? AND tag = ?", (location, tag)).fetchone()
            if found is not None:
                return dict(json.loads(zlib.decompress(found[0])))
        return None

    def put(self, found: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Keep records of files by location and tag. A cache that can't be written costs time only."""
        packed = [(location, tag, zlib.compress(json.dumps(record).encode())) for location, tag, record in found]
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as con, con:
            con.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", packed)

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
