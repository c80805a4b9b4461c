"""Changes of a table that its checks must find."""

from collections.abc import Callable

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
