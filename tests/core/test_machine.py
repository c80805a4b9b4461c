"""The memory that DuckDB may use follows the machine, and a container's limit where that is less."""

import duckdb

from core.machine import duckdb_memory, memory_bytes


def test_a_containers_limit_counts_where_it_is_less(tmp_path) -> None:
    none, less, more = tmp_path / "none", tmp_path / "less", tmp_path / "more"
    none.write_text("max\n")
    less.write_text(f"{2**30}\n")
    more.write_text(f"{2**60}\n")
    machine = memory_bytes([])
    assert memory_bytes([none, more, tmp_path / "missing"]) == machine
    assert memory_bytes([none, less]) == min(2**30, machine)
    assert duckdb_memory([less]) == "512MiB"


def test_duckdb_accepts_the_limit() -> None:
    with duckdb.connect() as con:
        con.execute("SET memory_limit = ?", [duckdb_memory()])
        assert con.execute("SELECT current_setting('memory_limit')").fetchone() != ("",)
