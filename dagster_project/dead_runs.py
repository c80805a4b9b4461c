"""Runs whose process is gone: how they are told from those at work, and how they are ended.

A process that makes a run locks a file in the instance's folder. The operating system gives the lock back when the
process ends, in whatever way, so a file that can be locked belongs to a run that is over. A run without such a
file is somebody else's, on another machine perhaps, and is left alone. Not here: runs that were never begun, and
places in pools that Dagster gives back itself (`run_monitoring` in `dagster.yaml`).
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.events import DagsterEvent  # Dagster exports neither these three nor another base for executors
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor

from dagster_project.sqlite_event_log import kept_open

FOLDER = "processes"


@contextmanager
def at_work(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Mark a run as this process's; the run's end must be recorded within the block."""
    lock = _lock(instance, run_id)
    try:
        yield
    finally:
        _path(instance, run_id).unlink(missing_ok=True)
        os.close(lock)


def close_dead_runs(instance: dg.DagsterInstance) -> None:
    """End the runs whose process is gone, and give back what they hold of Dagster's pools.

    Otherwise they would count as under way for ever: sensors would wait for them, and so would every step that
    needs their place in a pool.
    """
    for path in sorted(_path(instance, "").parent.glob("*.lock")):
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its run has just ended
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _close(instance, path.stem)
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def _close(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished:
        instance.report_run_failed(run, "The process of this run is gone: it was killed, or its machine stopped.")
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


class _OneProcess(InProcessExecutor):
    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        _lock(plan_context.instance, plan_context.run_id)  # until the process ends: the run's end is recorded later
        with kept_open(plan_context.instance):
            yield from super().execute(plan_context, execution_plan)


@dg.executor(name="one_process")
def one_process(context: dg.InitExecutorContext) -> InProcessExecutor:
    """Make all steps of a run in one process, so that torch is imported and a model loaded once."""
    del context
    return _OneProcess(RetryMode.ENABLED)


def _lock(instance: dg.DagsterInstance, run_id: str) -> int:
    """Make a run's file, which has its name only when it is locked; give its descriptor."""
    path = _path(instance, run_id)
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    lock = os.open(new, os.O_CREAT | os.O_WRONLY, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(path)
    return lock


def _path(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.root_directory) / FOLDER / f"{run_id}.lock"
