"""Listing and reading files on local disks and at any fsspec URL.

Here: bytes. Not here: file formats.
"""

import contextlib
import dataclasses
import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from core.hashing import sha256_of
from resources.storage.objects import filesystem
from resources.storage.stores import is_object_store

_GAP = 64 * 1024  # bytes: smaller holes are read, which is faster than a seek or another request
_STAMPS = ("ETag", "etag", "e_tag", "md5Hash", "checksum", "LastModified", "last_modified", "mtime", "created")


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a folder, as its listing shows it.

    Attributes:
        name: file name without folder.
        url: what `open_binary` takes.
        stamp: size, and the store's best indication of a change (checksum or time).
    """

    name: str
    url: str
    stamp: str

    @property
    def size(self) -> int:
        """The size in bytes; 0 where the store does not list it."""
        size = self.stamp.partition(" ")[0]
        return int(size) if size.isdecimal() else 0


def is_remote(url: str) -> bool:
    """Return whether `url` is a URL and no local path."""
    return "://" in url


def list_folder(url: str) -> list[Listed]:
    """List the files directly in a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is not a folder.
    """
    if not is_remote(url):
        with os.scandir(url) as entries:
            found = [(entry.name, entry.path, entry.stat()) for entry in entries if entry.is_file()]
        found.sort()
        return [Listed(name, path, f"{read.st_size} {read.st_mtime_ns}") for name, path, read in found]
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)  # a store's listing is kept for as long as the process lives
    listed = [_listed(fs, info) for info in fs.ls(path, detail=True) if info["type"] == "file"]
    return sorted(listed, key=lambda file: file.name)


def list_tree(url: str) -> list[Listed]:
    """List the files in a folder and all folders below, named by their path from there, by name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    listed = list_folder(url)
    for folder in list_folders(url):
        inner = list_tree(f"{url.rstrip('/')}/{folder}")
        listed += [dataclasses.replace(file, name=f"{folder}/{file.name}") for file in inner]
    return sorted(listed, key=lambda file: file.name)


def list_folders(url: str) -> list[str]:
    """Return the names of the folders directly in a folder; hidden ones are left out on local disks."""
    if not is_remote(url):
        with os.scandir(url) as entries:
            return [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    fs, path = _filesystem(url)
    return [
        info["name"].rstrip("/").rsplit("/", 1)[-1] for info in fs.ls(path, detail=True) if info["type"] == "directory"
    ]


def stat(url: str) -> Listed:
    """Return one file as a listing shows it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if not is_remote(url):
        found = os.stat(url)
        return Listed(name, url, f"{found.st_size} {found.st_mtime_ns}")
    fs, path = _filesystem(url)
    return Listed(name, url, _stamp(fs.info(path)))  # obstore's `info` has no bucket in its name


def _listed(fs: Any, info: dict[str, Any]) -> Listed:
    name = info["name"].rstrip("/").rsplit("/", 1)[-1]
    return Listed(name, fs.unstrip_protocol(info["name"]), _stamp(info))


def _stamp(info: dict[str, Any]) -> str:
    mark = next((str(info[key]) for key in _STAMPS if info.get(key) is not None), "")
    return f"{info['size']} {mark}"


def fingerprint(files: Sequence[Listed]) -> str:
    """Return a hash of name, size and time (or checksum) of all files, as 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{file.stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    if is_object_store(url):
        return filesystem(url), url.partition("://")[2]
    return url_to_fs(url)


def open_binary(url: str) -> BinaryIO:
    """Open a file for reading and seeking."""
    if not is_remote(url):
        return open(url, "rb")
    fs, path = _filesystem(url)
    return fs.open(path, "rb")


def sha256(url: str) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal characters."""
    with open_binary(url) as file:
        return sha256_of(file)


@contextlib.contextmanager
def mapped(url: str) -> Iterator[memoryview]:
    """Yield a file as read-only memory, paged in as it is read.

    A remote file is copied to a temporary file first, which costs one request and no memory.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(url):
            fs, path = _filesystem(url)
            file: Any = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".part"))
            fs.get_file(path, file.name)
            file = stack.enter_context(open(file.name, "rb"))
        else:
            file = stack.enter_context(open(url, "rb"))
        if os.fstat(file.fileno()).st_size == 0:
            yield memoryview(b"")
            return
        # Not closed here: an exception in flight still holds views of it, and closing it would raise another
        # error in its place. It closes with its last view.
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read the bytes at each (offset, size), in the order given.

    Neighbouring ranges are read together.

    Raises:
        OSError: the file ends before a range does.
    """
    out = [b""] * len(ranges)
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    with open_binary(url) as file:
        start = 0
        while start < len(order):
            first = ranges[order[start]][0]
            end = first
            stop = start
            while stop < len(order) and ranges[order[stop]][0] <= end + _GAP:
                offset, size = ranges[order[stop]]
                end = max(end, offset + size)
                stop += 1
            file.seek(first)
            block = memoryview(file.read(end - first))
            if len(block) < end - first:
                raise OSError(f"{url} ends at byte {first + len(block)}, before byte {end}")
            for i in order[start:stop]:
                offset, size = ranges[i]
                out[i] = bytes(block[offset - first : offset - first + size])
            start = stop
    return out
