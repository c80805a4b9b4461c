"""Pool rows and their scores side by side in one DuckDB table, from which a recipe selects.

Here: reading files of the lake into that table. Not here: selecting rows from it.

Score files have their rows in the order of `raw_pool`, so they are joined by position, and every row's uid and place
is compared: a file with other rows is an error, never a wrong score. One statement reads many shards, because each
statement costs some twenty milliseconds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from core import sql

ScoreFiles = tuple[str, Mapping[str, Path]]
"""A score's column in its files, and the files by shard."""

_SHARDS_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """The size of the table that `source_relation` made.

    Attributes:
        rows: Rows of the table, each with a uid of its own.
        duplicates: Rows left out because an earlier row has the same uid.
    """

    rows: int
    duplicates: int


def source_relation(
    con: duckdb.DuckDBPyConnection,
    name: str,
    *,
    raw_pool: Sequence[tuple[str, Path]],
    scores: Mapping[str, ScoreFiles],
    pool_columns: Collection[str] = (),
    sets: Mapping[str, str] | None = None,
) -> Source:
    """Create a temporary table of pool rows and their scores.

    Of rows with equal uids the one with the smallest (shard, place in the shard) stays; the others go to a table
    `{name} copies` with the same columns.

    Args:
        con: A DuckDB connection; for pools beyond memory, one with a folder for temporary files.
        name: The table's name; a table of that name is replaced.
        raw_pool: Shards and their `raw_pool` files.
        scores: For each score column of the table, its column and files.
        pool_columns: Columns of `raw_pool` to include, in addition to f0, f1, shard and key; `file_row_number` is the
            row's place in its file.
        sets: Boolean columns to add, as for `mark_sets`.

    Returns:
        The numbers of rows and of duplicates.

    Raises:
        ValueError: A shard has no file of a score, or a score file's rows are not those of its shard.
    """
    if not raw_pool:
        raise ValueError("No shard was given: there is no pool to choose from.")
    for score, (_, paths) in scores.items():
        for shard, _ in raw_pool:
            if shard not in paths:
                raise ValueError(f"Shard {shard} has no file of {score}. Remedy: materialize it for this shard.")
    con.execute(f"DROP TABLE IF EXISTS {sql.quoted(name)}")
    columns = ["f0", "f1", "shard", "key"]
    columns += [column for column in pool_columns if column not in columns]
    target = f"CREATE TEMP TABLE {sql.quoted(name)} AS"
    in_order = sorted(raw_pool)
    for start in range(0, len(in_order), _SHARDS_AT_ONCE):
        shards = in_order[start : start + _SHARDS_AT_ONCE]
        try:
            con.execute(f"{target} {_query(shards, scores, columns)}").fetchall()
        except duckdb.InvalidInputException as error:
            if _OUT_OF_STEP not in str(error):
                raise
            raise ValueError(_which_is_out_of_step(con, shards, scores)) from error
        target = f"INSERT INTO {sql.quoted(name)}"
    duplicates = _drop_duplicates(con, name)
    mark_sets(con, name, sets or {})
    ((rows,),) = con.execute(f"SELECT count(*) FROM {sql.quoted(name)}").fetchall()
    return Source(rows=rows, duplicates=duplicates)


def mark_sets(con: duckdb.DuckDBPyConnection, name: str, sets: Mapping[str, str]) -> None:
    """Add boolean columns for the sets that a row's uid is in.

    Args:
        con: The connection.
        name: The table's name.
        sets: For each boolean column that is added, the name of a relation with columns f0 and f1.
    """
    for column, listed in sets.items():
        con.execute(f"ALTER TABLE {sql.quoted(name)} ADD COLUMN {sql.quoted(column)} BOOLEAN DEFAULT false")
        con.execute(
            f"UPDATE {sql.quoted(name)} AS row SET {sql.quoted(column)} = true FROM {sql.quoted(listed)} AS listed "
            "WHERE row.f0 = listed.f0 AND row.f1 = listed.f1"
        ).fetchall()


_OUT_OF_STEP = "has other rows than"


def _query(shards: Sequence[tuple[str, Path]], scores: Mapping[str, ScoreFiles], columns: Sequence[str]) -> str:
    """Write the query of some shards' rows; it fails with `_OUT_OF_STEP` if a score file has other rows."""
    aliases: dict[tuple[Path, ...], str] = {}
    selected = [f"pool.{sql.quoted(column)}" for column in columns]
    for score, (column, paths) in scores.items():
        alias = aliases.setdefault(tuple(paths[shard] for shard, _ in shards), f"score{len(aliases)}")
        selected.append(f"{alias}.{sql.quoted(column)} AS {sql.quoted(score)}")
    joins, checks = [], ["true"]
    for files, alias in aliases.items():
        joins.append(f"POSITIONAL JOIN {_files(files)} AS {alias}")
        same = [f"pool.{column} IS NOT DISTINCT FROM {alias}.{column}" for column in ("f0", "f1", "file_row_number")]
        checks.append(f"CASE WHEN {' AND '.join(same)} THEN true ELSE error({sql.text(_OUT_OF_STEP)}) END")
    return (
        f"SELECT {', '.join(selected)} FROM {_files([file for _, file in shards])} AS pool {' '.join(joins)} "
        f"WHERE {' AND '.join(checks)}"
    )


def _which_is_out_of_step(
    con: duckdb.DuckDBPyConnection, shards: Sequence[tuple[str, Path]], scores: Mapping[str, ScoreFiles]
) -> str:
    """Compare the files one by one, and return which has other rows than its shard."""
    for shard, pool_file in shards:
        for score, (column, paths) in scores.items():
            one = _query([(shard, pool_file)], {score: (column, {shard: paths[shard]})}, ["f0"])
            try:
                con.execute(f"SELECT count(*) FROM ({one})").fetchall()
            except duckdb.InvalidInputException:
                return (
                    f"{paths[shard]} {_OUT_OF_STEP} {pool_file}: it was computed from another version of the shard. "
                    "Remedy: materialize it for this shard again."
                )
    raise AssertionError(f"shards {shards[0][0]} to {shards[-1][0]}: out of step together, but not one by one")


def _drop_duplicates(con: duckdb.DuckDBPyConnection, name: str) -> int:
    """Keep each uid's first row; rows were inserted in the order of (shard, place in the shard).

    Only rows whose hash occurs twice are compared by uid.
    """
    table, copies = sql.quoted(name), sql.quoted(f"{name} copies")
    con.execute(f'CREATE OR REPLACE TEMP TABLE {copies} AS SELECT *, 0::BIGINT AS "its rowid" FROM {table} LIMIT 0')
    ((rows,),) = con.execute(f"SELECT count(*) FROM {table}").fetchall()
    for twice in sql.repeated_hashes(con, "hash(f0, f1)", table, rows):
        con.register("twice", {"h": twice})
        con.execute(
            f"""
            INSERT INTO {copies} SELECT *, rowid FROM {table} WHERE hash(f0, f1) IN (SELECT h FROM twice)
            QUALIFY row_number() OVER (PARTITION BY f0, f1 ORDER BY rowid) > 1
            """
        ).fetchall()
        con.unregister("twice")
    ((dropped,),) = con.execute(f'DELETE FROM {table} WHERE rowid IN (SELECT "its rowid" FROM {copies})').fetchall()
    return int(dropped)


def _files(paths: Sequence[Path]) -> str:
    """Write a scan of files in this order, with each row's place."""
    listed = ", ".join(sql.path(path) for path in paths)
    return f"read_parquet([{listed}], file_row_number=true)"
