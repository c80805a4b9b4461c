"""An index of a tar from its headers: names, offsets and sizes of members.

Agrees with `tarfile` (ustar, pax, GNU long names) and differs in three ways: it reads no data, it is an order of
magnitude faster, and of a cut or damaged tar it returns the members before the fault and a description, in place of an
exception. Grouping members into samples is in `resources.storage.tar_samples`.
"""

import re
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_QUICK = struct.Struct("124x11sc20xc")  # size (11 digits and the 12th byte) and type
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_FILES = {b"0", b"\0", b"7"}
_WITHOUT_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX_GLOBAL = b"L", b"K", b"S", b"g"
_EXTENSIONS = {_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, b"x", b"X"}
_AT_ONCE = 8192  # headers, of 512 bytes
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")


class TarError(ValueError):
    """The file is no tar with members that can be read in place."""


class Member(NamedTuple):
    """A member of a tar: its name, and the byte offset and size of its data."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The members of a tar, in order.

    It is stored by column, as strings and numbers: an object for each member would load Python's garbage collector,
    which next to a large library's objects costs many times the walk itself.

    Attributes:
        names: of the regular files that are complete.
        offsets: of their data, in bytes.
        sizes: of their data, in bytes.
        others: names of folders, links and other members without bytes of their own.
        cut: the member inside which the tar ends, if there is one.
        fault: description of the tar's fault, or None; `members` are good in both cases.
        after_end: description of the data after the first end-of-archive marker, or None. Members of tars that were
            joined to the first are among `members`.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    others: list[str]
    cut: Member | None
    fault: str | None
    after_end: str | None = None

    @property
    def members(self) -> Iterator[Member]:
        """The regular files that are complete, created one by one."""
        return map(Member._make, zip(self.names, self.offsets, self.sizes, strict=True))


def walk(buffer: bytes | memoryview, source: str) -> TarIndex:
    """Index a tar that lies in memory (or is mapped into it).

    Args:
        buffer: the bytes of the tar.
        source: its path, for messages.

    Raises:
        TarError: it is compressed, has sparse members, or has no header of a tar.
    """
    view = memoryview(buffer)
    length = len(view)
    for magic, kind in _COMPRESSED.items():
        if view[: len(magic)] == magic:
            raise TarError(
                f"{source}: this is a {kind} file; images are read in place, which needs a plain "
                "tar. Decompress it first."
            )
    headers: list[int] = []  # offset of each, to verify their checksums together
    positions: list[int] = []  # of the headers of members
    sizes: list[int] = []
    named: dict[int, str] = {}  # names from extended headers
    others: list[tuple[int, str]] = []
    cut: Member | None = None
    fault: str | None = None
    extended: dict[str, str] = {}  # from headers before, for the next member
    common: dict[str, str] = {}  # from global pax headers, for all that follow
    joined = 0
    after_end: str | None = None
    position = 0
    unpack = _QUICK.unpack_from
    while True:
        if position + _BLOCK > length:
            fault = f"no end-of-archive marker: the file ends at byte {length:,}"
            break
        digits, last_digit, kind = unpack(view, position)
        try:
            # the twelfth byte is NUL or blank, except with 12 digits or base 256
            size = _not_negative(int(digits if last_digit in b"\0 " else digits + last_digit, 8))
        except ValueError:
            if not any(view[position : position + _BLOCK]):
                following = _next_data(view, position)
                if following is None:
                    break
                if _first_bad_checksum(view, [following]) is not None:
                    after_end = f"{length - following:,} bytes after the end marker at byte {position:,} are no tar"
                    break
                joined += 1
                extended, common = {}, {}
                position = following
                continue
            try:
                size = _number(digits + last_digit)
            except ValueError:
                fault = f"damaged header at byte {position:,}"
                break
        headers.append(position)
        data = position + _BLOCK
        name: str | None = None
        if kind != b"0" or extended or common:
            if kind in _EXTENSIONS:
                if data + size > length:
                    fault = f"cut inside a header: the file ends at byte {length:,}"
                    break
                try:
                    records = _records(kind, bytes(view[data : data + size]))
                except ValueError:
                    fault = f"damaged header at byte {position:,}"
                    break
                (common if kind == _PAX_GLOBAL else extended).update(records)
                position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
                continue
            records = {**common, **extended}
            extended = {}
            name = records.get("path") or _name(view, position)
            if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in records):
                raise TarError(
                    f"{source}: member {name} is sparse, so its bytes do not lie together. Pack "
                    "the tar again without --sparse."
                )
            if "size" in records:
                try:
                    size = _not_negative(int(records["size"]))
                except ValueError:
                    fault = f"damaged header at byte {position:,}"
                    break
            folder = kind == b"\0" and _name(view, position).endswith("/")  # before 1988
            if kind not in _FILES or folder:
                others.append((position, name))
                has_data = kind not in _WITHOUT_DATA and not folder
                position = data + ((size + _BLOCK - 1) // _BLOCK * _BLOCK if has_data else 0)
                continue
        if data + size > length:
            cut = Member(_name(view, position) if name is None else name, data, size)
            fault = (
                f"cut inside {cut.name}: {length - data:,} of its {size:,} bytes are there, "
                f"the file ends at byte {length:,}"
            )
            break
        if name is not None:
            named[position] = name
        positions.append(position)
        sizes.append(size)
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    bad = _first_bad_checksum(view, headers)
    if bad is not None:
        fault = f"damaged header at byte {bad:,}"
        cut = None
        positions = positions[: bisect_left(positions, bad)]
        sizes = sizes[: len(positions)]
        others = [entry for entry in others if entry[0] < bad]
    if length == 0:
        fault = "the file is empty"
    elif fault is not None and (not headers or bad == 0):
        raise TarError(f"{source}: this is not a tar ({fault}). Replace or remove the file.")
    offsets = [position + _BLOCK for position in positions]
    if joined:
        after_end = (
            f"{joined + 1} tars are joined into one file; webdataset and tar read only the first unless they are asked "
            "to ignore end markers"
        )
    return TarIndex(_names(view, positions, named), offsets, sizes, [name for _, name in others], cut, fault, after_end)


def _next_data(view: memoryview, position: int) -> int | None:
    """Return the offset of the first block from `position` on that is not zero, or None."""
    step = _AT_ONCE * _BLOCK
    for start in range(position, len(view) - _BLOCK + 1, step):
        chunk = np.frombuffer(view[start : start + step], np.uint8)
        if chunk.any():
            block = start + int(np.flatnonzero(chunk)[0]) // _BLOCK * _BLOCK
            return block if block + _BLOCK <= len(view) else None
    return None


def _names(view: memoryview, positions: list[int], named: dict[int, str]) -> list[str]:
    """Return the members' names, read from many headers at a time.

    Args:
        view: the tar.
        positions: offset of each member's header.
        named: names from extended headers, by offset of the member's header.
    """
    found: list[str] = []
    for start in range(0, len(positions), _AT_ONCE):
        part = positions[start : start + _AT_ONCE]
        blocks = _blocks(view, part)
        raw = np.ascontiguousarray(blocks[:, :100]).view("S100")[:, 0].tolist()
        names = b"\0".join(raw).decode("utf-8", "surrogateescape").split("\0")
        if len(names) != len(part) or blocks[:, 345].any():  # NUL inside a name, or a prefix
            names = [_name(view, position) for position in part]
        if named:
            names = [named.get(*pair) for pair in zip(part, names, strict=True)]
        found += names
    return found


def _blocks(view: memoryview, positions: list[int]) -> np.ndarray:
    """Return the headers at these offsets, uint8 [n, 512]; all blocks of a tar are aligned."""
    whole = np.frombuffer(view, np.uint8, len(view) // _BLOCK * _BLOCK).reshape(-1, _BLOCK)
    return whole[np.array(positions, np.int64) // _BLOCK]


def _name(view: memoryview, position: int) -> str:
    """Return the name in one header, with its prefix."""
    name = bytes(view[position : position + 100]).partition(b"\0")[0]
    prefix = bytes(view[position + 345 : position + 500]).partition(b"\0")[0]
    if prefix and bytes(view[position + 156 : position + 157]) != _SPARSE:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(kind: bytes, content: bytes) -> dict[str, str]:
    """Return the fields that an extended header sets for the next members."""
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    return _pax_records(content)


def _number(field: bytes) -> int:
    """Return the value of a header field: octal digits, or base 256 if its first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") - (0x80 << (8 * (len(field) - 1)))
        if value < 0 or field[0] != 0x80:
            raise ValueError("negative size")
        return value
    text = field.partition(b"\0")[0].strip()
    return _not_negative(int(text, 8)) if text else 0


def _not_negative(size: int) -> int:
    """Return a size, refusing a negative one: with `int`, a hostile header could make the walk go in a circle."""
    if size < 0:
        raise ValueError("negative size")
    return size


def _pax_records(content: bytes) -> dict[str, str]:
    """Return the `length key=value` records of a pax header."""
    records = {}
    position = 0
    while position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        if match is None:
            raise ValueError("bad pax record")
        end = position + int(match[1])
        if end > len(content) or content[end - 1 : end] != b"\n" or end <= match.end():
            raise ValueError("bad pax record")
        key = match[2].decode("utf-8", "replace")
        records[key] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
        position = end
    return records


def _first_bad_checksum(view: memoryview, headers: list[int]) -> int | None:
    """Return the offset of the first header with a wrong checksum (unsigned, or signed as in old tars)."""
    powers = 8 ** np.arange(5, -1, -1)
    for start in range(0, len(headers), _AT_ONCE):
        positions = headers[start : start + _AT_ONCE]
        blocks = _blocks(view, positions)
        field = blocks[:, 148:156].copy()
        blocks[:, 148:156] = ord(" ")
        sums = blocks.sum(axis=1, dtype=np.int64)
        octal = (field[:, :6] >= ord("0")) & (field[:, :6] <= ord("7"))
        usual = octal.all(axis=1) & np.isin(field[:, 6], (0, ord(" ")))
        stated = (field[:, :6].astype(np.int64) - ord("0")) @ powers
        for row in np.flatnonzero(~usual | (stated != sums)).tolist():
            signed = int(blocks[row].view(np.int8).sum(dtype=np.int64))
            try:
                good = _number(field[row].tobytes()) in (int(sums[row]), signed)
            except ValueError:
                good = False
            if not good:
                return positions[row]
    return None
