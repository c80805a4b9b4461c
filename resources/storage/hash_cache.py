"""SHA-256 of large files, each read once: models are identified by the hash of their weights, which may be gigabytes.

The cache is a JSON file in the user's cache folder. An entry counts only for the same path, device, inode, size, and
times of change of content and of status; the last of these no program can set.
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from core.hashing import sha256
from resources.storage.user_folders import user_cache

SMALLEST = 64 << 20
"""Bytes. Hashing a smaller file takes less than a tenth of a second."""
SETTLED = 2.0
"""Seconds. A file that changed more recently may change again without another time, and is not remembered."""


def cache_file() -> Path:
    """Return the path of the cache."""
    return user_cache() / "sha256.json"


def cached_sha256(path: Path, *, cache: Path | None = None, smallest: int = SMALLEST, settled: float = SETTLED) -> str:
    """Return a local file's SHA-256 as 64 hexadecimal characters; an unchanged large file is not read again.

    Args:
        path: the file.
        cache: the cache; by default the user's.
        smallest: size in bytes from which hashes are remembered.
        settled: seconds that a file must have been unchanged for its hash to be remembered.
    """
    stamp = _stamp(path)
    if stamp["size"] < smallest:
        return sha256(path)
    cache, key = cache or cache_file(), str(path.resolve())
    known = _read(cache).get(key, {})
    if known.get("stamp") == stamp:
        return str(known["sha256"])
    found = sha256(path)
    if _stamp(path) == stamp and time.time() - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9 > settled:
        with contextlib.suppress(OSError):  # a cache that can't be written costs time only
            _write(cache, {**_read(cache), key: {"stamp": stamp, "sha256": found}})
    return found


def _stamp(path: Path) -> dict[str, int]:
    found = os.stat(path)
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _read(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none yet, or not readable: the files are hashed again
    return found if isinstance(found, dict) else {}


def _write(cache: Path, entries: dict[str, Any]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False, encoding="utf-8") as file:
        json.dump(entries, file)
    os.replace(file.name, cache)
