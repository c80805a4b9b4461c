"""Checksums inside Parquet and Arrow files: an XXH3 of every block of bytes, verified when the block is read.

A sealed file is `body | table | trailer | footer`. Body and footer are the file as its writer left it. The table holds
the XXH3 (64 bits) of each 64 KiB of the body, as little-endian uint64. The trailer holds an XXH3 of itself and the
table, and one of the footer, so that every byte of the file is covered. Readers of Parquet and Arrow start at the
footer and follow its offsets into the body, so they never look at what lies between.
`docs/decisions/0008-checksums.md` has the reasons.

Here: bytes. Not here: the meaning of a damaged file (`resources.lake.files`).
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest as checksum

ReadRange = Callable[[int, int], bytes | memoryview]
"""Returns the bytes of a file from one offset to before another one."""

BLOCK = 1 << 16
"""Bytes that share a checksum; the unit in which a reader verifies."""

_MAGIC = b"CLIPXXH3"
# magic, bytes of a block, number of blocks, checksum of the table and the fields before, checksum of the footer
_TRAILER = struct.Struct("<8s2I2Q")
_ENDINGS = {b"PAR1": struct.Struct("<I4s"), b"ARROW1": struct.Struct("<i6s")}  # length of the footer, magic


class ChecksumError(ValueError):
    """Bytes of a file are not those that were written; the message says which."""


class Checked:
    """A file whose bytes are verified as they are read, each block once.

    Footer and table are verified at once. A file without checksums passes everything.

    Args:
        read: returns the bytes from one offset to before another one.
        size: bytes of the file.

    Attributes:
        sealed: whether the file has checksums.

    Raises:
        ChecksumError: the footer or the table is damaged, or the file does not end as Parquet and Arrow files do.
    """

    def __init__(self, read: ReadRange, size: int) -> None:
        self._read = read
        self.size = size
        self.sealed = False
        footer = _footer_start(read, size)
        if footer < _TRAILER.size:
            return
        trailer = bytes(read(footer - _TRAILER.size, footer))
        magic, block, count, of_table, of_footer = _TRAILER.unpack(trailer)
        if magic != _MAGIC:
            return
        self._body = footer - _TRAILER.size - 8 * count
        if block != BLOCK or self._body < 0 or count != -(-self._body // BLOCK):
            raise ChecksumError("its table of checksums is damaged")
        table = bytes(read(self._body, footer - _TRAILER.size))
        if checksum(table + trailer[:16]) != of_table:
            raise ChecksumError("its table of checksums is damaged")
        if checksum(read(footer, size)) != of_footer:
            raise ChecksumError("its footer does not have its checksum")
        self.sealed = True
        self._wanted = np.frombuffer(table, "<u8", count)
        self._verified = np.zeros(count, bool)

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Verify the blocks that hold the bytes from `start` to before `stop`; by default all.

        Raises:
            ChecksumError: a block does not have its checksum.
        """
        if not self.sealed:
            return
        stop = self._body if stop is None else min(stop, self._body)
        if start < stop:
            self.verify_blocks(np.arange(start // BLOCK, -(-stop // BLOCK)))

    def verify_blocks(self, blocks: np.ndarray) -> None:
        """Verify blocks by their numbers, integers `[n]`.

        Raises:
            ChecksumError: a block does not have its checksum.
        """
        if not self.sealed:
            return
        for block in blocks[~self._verified[blocks]].tolist():
            start, stop = block * BLOCK, min((block + 1) * BLOCK, self._body)
            if checksum(self._read(start, stop)) != self._wanted[block]:
                raise ChecksumError(f"bytes {start:,} to {stop - 1:,} do not have their checksum")
            self._verified[block] = True


def seal(path: Path) -> None:
    """Add checksums to a Parquet or Arrow file that was just written.

    Args:
        path: a local file that no reader has yet.
    """
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            body = _footer_start(lambda start, stop: view[start:stop], len(view))
            blocks = [checksum(view[start : min(start + BLOCK, body)]) for start in range(0, body, BLOCK)]
            footer = bytes(view[body:])
        table = np.array(blocks, "<u8").tobytes()
        head = struct.pack("<8s2I", _MAGIC, BLOCK, len(blocks))
        trailer = head + struct.pack("<2Q", checksum(table + head), checksum(footer))
        file.seek(body)
        file.write(table + trailer + footer)


def _footer_start(read: ReadRange, size: int) -> int:
    if size == 0:
        raise ChecksumError("it is empty")
    for magic, ending in _ENDINGS.items():
        if size < ending.size:
            continue
        length, found = ending.unpack(read(size - ending.size, size))
        if found == magic and 0 <= length <= size - ending.size:
            return size - ending.size - length
    raise ChecksumError("it does not end as a Parquet or Arrow file does")
