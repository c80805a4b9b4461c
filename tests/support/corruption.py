"""Changes of a table that its checks must find, and of a file that its checksums must find."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

Spoil = Callable[[pa.Table], pa.Table]


def put(column: str, row: int, value: object) -> Spoil:
    """Return a change that replaces one value of a column."""

    def spoil(table: pa.Table) -> pa.Table:
        place = table.column_names.index(column)
        values = table[column].to_pylist()
        values[row] = value
        return table.set_column(place, table.schema.field(place), pa.array(values, table[column].type))

    return spoil


def swapped(table: pa.Table) -> pa.Table:
    """Return the table with its first two rows exchanged."""
    return table.take([1, 0, *range(2, table.num_rows)])


def replace_content(path: Path, content: bytes) -> None:
    """Replace a file by another one of the same name, so that a memory map of the old one keeps its bytes."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip(path: Path, place: int, bit: int = 0) -> bytes:
    """Flip one bit of a file, and return its new content."""
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1 << bit
    replace_content(path, bytes(damaged))
    return bytes(damaged)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda path: flip(path, path.stat().st_size // 2, 3),
    "flipped bit at the beginning": lambda path: flip(path, 1),
    "flipped bit at the end": lambda path: flip(path, path.stat().st_size - 20, 6),
    "truncated": lambda path: replace_content(path, path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: replace_content(path, b""),
    "deleted": lambda path: path.unlink(),
    "{}": lambda path: replace_content(path, b"{}"),
}
"""Ways to damage a file, by name."""
