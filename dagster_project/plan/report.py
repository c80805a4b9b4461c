"""`clip-select plan`: the estimate as a table, as JSON, and as the metadata of a job in Dagster's UI."""

import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assets.base.context import Context, Snapshot
from assets.base.engines import Engine
from assets.graph import Graph
from assets.subsets.subset import SubsetAsset
from dagster_project.plan.calibration import calibrate
from dagster_project.plan.estimates import Estimate, Sources, estimates, seconds_by_deployment, usable
from dagster_project.plan.recorded import Deployment, recorded_rates, recorded_rows
from dagster_project.plan.sizes import file_sizes, pool_size
from dagster_project.plan.work import Work, find_work
from dagster_project.tables import print_json, print_rows
from resources.models.operations import ModelSize, model_size

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console

COLUMNS = ["asset", "files", "why", "rows", "read", "written", "operations", "time", "from"]


@dataclass(frozen=True)
class Plan:
    """An estimate of all that a pass would do.

    Attributes:
        sources: what it follows from.
        assets: the estimate of each asset.
        seconds: the time by engine; the planned one is missing where something was not measured.
        free: bytes that are free where the lake is; None for an object store.
    """

    sources: Sources
    assets: list[Estimate]
    seconds: Mapping[Deployment, float]
    free: int | None

    @property
    def due(self) -> list[Estimate]:
        """The assets that are to be computed."""
        return [estimate for estimate in self.assets if estimate.work.due]

    def total(self, name: str) -> float:
        """Return the sum of a field over the assets that are due, as far as it is known."""
        return sum(getattr(estimate, name) or 0 for estimate in self.due)


def make_plan(
    project: Context,
    graph: Graph,
    instance: "dg.DagsterInstance",
    engine: Engine,
    *,
    only: Collection[str] | None = None,
    calibration: bool = True,
) -> Plan:
    """Estimate a pass over a project; nothing is written to its lake.

    Args:
        project: the project.
        graph: its assets.
        instance: its Dagster instance, whose events hold the measured rates.
        engine: the engine to plan for.
        only: keys of the assets; by default all.
        calibration: measure what has no rate yet, for about ten seconds.

    Raises:
        PoolError: the pool can't be listed.
    """
    project.lake.refresh()
    snapshot = Snapshot(project)
    work = find_work(snapshot, graph, only)
    pool = pool_size(snapshot).with_reported(recorded_rows(instance))
    recorded = usable(work, {each.asset: recorded_rates(instance, each.asset) for each in work if each.due})
    deployment = Deployment(engine.name, engine.workers)
    measured = None
    if calibration and any(each.due for each in work):
        lacking = _lacking(deployment, work, recorded)
        lacking += ["raw_pool"] if pool.rows_per_byte is None and not lacking else []
        dimensions = partial(_dimensions, project)
        measured = calibrate(project, engine, lacking, pool.bytes, dimensions) if lacking else None
    if measured is not None and measured.shards:
        pool = pool.with_sample(measured.rows, measured.shards)
    models = _model_sizes(project, work, {} if measured is None else measured.dimensions)
    files = file_sizes(snapshot, graph, {name: size.dimensions for name, size in models.items()})
    sources = Sources(snapshot, graph, work, pool, files, models, recorded, deployment, measured)
    folder = Path(project.lake.root)
    while project.lake.is_local and not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free if project.lake.is_local else None
    return Plan(sources, estimates(sources), seconds_by_deployment(sources), free)


def _lacking(
    deployment: Deployment, work: Sequence[Work], recorded: Mapping[str, Mapping[Deployment, Any]]
) -> list[str]:
    """List the assets that are due and have no rate on the engine; for one without shards, any engine's will do."""
    return [
        each.asset
        for each in work
        if each.due and each.node is not None and not isinstance(each.node, SubsetAsset)
        if deployment not in recorded[each.asset] and (each.node.partitioned or not recorded[each.asset])
    ]


def _dimensions(project: Context, encoder: str) -> int | None:
    """Return d of an encoder: as stored, else that of its model."""
    key = f"embeddings/{encoder}"
    for shard in project.lake.shards(key)[:1]:
        stored = project.lake.stored(key, shard)
        if stored is not None:
            return int(stored.summary["dimensions"])
    size = model_size(project.settings.encoders[encoder])
    return None if size is None else size.dimensions


def _model_sizes(project: Context, work: Sequence[Work], measured: Mapping[str, int]) -> dict[str, ModelSize]:
    """Return the size of the encoders whose assets are due; `measured` has the dimensions of some."""
    wanted: dict[str, bool] = {}  # whether the encoder's model computes something
    for each in work:
        if each.due and each.node is not None and not isinstance(each.node, SubsetAsset):
            name = each.node.declared.names.get("encoder")
            embeds = each.asset.startswith(("embeddings/", "target_embeddings/"))
            wanted |= {name: embeds or wanted.get(name, False)} if name else {}
    found = {}
    for name, embeds in wanted.items():
        dimensions = measured.get(name) or _dimensions(project, name)
        size = model_size(project.settings.encoders[name]) if embeds else None
        if dimensions is not None:
            found[name] = replace(size or ModelSize(dimensions), dimensions=dimensions)
    return found


# Printing


def plan(
    project: Context,
    console: "Console",
    *,
    only: Collection[str] = (),
    engine: str | None = None,
    workers: int | None = None,
    calibration: bool = True,
    as_json: bool = False,
) -> int:
    """Print what a run would compute, and what it would cost.

    Args:
        project: the opened project.
        console: where to print.
        only: names of the recipes; plan only what they need.
        engine: the engine to plan for; by default as the environment says.
        workers: number of its workers.
        calibration: measure what has no rate yet.
        as_json: print JSON.

    Returns:
        The exit status, 0.

    Raises:
        QueryError: there is no such recipe.
    """
    from assets.graph import build_graph
    from dagster_project.engines.choice import opened_engine
    from dagster_project.instance import open_instance
    from dagster_project.queries import require

    for recipe in only:
        require("recipe", recipe, project.settings.recipes)
    graph = build_graph(project)
    needed = graph.needed_by(only) if only else None
    with open_instance(project) as instance, opened_engine(engine, workers) as opened:
        found = make_plan(project, graph, instance, opened, only=needed, calibration=calibration)
    if as_json:
        print_json(document(found), console)
    else:
        print_plan(found, console)
    return 0


def document(found: Plan) -> dict[str, Any]:
    """Return a plan as JSON values: bytes, operations and seconds as numbers, null where they are not known."""
    sources, pool = found.sources, found.sources.pool
    return {
        "engine": sources.deployment.engine,
        "workers": sources.deployment.workers,
        "pool": {
            "shards": len(pool.bytes),
            "bytes": sum(pool.bytes.values()),
            "rows": pool.total,
            "rows_are_estimated": not pool.is_counted,
        },
        "assets": [_asset(estimate) for estimate in found.assets],
        "seconds": found.seconds.get(sources.deployment),
        "bytes_read": found.total("bytes_read"),
        "bytes_written": found.total("bytes_written"),
        "operations": found.total("operations"),
        "bytes_free": found.free,
        "engines": [
            {"engine": deployment.engine, "workers": deployment.workers, "seconds": seconds}
            for deployment, seconds in found.seconds.items()
        ],
    }


def _asset(estimate: Estimate) -> dict[str, Any]:
    work, rate = estimate.work, estimate.rate
    blocked = {shard or "": why for shard, why in work.blocked.items()}
    return {
        "asset": work.asset,
        "due": len(work.due),
        "of": work.of,
        "shards": work.shards,
        "why": work.why,
        "blocked": blocked,
        "rows": estimate.rows,
        "bytes_read": estimate.bytes_read,
        "bytes_written": estimate.bytes_written,
        "operations": estimate.operations,
        "seconds": estimate.seconds,
        "basis": estimate.basis,
        "measured": None if rate is None or not estimate.basis else rate.detail,
        "fixed_seconds": None if rate is None else rate.fixed,
        "rows_per_second": 1 / rate.per_row if rate is not None and rate.per_row else None,
    }


def print_plan(found: Plan, console: "Console") -> None:
    """Print a plan as a table, with the totals below."""
    if found.due:
        print_rows(rows(found), COLUMNS, console)
    for line in totals(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def totals(found: Plan) -> list[str]:
    """Return lines about the whole: blocked assets, the pool, bytes, and the time on each engine."""
    lines = [
        f"{estimate.work.asset}: can't be computed ({shards} of {estimate.work.of}): {reason}"
        for estimate in found.assets
        for reason, shards in Counter(estimate.work.blocked.values()).items()
    ]
    if not found.due:
        return [*lines, "Nothing is to be computed." if lines else "Everything is up to date."]
    lines += [f"{each.work.asset}: no rate: {each.basis}" for each in found.due if each.seconds is None]
    pool, planned = found.sources.pool, found.sources.deployment
    count = "unknown" if pool.total is None else f"{pool.total:,}{'' if pool.is_counted else ' (estimated from bytes)'}"
    lines.append(f"Pool: {len(pool.bytes):,} shards, {size_text(sum(pool.bytes.values()))}, rows: {count}")
    written = found.total("bytes_written")
    free = "" if found.free is None else f"; {size_text(found.free)} are free"
    lines.append(f"Reads {size_text(found.total('bytes_read'))}, writes {size_text(written)}{free}")
    if found.free is not None and written > found.free:
        lines.append("The lake's disk is too small. Remedy: free space, or another folder for `lake`")
    if planned not in found.seconds:
        unknown = ", ".join(estimate.work.asset for estimate in found.due if estimate.seconds is None)
        lines.append(f"Time with {planned}: at least {time_text(found.total('seconds'))}, without {unknown}")
    return lines + [f"Time with {each}: {time_text(seconds)}" for each, seconds in found.seconds.items()]


def rows(found: Plan) -> list[dict[str, Any]]:
    """Return the assets that are due as rows of a table with `COLUMNS`."""
    return [_row(estimate) for estimate in found.due]


def _row(estimate: Estimate) -> dict[str, Any]:
    work = estimate.work
    known = estimate.basis in ("recorded", "calibrated", "arithmetic")
    return {
        "asset": work.asset,
        "files": f"{len(work.due)} of {work.of}" if work.shards else "1",
        "why": "; ".join(f"{why} ({count})" if len(work.why) > 1 else why for why, count in work.why.items()),
        "rows": estimate.rows,
        "read": "" if estimate.bytes_read is None else size_text(estimate.bytes_read),
        "written": "" if estimate.bytes_written is None else size_text(estimate.bytes_written),
        "operations": "" if not estimate.operations else f"{estimate.operations:.1e}",
        "time": "?" if estimate.seconds is None else time_text(estimate.seconds),
        "from": estimate.basis if known else "no rate",
    }


def size_text(size: float) -> str:
    """Return a number of bytes for people, such as 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} PB"


def time_text(seconds: float) -> str:
    """Return a time for people: 1.3 s, or 2:05:10 from a minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
