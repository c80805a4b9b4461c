"""Rates from the events that Dagster has recorded on this deployment, by engine and number of workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import dagster as dg

from assets.base.keys import asset_key

EVENTS, RUNS = 1000, 20
"""Events of an asset, and runs, that are read at most, the newest first."""

Basis = Literal["recorded", "calibrated", "arithmetic"]


@dataclass(frozen=True, order=True)
class Deployment:
    """An engine and its number of workers."""

    engine: str = "in_process"
    workers: int = 1

    def __str__(self) -> str:
        return self.engine if self.engine == "in_process" else f"{self.engine}, {self.workers} workers"


@dataclass(frozen=True)
class Rate:
    """How long an asset takes.

    Attributes:
        fixed: seconds of a run whatever its rows: loading models, starting workers, Dagster's own.
        per_row: seconds for each row.
        basis: where the numbers are from.
        rows: rows of the computation that was measured.
        detail: what was measured.
    """

    fixed: float
    per_row: float
    basis: Basis
    rows: int
    detail: str


def fitted(rows: Sequence[int], seconds: Sequence[float], workers: int) -> tuple[float, float]:
    """Return the fixed seconds and the seconds per row of shards that were computed one after the other.

    The time of the first shards, one for each worker, includes what is fixed. With no shard after them, nothing is.

    Args:
        rows: of each shard, in the order in which they ended.
        seconds: from the end of the shard before, or from the beginning.
        workers: how many shards were computed at once.
    """
    warm = min(workers, len(rows))
    steady = sum(rows[warm:])
    if not steady:
        return 0.0, sum(seconds) / max(sum(rows), 1)
    per_row = sum(seconds[warm:]) / steady
    return max(0.0, sum(seconds) - per_row * sum(rows)), per_row


def recorded_rows(instance: dg.DagsterInstance) -> dict[str, int]:
    """Return the rows that `raw_pool` has reported of shards, newest events first."""
    found: dict[str, int] = {}
    for record in instance.fetch_materializations(asset_key("raw_pool"), limit=EVENTS).records:
        event = record.asset_materialization
        if event is not None and record.partition_key is not None:
            rows = event.metadata.get("dagster/partition_row_count")
            found.setdefault(record.partition_key, int(rows.value) if rows is not None else 0)  # type: ignore[arg-type]
    return found


def recorded_rates(instance: dg.DagsterInstance, key: str) -> dict[Deployment, Rate]:
    """Return the rate of an asset's newest run with each engine and number of workers.

    Of the runs of a deployment, the newest that has more shards than workers counts; else the newest.

    Args:
        instance: the project's Dagster instance.
        key: the asset's key.
    """
    runs: dict[str, list[Any]] = {}
    for record in instance.fetch_materializations(asset_key(key), limit=EVENTS).records:
        runs.setdefault(record.run_id, []).append(record)
    found: dict[Deployment, tuple[bool, Rate]] = {}
    for run_id, records in list(runs.items())[:RUNS]:
        measured = _rate(instance, key, run_id, records[::-1])
        if measured is None:
            continue
        deployment, several, rate = measured
        if deployment not in found or (several and not found[deployment][0]):
            found[deployment] = (several, rate)
    return {deployment: rate for deployment, (_, rate) in found.items()}


def _rate(
    instance: dg.DagsterInstance, key: str, run_id: str, records: Sequence[Any]
) -> tuple[Deployment, bool, Rate] | None:
    """Return a run's rate, and whether more shards than workers were computed; None where nothing was."""
    values = [
        {name: value.value for name, value in record.asset_materialization.metadata.items()}
        for record in records
        if record.asset_materialization is not None
    ]
    computed = [found for found in values if found.get("computed", True)]
    if not computed:
        return None
    deployment = Deployment(str(computed[-1].get("engine", "in_process")), int(computed[-1].get("workers", 1)))
    step, run = _durations(instance, key, run_id)
    if step is None:
        return None
    rows = [int(found.get("dagster/partition_row_count", 0)) for found in computed]
    when = datetime.fromtimestamp(records[-1].timestamp, UTC).strftime("%Y-%m-%d")
    timed = [found for found in computed if "seconds" in found]
    if records[0].partition_key is None:
        fixed, per_row, total = run, 0.0, int(computed[-1].get("dagster/row_count", 0))
        detail = f"a run of {when}"
    elif not timed:
        fixed, per_row, total, detail = run, 0.0, sum(rows), f"{len(rows)} shards, with another encoder's, {when}"
    else:
        seconds = [float(found.get("seconds", 0.0)) for found in timed]
        _, per_row = fitted([int(found["dagster/partition_row_count"]) for found in timed], seconds, deployment.workers)
        total = sum(rows)
        fixed, detail = max(0.0, run - per_row * total), f"{len(timed)} shards, {when}"
    return deployment, len(timed) > deployment.workers, Rate(fixed, per_row, "recorded", total, detail)


def _durations(instance: dg.DagsterInstance, key: str, run_id: str) -> tuple[float | None, float]:
    """Return the seconds of a run's step, and of the run where this was its only step; else of the step again."""
    steps = instance.get_run_step_stats(run_id)
    name = key.replace("/", "__")
    step = next((found for found in steps if found.step_key == name), None)
    if step is None or step.start_time is None or step.end_time is None:
        return None, 0.0
    seconds = step.end_time - step.start_time
    record = instance.get_run_record_by_id(run_id)
    alone = len(steps) == 1 and record is not None and record.start_time is not None and record.end_time is not None
    return seconds, record.end_time - record.start_time if alone and record is not None else seconds  # type: ignore[operator]
