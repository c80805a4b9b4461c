"""How a run's steps are executed: all in one process, whether the UI or a terminal started the run.

Dagster exports neither a base class for executors nor a way to execute a run that belongs to a code location; the
private names here are pinned by `tests/dagster_project/test_executor.py`.
"""

import signal
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.events import DagsterEvent
from dagster._core.execution.api import execute_run
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from dagster_project.dead_runs import at_work, close_run, lock_run
from dagster_project.sqlite_event_log import kept_open

REPOSITORY = "__repository__"
"""The name that Dagster gives to a code location's only repository."""

_executing: set[str] = set()
"""Runs that `execute` has marked as this process's."""


Require = Callable[[Collection[str]], None]
"""Checks what assets need, by their keys, before a run's first step; raises an error that fails the run."""


def _not_interrupting_helpers(events: Iterator[DagsterEvent]) -> Iterator[DagsterEvent]:
    """Yield a run's events, with SIGINT blocked until Dagster has started the processes that copy its output.

    They inherit this. Otherwise Ctrl-C, which reaches all processes of a terminal, makes each print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for event in events:
            if event.event_type is dg.DagsterEventType.LOGS_CAPTURED:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield event
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _OneProcess(InProcessExecutor):
    def __init__(self, require: Require) -> None:
        super().__init__(RetryMode.ENABLED)
        self._require = require

    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        if plan_context.run_id not in _executing:
            lock_run(plan_context.instance, plan_context.run_id)  # until the process ends: the run's end comes later
            selected = plan_context.job.get_definition().asset_layer.selected_asset_keys
            self._require({"/".join(key.path) for key in selected})
        with kept_open(plan_context.instance):
            yield from _not_interrupting_helpers(super().execute(plan_context, execution_plan))


def one_process_after(require: Require) -> dg.ExecutorDefinition:
    """Return the executor that runs all steps in one process, so that torch is imported and a model loaded once.

    Args:
        require: called with the keys of a run's assets before its first step. Not called for the runs of `execute`,
            whose caller has checked everything.
    """

    @dg.executor(name="one_process")
    def executor(context: dg.InitExecutorContext) -> InProcessExecutor:
        del context
        return _OneProcess(require)

    return executor


one_process = one_process_after(lambda _: None)
"""The executor without a check."""


def execute(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    *,
    location: str,
    asset_selection: Sequence[dg.AssetKey],
    run_config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> dg.JobExecutionResult:
    """Execute a job in this process, as a run of a code location.

    `JobDefinition.execute_in_process` records no code location, and the UI's timeline shows only runs that have one.

    Args:
        job: of the code location; its executor is used.
        instance: where the run is recorded.
        location: name of the code location, which is the project's name.
        asset_selection: assets to materialize.
        run_config: of the run.
        tags: of the run.

    Returns:
        The result; an asset that fails makes it unsuccessful and raises nothing. So does a signal during a step: ask
        `Interrupts.check` afterwards.
    """
    subset = job.get_subset(asset_selection=frozenset(asset_selection))
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), REPOSITORY)
    run_id = str(uuid.uuid4())
    with at_work(instance, run_id), kept_open(instance):
        _executing.add(run_id)
        try:
            run = instance.create_run_for_job(
                subset,
                run_id=run_id,
                run_config=run_config,
                tags={**job.run_tags, **(tags or {})},
                asset_selection=frozenset(asset_selection),
                remote_job_origin=RemoteJobOrigin(repository, job.name),
            )
            return execute_run(InMemoryJob(job), run, instance)
        except BaseException:  # a signal before Dagster's own handling of them begins, or after it ends
            close_run(instance, run_id, "The run was interrupted.")
            raise
        finally:
            _executing.discard(run_id)
