"""Rows of an answer, as a table for people or as JSON for programs.

Here: the printing that all commands share. Not here: where the rows come from (`queries`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]


def print_json(value: Any, console: Console) -> None:
    """Print a value as JSON: times as text in ISO format, and null for numbers that JSON does not have.

    Args:
        value: lists, mappings and scalars.
        console: where to print; the text is neither wrapped nor coloured.
    """
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, default=str)
    console.out(text, highlight=False)


def print_rows(rows: Sequence[Row], columns: Sequence[str], console: Console, *, title: str = "") -> None:
    """Print rows as a table; where a table would break words, one line per value and an empty line between rows.

    Args:
        rows: the rows.
        columns: keys of the rows that become columns, in this order.
        console: where to print.
        title: of the table.
    """
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        numbers = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
        # longest word of a name, a number or a heading: rich would break one before it folds another column's text
        cells = [column.replace("_", " "), *(_shown(row.get(column)) for row in rows)]
        table.columns[-1].min_width = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
    for row in rows:
        # A Text, because rich would read brackets in a predicate or a caption as markup.
        table.add_row(*(Text(_shown(row.get(column))) for column in columns))
    if _least(table) <= console.width:
        console.print(table)
    else:
        _print_blocks(rows, columns, console, title)


def _least(table: Table) -> int:
    """Return the least width of a table that breaks no word: each column has two spaces and a line beside it."""
    return sum((column.min_width or 0) + 3 for column in table.columns) + 1


def _print_blocks(rows: Sequence[Row], columns: Sequence[str], console: Console, title: str) -> None:
    blocks = []
    for row in rows:
        filled = {column.replace("_", " "): _shown(row.get(column)) for column in columns}
        blocks.append("\n".join(f"{name}: {value}" for name, value in filled.items() if value))
    text = "\n\n".join([title, *blocks] if title else blocks)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5f}"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value
