"""Storage for a lake: one small interface, with an implementation for local disks and one for object stores.

A location is an absolute path, or a URL such as `s3://bucket/lake/raw_pool/00000.parquet`. A reader sees a complete
file or none: local files are written under another name, flushed and renamed; object stores replace a whole object.

Here: local disks. Not here: object stores (`resources.storage.objects`), and the meaning of files.
"""

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from core.errors import UserError
from resources.storage.user_folders import user_cache, user_state

OBJECT_STORES = ("s3", "gs", "az")
"""Schemes of object stores."""


class StorageError(UserError, OSError):
    """A store does not answer, or refuses; the message names the location and the remedy."""


class ReplacedError(StorageError):
    """A file was replaced since it was listed, so that its parts can't be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, as a listing shows it.

    Attributes:
        location: its absolute path or URL.
        size: bytes.
        tag: changes whenever the file is written: ETag of an object; inode, size, and times of a local file.
        modified: when it was written, in seconds since 1970.
    """

    location: str
    size: int
    tag: str
    modified: float

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self.location.rsplit("/", 1)[-1]


class Store(Protocol):
    """The operations that a lake needs of its storage. All raise `StorageError` when the storage fails."""

    def files(self, folder: str, *, deep: bool = False) -> list[Entry]:
        """List the files of a folder, and of those below with `deep`, by location; none if there is no folder."""

    def folders(self, folder: str) -> list[str]:
        """List the names of the folders directly in a folder, sorted."""

    def stat(self, location: str) -> Entry | None:
        """Return a file as a listing shows it; None if there is none."""

    def read(self, location: str) -> bytes:
        """Read a complete file; raises FileNotFoundError if there is none."""

    def open(self, location: str, entry: Entry | None = None) -> BinaryIO:
        """Open a file for reading ranges; raises FileNotFoundError if there is none.

        With the file's `entry`, a remote store is not asked for it; raises ReplacedError if it is out of date.
        """

    def put(self, location: str, source: Path) -> None:
        """Write a file from a local one, in place of an earlier one."""

    def put_if_absent(self, location: str, content: bytes) -> bool:
        """Write a file unless there is one, and return whether it was written."""

    def put_if_unchanged(self, location: str, content: bytes, tag: str) -> bool:
        """Write a file if the present one has this tag, and return whether it was written."""

    def delete(self, location: str) -> bool:
        """Remove a file, and return whether there was one."""

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with everything below, if there is one."""

    def move(self, location: str, to: str) -> None:
        """Rename a file, or a folder with everything below; raises FileNotFoundError if there is none."""

    def local(self, location: str, entry: Entry | None = None) -> Path:
        """Return a local path with the file's content: a copy, if the store is remote; `entry` as for `open`."""


def is_object_store(location: str) -> bool:
    """Return whether a location is a URL of an object store."""
    return location.partition("://")[0] in OBJECT_STORES and "://" in location


def cache_folder(root: str) -> Path:
    """Return the local folder for copies and records about a remote root, `<hash of the URL>` in `user_cache`."""
    return user_cache() / _hashed(root)


def state_folder(root: str) -> Path:
    """Return the local folder of Dagster's records of a remote root, `<hash of the URL>` in `user_state`."""
    return user_state() / _hashed(root)


def _hashed(root: str) -> str:
    return hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:16]


class LocalStore:
    """Files on local disks. Conditional writes are safe among processes of one machine."""

    def files(self, folder: str, *, deep: bool = False) -> list[Entry]:
        """List the files of a folder, by location."""
        found: list[Entry] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        if entry.is_file():
                            found.append(_entry(entry.path, entry.stat()))
                        elif deep and entry.is_dir():
                            found += self.files(entry.path, deep=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda entry: entry.location)

    def folders(self, folder: str) -> list[str]:
        """List the names of the folders directly in a folder, sorted."""
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stat(self, location: str) -> Entry | None:
        """Return a file as a listing shows it; None if there is none."""
        try:
            return _entry(location, os.stat(location))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, location: str) -> bytes:
        """Read a complete file."""
        return Path(location).read_bytes()

    def open(self, location: str, entry: Entry | None = None) -> BinaryIO:
        """Open a file for reading."""
        del entry
        return open(location, "rb")

    def put(self, location: str, source: Path) -> None:
        """Flush a local file on the same disk, and rename it to the location."""
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, location)
        _sync_folder(os.path.dirname(location))

    def put_if_absent(self, location: str, content: bytes) -> bool:
        """Write a file unless there is one, and return whether it was written."""
        folder = Path(location).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{os.path.basename(location)}.{os.getpid()}-{os.urandom(8).hex()}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, location)  # fails if there is one; a rename would replace it
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(str(folder))
        return True

    def put_if_unchanged(self, location: str, content: bytes, tag: str) -> bool:
        """Write a file if the present one has this tag, and return whether it was written."""
        import fcntl

        folder, name = os.path.split(location)
        with open(f"{folder}/.{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.stat(location)
            if found is None or found.tag != tag:
                return False
            temporary = Path(folder) / f".{name}.{os.getpid()}-{os.urandom(8).hex()}.tmp"
            temporary.write_bytes(content)
            self.put(location, temporary)
        return True

    def delete(self, location: str) -> bool:
        """Remove a file, and return whether there was one."""
        try:
            os.unlink(location)
        except FileNotFoundError:
            return False
        return True

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with everything below, if there is one."""
        if os.path.isdir(folder):
            shutil.rmtree(folder)

    def move(self, location: str, to: str) -> None:
        """Rename a file or a folder."""
        os.replace(location, to)

    def local(self, location: str, entry: Entry | None = None) -> Path:
        """Return the file's path."""
        del entry
        return Path(location)


def _entry(location: str, found: os.stat_result) -> Entry:
    tag = f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return Entry(location, found.st_size, tag, found.st_mtime)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
