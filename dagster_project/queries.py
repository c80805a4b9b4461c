"""The commands that ask a project and compute nothing: status, versions, diff, lineage, rejects.

Each returns the exit status, and prints a table, or JSON with `--json`. Here: what is asked and which columns are
shown. Not here: arguments (`cli`), printing (`tables`), SQL of the answers (`resources.catalog`).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
from rich.console import Console

from core.errors import UserError
from core.names import suggestion
from dagster_project.tables import Row, print_json, print_rows
from resources.catalog.build import CatalogError, read_catalog
from resources.lake.files import Lake

if TYPE_CHECKING:
    from assets.base.context import Context, Snapshot
    from assets.base.partitioned import PartitionedAsset
    from assets.graph import Node
    from assets.subsets.subset import SubsetAsset

DOWNLOAD_FAILED = "download_failed"
SHOWN = 20
"""Rows of a long table that are printed unless `--limit` says otherwise."""


class QueryError(UserError):
    """A recipe, version or reason does not exist."""


def ask(catalog: Path, query: str, **parameters: object) -> list[dict[str, Any]]:
    """Return the rows of a query over the catalog, as dicts.

    Raises:
        FileNotFoundError: there is no catalog yet.
        CatalogError: it can't answer, because it or a file that it reads is damaged, or the lake was moved.
    """
    with read_catalog(catalog) as con:
        try:
            found = con.sql(query, params=parameters or None)
            return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            why = str(error).splitlines()[0]
            remedy = "" if "Remedy: " in why else ". Remedy: clip-select verify names damaged files"
            raise CatalogError(f"{catalog}: {why}{remedy}") from error


# Subsets and their history


def versions(catalog: Path, recipe: str | None, console: Console, *, as_json: bool) -> int:
    """Print the versions of one recipe's subset, or of all, oldest first."""
    rows = ask(
        catalog,
        "SELECT recipe, version, created, current, rows, source_rows, rows / source_rows AS of_source, shards, "
        "shards_missing, fingerprint FROM subsets",
    )
    require("recipe", recipe, {row["recipe"] for row in rows})
    rows = [row for row in rows if recipe in (None, row["recipe"])]
    if as_json:
        print_json(rows, console)
    elif rows:
        columns = ["recipe", "version", "created", "rows", "of_source", "shards", "shards_missing", "current"]
        print_rows(rows, columns, console)
    else:
        console.print("No recipe has a version yet. Remedy: clip-select run")
    return 0


def diff(
    catalog: Path,
    recipe: str,
    a: str | None,
    b: str | None,
    console: Console,
    *,
    limit: int | None,
    as_json: bool,
) -> int:
    """Print the rows that entered or left between two versions, each with its reason.

    Args:
        catalog: path of catalog.duckdb.
        recipe: name of the recipe.
        a: the earlier version; by default the one before `b`.
        b: the later version; by default the newest.
        console: where to print.
        limit: rows at most; by default `SHOWN` in a table and all in JSON.
        as_json: print the rows as JSON.

    Raises:
        QueryError: the recipe has no such version, or only one.
    """
    names = _version_names(catalog, recipe)
    b = b or names[-1]
    require("version", b, names)
    if a is None:
        if names.index(b) == 0:
            raise QueryError(f"{recipe}: {b} is the first version; there is none before it. Remedy: --from and --to")
        a = names[names.index(b) - 1]
    require("version", a, names)
    rows = ask(catalog, "FROM diff($recipe, $a, $b)", recipe=recipe, a=a, b=b)
    if as_json:
        print_json(rows[:limit], console)
        return 0
    counts = Counter((row["change"], row["reason"], row["text"]) for row in rows)
    summary = [
        {"change": change, "rows": number, "reason": reason, "step": text}
        for (change, reason, text), number in counts.most_common()
    ]
    print_rows(summary, ["change", "rows", "reason", "step"], console, title=f"{recipe}, {a} to {b}")
    columns = ["change", "uid", "reason", "step", "value", "threshold_a", "threshold_b", "detail"]
    _print_some(rows, columns, console, limit)
    return 0


def lineage(lake: Lake, recipe: str, version: str | None, console: Console, *, as_json: bool) -> int:
    """Print everything that a version was made from; as JSON, its whole lineage record."""
    names = _version_names(lake.catalog, recipe)
    version = version or names[-1]
    require("version", version, names)
    if as_json:
        from resources.lake.versions import Versions

        print_json(Versions(lake, recipe).read(version).lineage, console)
        return 0
    rows = ask(lake.catalog, "FROM lineage($recipe, $version)", recipe=recipe, version=version)
    print_rows(rows, ["what", "name", "value"], console, title=f"{recipe} {version}")
    return 0


def _version_names(catalog: Path, recipe: str) -> list[str]:
    rows = ask(catalog, "SELECT recipe, version FROM subsets")
    require("recipe with a version,", recipe, {row["recipe"] for row in rows})
    return [row["version"] for row in rows if row["recipe"] == recipe]


# The pool


def rejects(
    project: "Context",
    reason: str | None,
    console: Console,
    *,
    limit: int | None,
    as_json: bool,
) -> int:
    """Print how many samples were rejected for each reason, and the samples.

    Args:
        project: the opened project.
        reason: only samples rejected for this reason.
        console: where to print.
        limit: samples at most; by default `SHOWN` in a table and all in JSON.
        as_json: print the samples as JSON.

    Raises:
        QueryError: no sample was rejected for this reason.
    """
    rows = _rejects(project.lake, reason)
    if as_json:
        print_json(rows[:limit], console)
        return 0
    counts = Counter(row["reason"] for row in rows)
    print_rows(
        [{"reason": name, "samples": number} for name, number in counts.most_common()], ["reason", "samples"], console
    )
    _print_some(rows, ["shard", "key", "reason", "detail"], console, limit)
    return 0


def write_retry(project: "Context", reason: str | None, into: Path, console: Console, *, as_json: bool) -> int:
    """Write rejected samples as a Parquet file that img2dataset downloads again.

    Args:
        project: the opened project.
        reason: the samples' reason; by default `download_failed`.
        into: the file.
        console: where to print how many samples it lists.
        as_json: print the counts as JSON.

    Raises:
        QueryError: no sample was rejected for this reason.
        PoolError: the pool does not list urls.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from resources.pools.base import TarPool
    from resources.pools.retry import RETRY_SCHEMA, failed_downloads

    keys: dict[str, list[str]] = {}
    rows = _rejects(project.lake, reason or DOWNLOAD_FAILED)
    for row in rows:
        keys.setdefault(row["shard"], []).append(row["key"])
    groups = project.pool.groups if isinstance(project.pool, TarPool) else None
    tables = [
        failed_downloads(project.settings.pool, shard, some, None if groups is None else groups.tars(shard))
        for shard, some in keys.items()
    ]
    table = pa.concat_tables([RETRY_SCHEMA.empty_table(), *tables])
    into.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, into, compression="zstd")
    counts = {"file": str(into), "samples": table.num_rows, "without_url": len(rows) - table.num_rows}
    if as_json:
        print_json(counts, console)
        return 0
    without = f"; without a url, and left out: {counts['without_url']:,}" if counts["without_url"] else ""
    console.print(
        f"{into}: samples to download again: {table.num_rows:,}{without}", markup=False, highlight=False, soft_wrap=True
    )
    return 0


def _rejects(lake: Lake, reason: str | None) -> list[dict[str, Any]]:
    """Read the rejected samples of all shards, by shard and position."""
    rows = [row for shard in lake.shards("rejects") for row in lake.read("rejects", shard).to_pylist()]
    require("rejected sample for the reason", reason, {row["reason"] for row in rows})
    return [row for row in rows if reason in (None, row["reason"])]


# The state of the project


def status(project: "Context", console: Console, *, as_json: bool) -> int:
    """Print, for each asset, how many shards are up to date and how many a run would compute now."""
    from assets.base.context import Snapshot
    from assets.graph import build_graph
    from assets.subsets.catalog import catalog_is_newest

    snapshot = Snapshot(project)
    rows = [_status(node, snapshot) for node in build_graph(project).in_order]
    newest = catalog_is_newest(project)
    rows.append({"asset": "catalog", "state": UP_TO_DATE if newest else DUE, "up_to_date": int(newest), "of": 1})
    if as_json:
        print_json(rows, console)
        return 0
    print_rows(rows, ["asset", "state", "up_to_date", "of", "rows", "version"], console)
    for row in rows:
        if "detail" in row:
            console.print(f"{row['asset']}: {row['detail']}", style="yellow", markup=False, soft_wrap=True)
    gone = [shard for shard in project.lake.shards("raw_pool") if shard not in snapshot.listing]
    if gone:
        console.print(f"No longer in the pool: {', '.join(gone)}", markup=False, highlight=False)
    due = sum(row["state"] != UP_TO_DATE for row in rows)
    console.print(f"{due} of {len(rows)} assets are not up to date." if due else "Everything is up to date.")
    return 0


def shard_status(project: "Context", console: Console, *, limit: int | None, as_json: bool) -> int:
    """Print, for each shard, which assets are up to date; shards that are not complete come first.

    Args:
        project: the opened project.
        console: where to print.
        limit: shards at most; by default `SHOWN` in a table and all in JSON.
        as_json: print the shards as JSON.
    """
    from assets.base.context import Snapshot
    from assets.base.freshness import shard_states
    from assets.graph import build_graph

    nodes = {node.key: node for node in build_graph(project).nodes}
    states = shard_states(Snapshot(project), nodes)
    if as_json:
        print_json([asdict(state) for state in states[:limit]], console)
        return 0
    rows = [
        {
            "shard": state.shard,
            "rows": state.rows,
            "complete": f"{len(state.complete)} of {len(state.complete + state.due + state.waiting)}",
            "due": ", ".join(state.due),
            "waiting for inputs": ", ".join(state.waiting),
        }
        for state in states
    ]
    _print_some(rows, ["shard", "rows", "complete", "due", "waiting for inputs"], console, limit)
    complete = sum(state.is_complete for state in states)
    console.print(f"{complete} of {len(states)} shards are complete.", highlight=False)
    return 0


UP_TO_DATE, DUE, WAITING, ERROR = "up to date", "due", "waits for its inputs", "error"


def _status(node: "Node | SubsetAsset", snapshot: "Snapshot") -> dict[str, Any]:
    """Return a row about an asset; one whose inputs can't be read gets the message as `detail`."""
    from assets.base.partitioned import PartitionedAsset
    from assets.subsets.subset import SubsetAsset

    try:
        if isinstance(node, SubsetAsset):
            return _subset_status(node, snapshot)
        if isinstance(node, PartitionedAsset):
            return _partitioned_status(node, snapshot)
        fresh, stored = node.is_fresh(snapshot), snapshot.context.lake.stored(node.key)
    except UserError as error:
        return {"asset": node.key, "state": ERROR, "detail": str(error)}
    return {
        "asset": node.key,
        "state": UP_TO_DATE if fresh else DUE,
        "up_to_date": int(fresh),
        "of": 1,
        "rows": None if stored is None else stored.rows,
    }


def _partitioned_status(node: "PartitionedAsset", snapshot: "Snapshot") -> dict[str, Any]:
    lake, shards = snapshot.context.lake, list(snapshot.listing)
    states = {shard: _shard_state(node, snapshot, shard) for shard in shards}
    fresh = [shard for shard, state in states.items() if state == UP_TO_DATE]
    records = (lake.stored(node.key, shard) for shard in fresh)
    return {
        "asset": node.key,
        "state": next((state for state in (DUE, WAITING) if state in states.values()), UP_TO_DATE),
        "up_to_date": len(fresh),
        "of": len(shards),
        "rows": sum(record.rows for record in records if record is not None),
    }


def _shard_state(node: "PartitionedAsset", snapshot: "Snapshot", shard: str) -> str:
    from assets.base.results import NotReady

    try:
        return UP_TO_DATE if node.is_fresh(snapshot, shard) else DUE
    except NotReady:
        return WAITING


def _subset_status(node: "SubsetAsset", snapshot: "Snapshot") -> dict[str, Any]:
    from resources.lake.versions import Versions

    fresh, lake = node.is_fresh(snapshot), snapshot.context.lake
    version = Versions(lake, node.recipe).current()
    return {
        "asset": node.key,
        "state": UP_TO_DATE if fresh else DUE,
        "up_to_date": int(fresh),
        "of": 1,
        "rows": None if version is None else version.lineage["rows"],
        "version": None if version is None else version.name,
        **({"detail": "its report is missing; a run writes it"} if fresh and not node.has_report(lake) else {}),
    }


def require(what: str, name: str | None, known: Collection[str]) -> None:
    """Check that a name exists; None passes.

    Raises:
        QueryError: it does not; the message suggests the closest ones.
    """
    if name is not None and name not in known:
        raise QueryError(f"there is no {what} {name!r}; {suggestion(name, known)}")


def _print_some(rows: Sequence[Row], columns: Sequence[str], console: Console, limit: int | None) -> None:
    most = SHOWN if limit is None else limit
    if rows[:most]:
        print_rows(rows[:most], columns, console)
    if len(rows) > most:
        console.print(f"and {len(rows) - most:,} more rows; --limit shows more", highlight=False)
