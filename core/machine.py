"""The memory that this process may use, and DuckDB within it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import duckdb

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's limit: of cgroups version 2 and 1."""


def memory_bytes(limits: Sequence[Path] = CGROUP_LIMITS) -> int:
    """Return the machine's memory, or a container's limit where that is less, in bytes.

    Args:
        limits: files with a limit in bytes; others than numbers, such as `max`, are none.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        text = path.read_text().strip() if path.is_file() else ""
        if text.isascii() and text.isdigit():
            found.append(int(text))
    return min(found)


def duckdb_memory(limits: Sequence[Path] = CGROUP_LIMITS) -> str:
    """Return DuckDB's `memory_limit`: half of the memory; larger data spills to temporary files."""
    return f"{max(256, memory_bytes(limits) // 2**21)}MiB"


def open_duckdb(spill: str, *, memory: str | None = None, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB in memory.

    Args:
        spill: folder for what does not fit in memory.
        memory: its `memory_limit`; by default `duckdb_memory()`.
        threads: their number; by default one per core.
    """
    con = duckdb.connect()
    con.execute("SET temp_directory = ?", [spill])
    con.execute("SET memory_limit = ?", [memory or duckdb_memory()])
    con.execute("SET enable_progress_bar = false")
    if threads is not None:
        con.execute("SET threads = ?", [threads])
    return con


def close_duckdb(con: duckdb.DuckDBPyConnection, spill: str) -> None:
    """Close a DuckDB, and remove its folder."""
    con.close()
    shutil.rmtree(spill, ignore_errors=True)
