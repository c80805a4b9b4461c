"""Automation: three sensors that notice what is to be done and request runs. They compute nothing.

All are level-triggered: every tick asks what is out of date, from the pool's listing and the lake's provenance, so
no event can be lost. A cursor holds only what saves work or bounds retries; after "reset cursor" everything is
looked at and tried afresh. Why not declarative automation: `docs/decisions/0002-automation.md`.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import dagster as dg

from assets.base.checks import asset_key
from assets.base.partitioned import SHARDS, SHARDS_NAME, NotReady
from assets.graph import Graph
from assets.project import Project
from assets.subsets.subset import SubsetAsset
from dagster_project.dead_runs import close_dead_runs
from dagster_project.staleness import (
    ATTEMPTS,
    BAD_INPUT,
    RANGE_END,
    RANGE_START,
    clear,
    find_due,
    glance,
    lake_folders,
    look,
)

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
SHOWN = 10
Tick = dg.SensorResult | dg.SkipReason


@dataclass
class Memory:
    """A sensor's cursor.

    Attributes:
        seen: what the last tick saw, as `glance` puts it.
        quiet: whether nothing was to be done about that.
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
        """Give the tick's result, with the cursor."""
        self.quiet = quiet
        return dg.SensorResult(run_requests=list(runs), skip_reason=skip, cursor=json.dumps(asdict(self)))


def build_sensors(project: Project, graph: Graph) -> list[dg.SensorDefinition]:
    """Make the sensors of a project; all are stopped until somebody switches them on."""
    # They share the project, which remembers the pool's listing; ticks may come from several threads.
    turn = threading.Lock()

    def guarded(tick: Callable[[dg.SensorEvaluationContext], Tick]) -> Callable[[dg.SensorEvaluationContext], Tick]:
        def evaluate(context: dg.SensorEvaluationContext) -> Tick:
            with turn:
                try:
                    return tick(context)
                except BAD_INPUT as error:
                    return dg.SkipReason(f"{type(error).__name__}: {error}")

        return evaluate

    found = [
        dg.SensorDefinition(
            name="discover_shards",
            evaluation_fn=guarded(lambda context: _discover(project, graph, context)),
            minimum_interval_seconds=30,
            description="Lists the pool and keeps the partitions in step with it: new shards are added, and what "
            "a removed shard left in the lake is cleared away. Reads no shard. Switch it on together with "
            "follow_shards, which computes what this one finds.",
        ),
        dg.SensorDefinition(
            name="follow_shards",
            evaluation_fn=guarded(lambda context: _follow(project, graph, context)),
            asset_selection=dg.AssetSelection.assets(*(node.definition for node in graph.nodes)),
            minimum_interval_seconds=30,
            description="Computes what is missing or out of date, one step of the graph after the other: shards "
            "that are new or changed, targets, negatives, scores. Neighbouring shards share a run. Waits while "
            f"any run is under way; tries the same work {ATTEMPTS} times at most. Needs discover_shards.",
        ),
    ]
    if graph.subsets:
        found.append(
            dg.SensorDefinition(
                name="refresh_subsets",
                evaluation_fn=guarded(lambda context: _refresh(project, graph, context)),
                asset_selection=dg.AssetSelection.assets(
                    *(subset.definition for subset in graph.subsets), graph.catalog
                ),
                minimum_interval_seconds=60,
                description="Chooses subsets again and rebuilds the catalog when scores, recipes or the pool have "
                "changed and have come to rest: no run under way, and nothing new since this sensor's last tick. "
                "A shard that failed is left out and named on the subset. Works with or without follow_shards.",
            )
        )
    return found


def _discover(project: Project, graph: Graph, context: dg.SensorEvaluationContext) -> Tick:
    change = look(project, graph, context.instance)
    if not change.added and not change.gone:
        return dg.SkipReason(f"The pool's {len(project.listing())} shards all have a partition; none has gone.")
    clear(project, graph, change.gone)
    partitions = set(context.instance.get_dynamic_partitions(SHARDS_NAME))
    delete = [shard for shard in change.gone if shard in partitions]
    return dg.SensorResult(
        skip_reason=f"New shards: {_some(change.added)}. Shards that have gone: {_some(change.gone)}.",
        dynamic_partitions_requests=[
            *([SHARDS.build_add_request(change.added)] if change.added else []),
            *([SHARDS.build_delete_request(delete)] if delete else []),
        ],
    )


def _follow(project: Project, graph: Graph, context: dg.SensorEvaluationContext) -> Tick:
    memory = Memory.read(context.cursor)
    if under_way := _under_way(context.instance):
        return dg.SkipReason(under_way)
    partitions = context.instance.get_dynamic_partitions(SHARDS_NAME)
    shards = _present(project, partitions)
    seen = glance(project, graph, shards)
    if memory.quiet and memory.seen == seen:
        return dg.SkipReason(_rest(memory.tried))
    memory.seen = seen
    with project.at_rest():
        due = find_due(project, graph, shards, memory.tried)
    memory.keep(due.marks())
    runs = due.runs(partitions)
    if not runs:
        reasons = [*due.problems, _left(list(due.given_up.values()))] if due.given_up else due.problems
        return memory.result("\n".join(reasons) or _rest({}), quiet=not due.problems)
    memory.request([mark for wanted in due.now.values() for mark in wanted.values()])
    return memory.result(runs=[_request(keys, group) for keys, group in runs])


def _refresh(project: Project, graph: Graph, context: dg.SensorEvaluationContext) -> Tick:
    memory = Memory.read(context.cursor)
    if under_way := _under_way(context.instance):
        return dg.SkipReason(under_way)
    seen = glance(project, graph, _present(project, context.instance.get_dynamic_partitions(SHARDS_NAME)))
    if memory.seen != seen:
        memory.seen = seen
        return memory.result("Something has changed since the last tick; waiting until it comes to rest.")
    if memory.quiet:
        return dg.SkipReason(_rest(memory.tried))
    marks = {subset.key: mark for subset in graph.subsets if (mark := _subset_mark(project, subset)) is not None}
    if _catalog_is_behind(project, graph):
        marks["catalog"] = f"catalog {seen[:16]}"
    memory.keep(list(marks.values()))
    wanted = {key: mark for key, mark in marks.items() if memory.tried.get(mark, 0) < ATTEMPTS}
    if not wanted:
        return memory.result(_left(list(marks)) if marks else _rest({}), quiet=True)
    memory.request(list(wanted.values()))
    return memory.result(runs=[_request(_with_what_follows(graph, wanted), [])])


def _subset_mark(project: Project, subset: SubsetAsset) -> str | None:
    """Give a short name of the version that a run would write, or None where it would write none."""
    try:
        return None if subset.is_fresh(project) else subset.inputs().fingerprint(subset.model)[:16]
    except NotReady:
        return None


def _with_what_follows(graph: Graph, wanted: Mapping[str, str]) -> list[str]:
    """Name the subsets wanted, those that begin with one of them, and the catalog."""
    keys: list[str] = []
    for subset in graph.subsets:
        if subset.key in wanted or f"subset/{subset.model.source}" in keys:
            keys.append(subset.key)
    return [*keys, "catalog"]


def _catalog_is_behind(project: Project, graph: Graph) -> bool:
    """Tell whether something was written to the lake since the catalog was built."""
    path = project.catalog_path()
    times = [folder.stat().st_mtime_ns for folder in lake_folders(project, graph) if folder.exists()]
    return bool(times) and (not path.exists() or path.stat().st_mtime_ns < max(times))


def _present(project: Project, partitions: Sequence[str]) -> list[str]:
    """List the pool afresh; give the partitions whose shard is there."""
    project.look_again()
    listing = project.listing()
    return [shard for shard in partitions if shard in listing]


def _under_way(instance: dg.DagsterInstance) -> str:
    """Say which runs have not ended; nothing where there are none."""
    close_dead_runs(instance)
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED), limit=SHOWN + 1)
    if not runs:
        return ""
    return (
        f"Waiting for runs to end: {_some([run.run_id[:8] for run in runs])}. If the process of one is gone, "
        "terminate it on its page."
    )


def _request(keys: Sequence[str], shards: Sequence[str]) -> dg.RunRequest:
    return dg.RunRequest(
        asset_selection=[asset_key(key) for key in keys],
        tags={RANGE_START: shards[0], RANGE_END: shards[-1]} if shards else {},
    )


def _rest(tried: Mapping[str, int]) -> str:
    failed = f", but for {len(tried)} that failed {ATTEMPTS} times" if tried else ""
    return f"Nothing has changed; everything is up to date{failed}."


def _left(what: Sequence[str]) -> str:
    return (
        f"Failed {ATTEMPTS} times and left alone: {_some(what)}. Remedy: read the failed run; mend the file or the "
        "settings, and it is tried again; or reset this sensor's cursor."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
