"""Object stores: S3 and compatible servers, Google Cloud Storage and Azure, through obstore.

Credentials and endpoints come from the environment variables that the stores' own tools read, such as
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS and AZURE_STORAGE_ACCOUNT_NAME. Locations never
hold them. Requests are tried again up to `RETRIES` times, with growing pauses.
"""

import contextlib
import errno
import hashlib
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from resources.storage.stores import Entry, ReplacedError, StorageError, cache_folder

RETRIES = 5
RETRY_SECONDS = 60
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "gs": (),
}
"""Environment variables with the address of a server other than the provider's, by scheme."""
CACHE_VARIABLE = "CLIP_SELECTION_CACHE_BYTES"
"""Environment variable with the bytes that local copies of one root may take."""
CACHE_BYTES = 100 << 30
IN_USE_SECONDS = 3600
"""A copy that was asked for more recently than this is kept, beyond the limit too: a reader may be about to open it."""
_TAIL = 1 << 16
"""Last bytes of an object that are read at once."""
_BLOCK = 8 << 20
"""Bytes of a request of a download."""
_STREAMS = 4
"""Requests of a download at the same time; so many blocks are in memory."""


def credential_free(url: str) -> str:
    """Return a URL without user name, password, query and fragment, as it may be shown and stored."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


class ObjectStore:
    """The objects of one bucket.

    Args:
        root: URL in the bucket; local copies of objects are kept under a hash of it.
    """

    def __init__(self, root: str) -> None:
        parts = urlsplit(root)
        self._prefix = f"{parts.scheme}://{parts.netloc}/"
        self._root = root
        self._opened: Any = None
        self._added: float = math.inf  # bytes of copies since the limit was looked at

    def __getstate__(self) -> str:
        return self._root

    def __setstate__(self, root: str) -> None:
        self.__init__(root)  # type: ignore[misc]

    @property
    def _store(self) -> Any:
        """The connection, opened when it is first used, in each process of its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _connect(self._prefix))
        return self._opened[1]

    def _key(self, location: str) -> str:
        if not f"{location}/".startswith(self._prefix):
            raise ValueError(f"{location} is not in {self._prefix}")
        return f"{location}/".removeprefix(self._prefix).rstrip("/")

    def _below(self, folder: str) -> str | None:
        """Return the beginning of the keys in a folder."""
        key = self._key(folder)
        return f"{key}/" if key else None

    def _entry(self, meta: Any) -> Entry:
        tag = meta.get("e_tag") or f"{meta['size']} {meta['last_modified'].isoformat()}"
        return Entry(f"{self._prefix}{meta['path']}", meta["size"], tag, meta["last_modified"].timestamp())

    def files(self, folder: str, *, deep: bool = False) -> list[Entry]:
        """List the objects under a prefix, by location; those with a further `/` only with `deep`."""
        import obstore

        with _explained(folder):
            if deep:
                found = [
                    meta for page in obstore.list(self._store, self._below(folder), chunk_size=1000) for meta in page
                ]
            else:
                found = list(obstore.list_with_delimiter(self._store, self._below(folder))["objects"])
        return sorted((self._entry(meta) for meta in found), key=lambda entry: entry.location)

    def folders(self, folder: str) -> list[str]:
        """List the next parts of the prefixes under a prefix, sorted."""
        import obstore

        with _explained(folder):
            found = obstore.list_with_delimiter(self._store, self._below(folder))["common_prefixes"]
        return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found)

    def stat(self, location: str) -> Entry | None:
        """Return an object as a listing shows it; None if there is none."""
        import obstore

        try:
            with _explained(location):
                return self._entry(obstore.head(self._store, self._key(location)))
        except FileNotFoundError:
            return None

    def read(self, location: str) -> bytes:
        """Read a complete object."""
        import obstore

        with _explained(location):
            return bytes(obstore.get(self._store, self._key(location)).bytes())

    def open(self, location: str, entry: Entry | None = None) -> BinaryIO:
        """Open an object for reading ranges."""
        found = entry or self._present(location)
        return cast("BinaryIO", io.BufferedReader(_Ranges(self, found), buffer_size=1 << 16))

    def _present(self, location: str) -> Entry:
        found = self.stat(location)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", location)
        return found

    def read_range(self, entry: Entry, start: int, stop: int) -> bytes:
        """Read the bytes of an object from `start` to before `stop`.

        Raises:
            ReplacedError: the object is another one than `entry`.
        """
        import obstore

        if start >= stop:
            return b""
        options: Any = {"range": (start, stop), "if_match": entry.tag}
        with _explained(entry.location):
            found = bytes(obstore.get(self._store, self._key(entry.location), options=options).bytes())
        if len(found) != stop - start:
            raise StorageError(f"{entry.location}: {len(found):,} bytes came of {stop - start:,}. Remedy: try again")
        return found

    def put(self, location: str, source: Path) -> None:
        """Upload a local file; the object is replaced when all of it has arrived."""
        import obstore

        with _explained(location):
            obstore.put(self._store, self._key(location), source)

    def put_if_absent(self, location: str, content: bytes) -> bool:
        """Write an object unless there is one, and return whether it was written."""
        return self._put_if(location, content, "create")

    def put_if_unchanged(self, location: str, content: bytes, tag: str) -> bool:
        """Write an object if the present one has this ETag, and return whether it was written."""
        return self._put_if(location, content, {"e_tag": tag})

    def _put_if(self, location: str, content: bytes, mode: Any) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with _explained(location):
            try:
                obstore.put(self._store, self._key(location), content, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                # The answer to an attempt before may have been lost: the object may be ours.
                return self.stat(location) is not None and self.read(location) == content
            except FileNotFoundError:
                return False
        return True

    def delete(self, location: str) -> bool:
        """Remove an object, and return whether there was one."""
        import obstore

        if self.stat(location) is None:
            return False
        with _explained(location):
            obstore.delete(self._store, self._key(location))
        return True

    def delete_folder(self, folder: str) -> None:
        """Remove all objects under a prefix."""
        import obstore

        keys = [self._key(entry.location) for entry in self.files(folder, deep=True)]
        with _explained(folder):
            for start in range(0, len(keys), 1000):
                obstore.delete(self._store, keys[start : start + 1000])

    def move(self, location: str, to: str) -> None:
        """Copy an object, or all under a prefix, and remove the first. S3 has no rename."""
        import obstore

        whole = [] if (one := self.stat(location)) is not None else self.files(location, deep=True)
        moved = [one] if one is not None else whole
        if not moved:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", location)
        with _explained(location):
            for entry in moved:
                target = f"{to}{entry.location.removeprefix(location)}"
                obstore.copy(self._store, self._key(entry.location), self._key(target))
            obstore.delete(self._store, [self._key(entry.location) for entry in moved])

    def local(self, location: str, entry: Entry | None = None) -> Path:
        """Return a local copy of an object, downloaded unless there is one with the same ETag."""
        found = entry or self._present(location)
        path = self.copied(found)
        if path is None:
            path = self._copy_path(found)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(path.parent, found.size)
            self._download(found, path)
        return path

    def copied(self, entry: Entry) -> Path | None:
        """Return the local copy of an object, and note that it is used; None if there is none."""
        path = self._copy_path(entry)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def _copy_path(self, entry: Entry) -> Path:
        name = hashlib.sha256(f"{entry.location}\0{entry.tag}".encode()).hexdigest()[:40]
        return cache_folder(self._root) / "objects" / f"{name}{Path(entry.location).suffix}"

    def _make_room(self, folder: Path, size: int) -> None:
        """Keep the copies within their limit, to 5 %: looking at all of them for each copy would take long."""
        limit = int(os.environ.get(CACHE_VARIABLE) or CACHE_BYTES)
        self._added += size
        if self._added > limit // 20:
            self._added = 0
            _make_room(folder, size, limit)

    def _download(self, entry: Entry, path: Path) -> None:
        """Copy an object to a local file, which is complete or absent."""
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with open(descriptor, "wb") as file, ThreadPoolExecutor(_STREAMS) as pool:

                def copy(start: int) -> None:
                    block = self.read_range(entry, start, min(start + _BLOCK, entry.size))
                    if os.pwrite(file.fileno(), block, start) != len(block):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), temporary)

                starts = range(0, entry.size, _BLOCK)
                for _ in pool.map(copy, starts) if len(starts) > 1 else map(copy, starts):
                    pass
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


class _Ranges(io.RawIOBase):
    """An object as a file for reading and seeking."""

    def __init__(self, store: ObjectStore, entry: Entry) -> None:
        self._store, self._entry, self._at = store, entry, 0
        self._tail = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size, stop = self._entry.size, min(self._at + len(buffer), self._entry.size)
        if self._at < size - _TAIL:
            found = self._store.read_range(self._entry, self._at, stop)
        else:  # footers are read in several small pieces
            start = max(0, size - _TAIL)
            self._tail = self._tail or self._store.read_range(self._entry, start, size)
            found = self._tail[self._at - start : stop - start]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def filesystem(url: str) -> Any:
    """Return an fsspec file system for the scheme of a URL, with the settings that `ObjectStore` has."""
    from obstore.fsspec import FsspecStore

    scheme = urlsplit(url).scheme
    # Its `glob` finds nothing unless the class itself has the scheme.
    store: Any = type("FsspecStore", (FsspecStore,), {"protocol": scheme})
    return store(scheme, **_settings(scheme), skip_instance_cache=True)


def _connect(prefix: str) -> Any:
    from obstore.store import from_url

    with _explained(prefix):
        return from_url(prefix, **_settings(urlsplit(prefix).scheme))


def _settings(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {"timeout": timedelta(minutes=5), "connect_timeout": timedelta(seconds=20)}
    config: dict[str, Any] = {}
    endpoint = next((found for name in ENDPOINTS[scheme] if (found := os.environ.get(name))), "")
    if endpoint:
        config["endpoint"] = endpoint
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    return {
        "config": config or None,
        "client_options": options,
        "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    }


@contextlib.contextmanager
def _explained(location: str) -> Iterator[None]:
    """Raise `StorageError` for a store's error, and FileNotFoundError for an object that is not there."""
    from obstore.exceptions import (
        BaseError,
        NotFoundError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", location) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StorageError(
            f"{location}: the store refuses access. Remedy: set the credentials in the environment, for S3 "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and allow reading, writing, listing and deleting"
        ) from error
    except PreconditionError as error:
        raise ReplacedError(f"{location}: it was replaced while it was read. Remedy: run again") from error
    except BaseError as error:
        raise StorageError(
            f"{location}: the store failed, also after {RETRIES} more attempts: {_first_line(error)}. Remedy: check "
            "that it can be reached (for S3, AWS_ENDPOINT_URL and AWS_REGION), then run again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()[:300]


def _make_room(folder: Path, size: int, limit: int) -> None:
    """Remove the copies that were used longest ago, until one of `size` bytes has room."""
    copies = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    used = sum(held for _, held, _ in copies)
    for last_used, held, path in sorted(copies):
        if used + size <= limit or time.time() - last_used < IN_USE_SECONDS:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # a process that has it open, or mapped, keeps it
        used -= held
