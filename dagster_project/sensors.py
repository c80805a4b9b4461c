"""Automation: three sensors that find the work to be done and request runs. They compute nothing.

All are level-triggered: every tick compares the pool's listing with the lake's provenance, so no event can be lost. A
cursor only saves work and bounds retries; after "reset cursor" everything is looked at and tried again.
`docs/decisions/0002-automation.md` explains why declarative automation is not used.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import dagster as dg

from assets.base.context import Context, Snapshot
from assets.base.events import record_files
from assets.base.keys import SHARDS, SHARDS_NAME, asset_key
from assets.base.partitioned import PartitionedAsset
from assets.base.results import NotReady
from assets.graph import Graph
from assets.subsets.subset import SubsetAsset
from core.errors import UserError
from core.hashing import digest
from dagster_project.active_runs import ActiveRuns, active_runs
from dagster_project.early_checks import problems
from dagster_project.jobs import job_assets
from dagster_project.sqlite_event_log import kept_open
from dagster_project.staleness import (
    ATTEMPTS,
    change_token,
    clear,
    diff_partitions,
    find_due,
    lake_folders,
    run_tags,
    shards_per_run,
)

SHOWN = 10
INTERVAL = 10
"""Seconds from one tick of a sensor to the next. A tick without news takes 0.4 s for 10,000 shards."""

RECORDED = 200
"""Files that a tick records at most, so that it ends in time."""

TickResult = dg.SensorResult | dg.SkipReason
Tick = Callable[[Snapshot, Graph, dg.SensorEvaluationContext], TickResult]


@dataclass
class Memory:
    """A sensor's cursor.

    Attributes:
        seen: the last tick's `change_token`.
        quiet: whether nothing was due then.
        tried: how often work that is still out of date was requested, by its mark.
    """

    seen: str = ""
    quiet: bool = False
    tried: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, cursor: str | None) -> "Memory":
        """Read a cursor; an empty one is a fresh start."""
        return cls(**json.loads(cursor)) if cursor else cls()

    def request(self, marks: Sequence[str]) -> None:
        """Count an attempt."""
        for mark in marks:
            self.tried[mark] = self.tried.get(mark, 0) + 1

    def keep(self, marks: Sequence[str]) -> None:
        """Forget the attempts at everything but `marks`."""
        self.tried = {mark: count for mark, count in self.tried.items() if mark in set(marks)}

    def result(
        self, skip: str | None = None, runs: Sequence[dg.RunRequest] = (), quiet: bool = False
    ) -> dg.SensorResult:
        """Return the tick's result, with the cursor."""
        self.quiet = quiet
        return dg.SensorResult(run_requests=list(runs), skip_reason=skip, cursor=json.dumps(asdict(self)))


def build_sensors(context: Context, graph: Graph) -> list[dg.SensorDefinition]:
    """Return the sensors of a project; all are stopped until they are switched on."""
    turn = threading.Lock()  # ticks may come from several threads, and share the lake's cache

    def guarded(tick: Tick) -> Callable[[dg.SensorEvaluationContext], TickResult]:
        def evaluate(sensor: dg.SensorEvaluationContext) -> TickResult:
            with turn:
                try:
                    context.lake.refresh()
                    return tick(Snapshot(context), graph, sensor)
                except UserError as error:
                    return dg.SkipReason(f"{type(error).__name__}: {error}")

        return evaluate

    found = [
        dg.SensorDefinition(
            name="discover_shards",
            evaluation_fn=guarded(_discover),
            minimum_interval_seconds=INTERVAL,
            description="Lists the pool and keeps the partitions in step with it: adds new shards, and removes the "
            "lake's files of removed ones. Reads no shard. Switch it on together with follow_shards, which computes "
            "the new shards.",
        ),
        dg.SensorDefinition(
            name="follow_shards",
            evaluation_fn=guarded(_follow),
            asset_selection=dg.AssetSelection.assets(*(node.definition for node in graph.nodes)),
            minimum_interval_seconds=INTERVAL,
            description="Computes missing and stale files: new or changed shards, targets, negatives, scores. One run "
            "computes everything of neighbouring shards. Waits for runs that compute or read the same shards; tries "
            f"the same work {ATTEMPTS} times at most. Needs discover_shards.",
        ),
    ]
    if graph.subsets:
        found.append(
            dg.SensorDefinition(
                name="refresh_subsets",
                evaluation_fn=guarded(_refresh),
                asset_selection=dg.AssetSelection.assets(
                    *(subset.definition for subset in graph.subsets), graph.catalog
                ),
                minimum_interval_seconds=INTERVAL,
                description="Selects stale subsets again and rebuilds the catalog when scores, recipes or the pool "
                "have changed and no run computes what they are made from: at once if every shard is computed, "
                "otherwise when nothing changed since this sensor's last tick. The subset lists shards that failed "
                "and were left out. Works with or without follow_shards.",
            )
        )
    return found


def _discover(snapshot: Snapshot, graph: Graph, sensor: dg.SensorEvaluationContext) -> TickResult:
    change = diff_partitions(snapshot, graph, sensor.instance)
    if not change.added and not change.gone:
        return dg.SkipReason(f"The pool's {len(snapshot.listing)} shards all have a partition; none has gone.")
    clear(snapshot.context.lake, graph, change.gone)
    partitions = set(sensor.instance.get_dynamic_partitions(SHARDS_NAME))
    delete = [shard for shard in change.gone if shard in partitions]
    return dg.SensorResult(
        skip_reason=f"New shards: {_some(change.added)}. Shards that have gone: {_some(change.gone)}.",
        dynamic_partitions_requests=[
            *([SHARDS.build_add_request(change.added)] if change.added else []),
            *([SHARDS.build_delete_request(delete)] if delete else []),
        ],
    )


def _follow(snapshot: Snapshot, graph: Graph, sensor: dg.SensorEvaluationContext) -> TickResult:
    memory = Memory.read(sensor.cursor)
    active = _active(snapshot, graph, sensor)
    partitions = sensor.instance.get_dynamic_partitions(SHARDS_NAME)
    shards = _present(snapshot, partitions)
    # Runs in progress write to the lake all the time, so until one begins or ends only new shards are news.
    news = {"pool": {shard: snapshot.listing[shard] for shard in shards}, "runs": active.ids}
    seen = digest(news) if active.ids else change_token(snapshot, graph, shards)
    if memory.quiet and memory.seen == seen:
        return dg.SkipReason(_wait(active.ids) if active.ids else _rest(memory.tried))
    memory.seen = seen
    recorded = _record(snapshot, graph, sensor.instance, shards, active)
    due = find_due(snapshot, graph, shards, memory.tried, active.hold)
    memory.keep([*due.marks, *due.held, *due.given_up])
    runs = due.runs(partitions, shards_per_run())
    stopped = [f"{message} Needed by {_some(keys)}." for message, keys in problems(snapshot.context, graph).items()]
    for text in stopped:
        sensor.log.warning(text)  # in the tick's log, also when other work is requested
    if not runs:
        reasons = [*stopped, *(text for text in due.problems if not any(text in other for other in stopped))]
        if due.given_up:
            reasons.append(_left(list(due.given_up.values())))
        if due.held:
            reasons.append(_wait(active.ids))
        if recorded:
            reasons.append(f"Recorded {recorded} files that were written without Dagster.")
        quiet = not due.problems and not stopped and recorded < RECORDED
        return memory.result("\n".join(reasons) or _rest({}), quiet=quiet)
    memory.request(due.marks)
    return memory.result(runs=[_request(keys, group) for keys, group in runs])


def _refresh(snapshot: Snapshot, graph: Graph, sensor: dg.SensorEvaluationContext) -> TickResult:
    memory = Memory.read(sensor.cursor)
    active = _active(snapshot, graph, sensor)
    if before := active.reading([*(subset.key for subset in graph.subsets), "catalog"]):
        return dg.SkipReason(_wait(before))
    shards = _present(snapshot, sensor.instance.get_dynamic_partitions(SHARDS_NAME))
    seen = change_token(snapshot, graph, shards)
    if memory.seen != seen:
        memory.seen = seen
        if not _is_complete(snapshot, graph, shards):
            return memory.result("Shards are still to be computed; waiting until they are, or until nothing changes.")
    elif memory.quiet:
        return dg.SkipReason(_rest(memory.tried))
    marks = {subset.key: mark for subset in graph.subsets if (mark := _subset_mark(snapshot, subset)) is not None}
    if _catalog_is_behind(snapshot.context, graph):
        marks["catalog"] = f"catalog {seen[:16]}"
    memory.keep(list(marks.values()))
    wanted = {key: mark for key, mark in marks.items() if memory.tried.get(mark, 0) < ATTEMPTS}
    if not wanted:
        return memory.result(_left(list(marks)) if marks else _rest({}), quiet=True)
    memory.request(list(wanted.values()))
    return memory.result(runs=[_request(_with_what_follows(graph, wanted), [])])


def _is_complete(snapshot: Snapshot, graph: Graph, shards: Sequence[str]) -> bool:
    """Check whether every shard of the pool has a partition, and all that can be computed is up to date."""
    if len(shards) < len(snapshot.listing):
        return False
    due = find_due(snapshot, graph, shards, {})
    return not due.marks and not due.problems


def _subset_mark(snapshot: Snapshot, subset: SubsetAsset) -> str | None:
    """Return a short name of the version that a run would write, or None where it would write and measure nothing."""
    try:
        fingerprint = subset.inputs(snapshot).fingerprint(subset.model)[:16]
        if not subset.is_fresh(snapshot):
            return fingerprint
        return f"{fingerprint} checks" if subset.has_due_checks(snapshot) else None
    except NotReady:
        return None


def _with_what_follows(graph: Graph, wanted: Mapping[str, str]) -> list[str]:
    """List the wanted subsets, those that start from one of them, and the catalog."""
    keys: list[str] = []
    for subset in graph.subsets:
        if subset.key in wanted or f"subset/{subset.model.source}" in keys:
            keys.append(subset.key)
    return [*keys, "catalog"]


def _catalog_is_behind(context: Context, graph: Graph) -> bool:
    """Check whether the lake was written to since the catalog was built."""
    path = context.catalog_path()
    changed = max((context.lake.folder_changed(folder) for folder in lake_folders(context.lake, graph)), default=0.0)
    return changed > 0 and (not path.exists() or path.stat().st_mtime < changed)


def _present(snapshot: Snapshot, partitions: Sequence[str]) -> list[str]:
    """List the partitions whose shard is in the pool."""
    return [shard for shard in partitions if shard in snapshot.listing]


def _active(snapshot: Snapshot, graph: Graph, sensor: dg.SensorEvaluationContext) -> ActiveRuns:
    return active_runs(sensor.instance, graph, snapshot.context.lake, job_assets(graph))


def _record(
    snapshot: Snapshot, graph: Graph, instance: dg.DagsterInstance, shards: Sequence[str], active: ActiveRuns
) -> int:
    """Record files that were written without Dagster; a run in progress records its own."""
    nodes = [node for node in graph.nodes if isinstance(node, PartitionedAsset)]
    with kept_open(instance):
        return record_files(
            instance,
            nodes,
            snapshot.context.lake,
            shards,
            wanted=lambda key, shard: not active.hold(key, shard),
            most=RECORDED,
        )


def _wait(runs: Sequence[str]) -> str:
    return (
        f"Waiting for runs to end: {_some([run[:8] for run in runs])}. If the process of one is gone, "
        "terminate it on its page."
    )


def _request(keys: Sequence[str], shards: Sequence[str]) -> dg.RunRequest:
    return dg.RunRequest(asset_selection=[asset_key(key) for key in keys], tags=run_tags(shards))


def _rest(tried: Mapping[str, int]) -> str:
    failed = f", except for {len(tried)} that failed {ATTEMPTS} times" if tried else ""
    return f"Nothing has changed; everything is up to date{failed}."


def _left(what: Sequence[str]) -> str:
    return (
        f"Failed {ATTEMPTS} times and left alone: {_some(what)}. Remedy: read the failed run; mend the file or the "
        "settings, and it is tried again; or reset this sensor's cursor."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
