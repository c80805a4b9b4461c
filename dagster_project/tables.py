"""Rows of an answer, as a table for people or as JSON for programs.

Here: the printing that all commands share. Not here: where the rows come from (`queries`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    """Print rows as a table, each value as it is.

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
    for row in rows:
        # A Text, because rich would read brackets in a predicate or a caption as markup.
        table.add_row(*(Text(_shown(row.get(column))) for column in columns))
    console.print(table)


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
