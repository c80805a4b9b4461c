"""The whole path without a browser: discover shards, then compute missing and stale files, in order.

Each asset gets a Dagster run of its own over only the shards that need it. So the UI shows the history, a bad shard
stops no other shard, and nothing is computed twice. The embeddings by several encoders share a run, because they share
the images. Only the lake's provenance decides about staleness.

A subset is selected when every shard has been computed or has failed on its own: an interrupted pass ends at once, and
nothing is computed from an asset whose run ended before it came to all its shards.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import dagster as dg

from assets.base.context import Context, Progress, RunState, Snapshot
from assets.base.engines import Engine, InProcess
from assets.base.events import record_files
from assets.base.keys import SHARDS_NAME, asset_key
from assets.base.partitioned import FAILED_SHARDS, PartitionedAsset
from assets.base.results import NotReady
from assets.graph import Graph, Node
from assets.subsets.catalog import catalog_is_newest
from assets.subsets.subset import SubsetAsset
from core.errors import UserError
from dagster_project.definitions import build_defs
from dagster_project.executor import execute
from dagster_project.interrupts import Interrupts
from dagster_project.outcome import Outcome, joined
from dagster_project.sqlite_event_log import kept_open
from dagster_project.staleness import clear, diff_partitions, neighbours, run_tags
from resources.lake.versions import Versions

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
INTERRUPTED = "DagsterExecutionInterruptedError"
TERMINAL = {"clip_selection/by": "clip-select"}


def _error_names(base: type[Exception]) -> set[str]:
    return {base.__name__}.union(*map(_error_names, base.__subclasses__()))


_OWN_ERRORS = {*_error_names(UserError), ValueError.__name__}
"""Errors whose message has all that a person needs."""


ROUNDS = 3
"""How often a pass goes over the assets at most: damage that a step finds in its inputs needs another round."""

State = Literal["up to date", "begins", "computed", "failed", "not attempted"]


@dataclass(frozen=True)
class Stage:
    """An asset that a pass has come to.

    Attributes:
        asset: its key.
        number: its place among the assets of the pass, from 1.
        of: how many those are.
        shards: number of its shards that are due; 0 for an unpartitioned asset.
        rows: rows that computing it reports as done; None where this is not known.
        state: "up to date" until it begins.
        failed: number of its shards that failed.
        needs: key of the failed asset because of which it was not attempted.
        began: when it began, as `time.monotonic` counts.
    """

    asset: str
    number: int = 1
    of: int = 1
    shards: int = 0
    rows: int | None = None
    state: State = "up to date"
    failed: int = 0
    needs: str = ""
    began: float = field(default_factory=time.monotonic, compare=False)


Notice = Callable[[Stage], None]
"""Called when an asset begins, again when its rows become known, and when it has ended; not for one up to date."""


def materialize(
    context: Context,
    graph: Graph,
    instance: dg.DagsterInstance,
    *,
    notice: Notice,
    progress: Progress | None = None,
    redraw: bool = False,
    only: Collection[str] | None = None,
    interrupts: Interrupts | None = None,
    engine: Engine | None = None,
) -> Outcome:
    """Bring assets up to date, and the catalog.

    Damaged files are set aside when they are found, and computed again.

    Args:
        context: the project.
        graph: its assets.
        instance: where runs are recorded.
        notice: called at each stage.
        progress: called when rows are done.
        redraw: draw the negatives again.
        only: keys of the assets, with everything that they are computed from; by default all.
        interrupts: signals that end the pass.
        engine: where shards are computed; by default in this process.

    Raises:
        KeyboardInterrupt: the pass was interrupted.
    """
    outcome = Outcome()
    for _ in range(ROUNDS):
        before = set(context.lake.damaged)
        found = Pass(context, graph, instance, notice, progress, redraw, interrupts, engine).run(only)
        outcome = joined(outcome, found, context.lake.damaged)
        if outcome.damaged.keys() <= before:
            break
        redraw = False
    return outcome


class Pass:
    """One pass over the graph."""

    def __init__(
        self,
        context: Context,
        graph: Graph,
        instance: dg.DagsterInstance,
        notice: Notice,
        progress: Progress | None,
        redraw: bool,
        interrupts: Interrupts | None,
        engine: Engine | None = None,
    ) -> None:
        self.graph = graph
        self.nodes = {node.key: node for node in (*graph.in_order, *graph.exports, *graph.evaluations)}
        self.instance = instance
        self.notice = notice
        self.redraw = redraw
        self.outcome = Outcome()
        self.snapshot = Snapshot(context)
        self.interrupts = interrupts
        self.stage = Stage("")
        self.only: Collection[str] | None = None
        state = RunState(expect=self._expect) if progress is None else RunState(progress, self._expect)
        if interrupts is not None:
            state = replace(state, written=interrupts.kept)
        # The opened objects, so that a model is loaded once for all runs of this process.
        opened: dict[str, Any] = {"lake": context.lake, "pool": context.pool, "models": context.models, "run": state}
        opened["engine"] = engine or InProcess()
        defs = build_defs(context, graph, resource_overrides=opened)
        self.job = defs.resolve_implicit_global_asset_job_def()

    def run(self, only: Collection[str] | None = None) -> Outcome:
        """Compute what is due, in order; `only` restricts it to some keys."""
        self.only = only
        self.snapshot.context.lake.refresh()
        for subset in self.graph.subsets:
            Versions(self.snapshot.context.lake, subset.recipe).set_damaged_aside()
        shards = self._discover()
        with kept_open(self.instance):
            record_files(self.instance, self._partitioned(), self.snapshot.context.lake, shards)
        nodes = [node for node in self.graph.in_order if only is None or node.key in only]
        for number, node in enumerate(nodes, start=1):
            self.stage = Stage(node.key, number, len(nodes) + 1)
            if (needed := self._needs_failed(node)) is not None:
                self.outcome.not_attempted[node.key] = needed
            else:
                try:
                    self._compute(node, shards)
                except UserError as error:
                    self.outcome.failures[node.key] = str(error)
            self._end()
        if self.outcome.computed or not catalog_is_newest(self.snapshot.context):
            self.stage = Stage("catalog", len(nodes) + 1, len(nodes) + 1)
            self._begin()
            self._launch("catalog", None)
            self._end()
        return self.outcome

    def _partitioned(self) -> list[PartitionedAsset]:
        return [node for node in self.graph.nodes if isinstance(node, PartitionedAsset)]

    def _compute(self, node: Node | SubsetAsset, shards: Sequence[str]) -> None:
        """Launch the runs that bring an asset up to date."""
        if isinstance(node, PartitionedAsset):
            self._compute_shards(node, shards)
        elif isinstance(node, SubsetAsset):
            self._select(node)
        else:
            again = self.redraw and node.key.startswith("negatives/")
            if again or not node.is_fresh(self._now()):
                self._begin()
                config = {"ops": {node.definition.op.name: {"config": {"redraw": again}}}}
                self._launch(node.key, None, config)

    def _select(self, subset: SubsetAsset) -> None:
        """Select a subset that is out of date; of one that is up to date, write a missing report and run due checks."""
        now = self._now()
        is_fresh = subset.is_fresh(now)
        if is_fresh and subset.has_report(now.context.lake) and not subset.has_due_checks(now):
            return
        self._begin()
        self._launch(subset.key, None)
        if is_fresh:
            self.outcome.computed.pop(subset.key)

    def _compute_shards(self, node: PartitionedAsset, among: Sequence[str]) -> None:
        if due := self._due(node, among):
            self._begin(len(due), node.rows_due(self.snapshot, due))
        for some in neighbours(among, set(due)):
            self._launch(node.key, some, others=self._together(node, some))

    # What the stages report

    def _begin(self, shards: int = 0, rows: int | None = None) -> None:
        self.stage = replace(self.stage, state="begins", shards=shards, rows=rows)
        self.notice(self.stage)

    def _expect(self, asset: str, rows: int) -> None:
        if asset == self.stage.asset:
            self._begin(rows=rows)

    def _end(self) -> None:
        """Report how the asset ended."""
        key, stage = self.stage.asset, self.stage
        if key in self.outcome.not_attempted:
            self.notice(replace(stage, state="not attempted", needs=self.outcome.not_attempted[key]))
        elif key in self.outcome.failures or stage.state == "begins":
            self.outcome.seconds[key] = time.monotonic() - stage.began
            failed = len(self.outcome.failed_shards.get(key, ()))
            state: State = "failed" if key in self.outcome.failures else "computed"
            self.notice(replace(stage, state=state, failed=failed))

    def _needs_failed(self, node: Node | SubsetAsset) -> str | None:
        """Return the failed asset without which a node can't be computed, and why; None if it can be tried."""
        outcome = self.outcome
        for dep in node.deps:
            if dep in outcome.not_attempted:
                return outcome.not_attempted[dep]
            if dep in outcome.unfinished:
                return f"{dep} ({outcome.unfinished[dep]} of its shards were not attempted)"
            if dep in outcome.failures and not self._is_usable(self.nodes[dep]):
                return f"{dep} (its earlier results are out of date)" if self._has_results(self.nodes[dep]) else dep
        return None

    def _is_usable(self, node: Node | SubsetAsset) -> bool:
        """Check whether the results of a failed asset are up to date: of any shard, if it has shards."""
        snapshot = self._now()
        try:
            if isinstance(node, PartitionedAsset):
                return any(_is_fresh(node, snapshot, shard) for shard in snapshot.listing)
            return node.is_fresh(snapshot)
        except UserError:  # an input can't be read; this is the asset's failure, and reported
            return False

    def _has_results(self, node: Node | SubsetAsset) -> bool:
        lake = self.snapshot.context.lake
        if isinstance(node, SubsetAsset):
            return Versions(lake, node.recipe).newest() is not None
        return bool(lake.shards(node.key)) if node.partitioned else lake.exists(lake.path(node.key))

    def _now(self) -> Snapshot:
        """Return a snapshot that sees what this pass has written."""
        self.snapshot = self.snapshot.after_writes()
        return self.snapshot

    def _discover(self) -> list[str]:
        """Make Dagster's partitions agree with the pool's folder, and remove the files of removed shards."""
        change = diff_partitions(self.snapshot, self.graph, self.instance)
        clear(self.snapshot.context.lake, self.graph, change.gone)
        for shard in change.gone:
            self.instance.delete_dynamic_partition(SHARDS_NAME, shard)
        if change.added:
            self.instance.add_dynamic_partitions(SHARDS_NAME, change.added)
        self.outcome.added, self.outcome.removed = change.added, change.gone
        return list(self.instance.get_dynamic_partitions(SHARDS_NAME))

    def _due(self, node: PartitionedAsset, among: Sequence[str]) -> list[str]:
        tried = self.outcome.computed.get(node.key, [])
        snapshot = self._now()
        return [shard for shard in among if shard not in tried and node.is_due(snapshot, shard)]

    def _together(self, node: PartitionedAsset, among: Sequence[str]) -> dict[str, list[str]]:
        """Return the other assets of a node's run, with their shards: embeddings go with embeddings."""
        found = {}
        for other in self.graph.nodes:
            both = node.key.startswith("embeddings/") and other.key.startswith("embeddings/")
            wanted = both and (self.only is None or other.key in self.only)
            if isinstance(other, PartitionedAsset) and other is not node and wanted:
                with contextlib.suppress(UserError):  # reported at its own turn
                    found[other.key] = self._due(other, among)
        return {key: some for key, some in found.items() if some}

    def _launch(
        self,
        key: str,
        shards: list[str] | None,
        config: Mapping[str, Any] | None = None,
        others: Mapping[str, list[str]] | None = None,
    ) -> None:
        others = others or {}
        self._check_interrupts()
        result = execute(
            self.job,
            self.instance,
            location=self.snapshot.context.settings.name,
            asset_selection=[asset_key(key), *map(asset_key, others)],
            run_config={**QUIET, **(config or {})},
            tags={**TERMINAL, **run_tags(shards or [])},
        )
        self._check_interrupts()
        if _was_interrupted(result):
            raise KeyboardInterrupt
        outcome = self.outcome
        for name, some in {key: shards or [], **others}.items():
            outcome.computed[name] = outcome.computed.get(name, []) + some
        if not result.success:
            self._record_failures(result, {key: shards or [], **others})

    def _record_failures(self, result: dg.JobExecutionResult, launched: Mapping[str, list[str]]) -> None:
        """Record why the assets of a run failed, and how many of their shards were neither computed nor failed."""
        outcome = self.outcome
        found = _failures(result, list(launched))
        for name, (failure, failed) in found.items():
            outcome.failures[name] = "\n".join(filter(None, [outcome.failures.get(name), failure]))
            if failed:
                outcome.failed_shards[name] = outcome.failed_shards.get(name, []) + failed
        snapshot = self._now()
        for name, some in launched.items():
            node, (_, failed) = self.nodes.get(name), found.get(name, ("", []))
            if not isinstance(node, PartitionedAsset):
                continue
            left = [shard for shard in some if shard not in failed and not _is_fresh(node, snapshot, shard)]
            if left:
                outcome.unfinished[name] = outcome.unfinished.get(name, 0) + len(left)

    def _check_interrupts(self) -> None:
        """Check that no signal has arrived; Dagster ends an interrupted run as a failed one and raises nothing."""
        if self.interrupts is not None:
            self.interrupts.check()


def _is_fresh(node: PartitionedAsset, snapshot: Snapshot, shard: str) -> bool:
    """Check whether a shard's file is up to date; False also when inputs are missing."""
    try:
        return node.is_fresh(snapshot, shard)
    except NotReady:
        return False


def _was_interrupted(result: dg.JobExecutionResult) -> bool:
    """Check whether Ctrl-C ended a run without `Interrupts`: Dagster records that as a step's failure and goes on."""
    errors = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    return any(error is not None and error.cls_name == INTERRUPTED for error in errors)


def _failures(result: dg.JobExecutionResult, keys: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Return why a run failed, and the shards that did, for each of its assets that failed."""
    by_step = {key.replace("/", "__"): key for key in keys}
    found: dict[str, tuple[str, list[str]]] = {}
    for event in result.all_events:
        if event.is_step_failure and event.step_key in by_step:
            found.setdefault(by_step[event.step_key], _failure(event.step_failure_data))
    return found or {keys[0]: ("the run failed before its first step; see its page in the UI", [])}


def _failure(data: Any) -> tuple[str, list[str]]:
    """Return why a step failed, the description of its `dg.Failure` or else the error, and its shards that failed."""
    given = data.user_failure_data
    if given is not None and given.description:
        shards = given.metadata.get(FAILED_SHARDS)
        return given.description, list(shards.value) if shards is not None else []
    # Dagster wraps what an asset raises once; what lies deeper is detail, and is on the run's page.
    error = data.error.cause or data.error if data.error else None
    if error is None:
        return "failed", []
    message = error.message.strip()
    return message.split(": ", 1)[-1] if error.cls_name in _OWN_ERRORS else message, []
