"""Runs whose process died: how to recognise them, and how to end them.

A process that executes a run locks a file in the instance's folder. The operating system releases the lock when the
process ends, however it ends, so a file that can be locked belongs to a dead run. A run without such a file may be
executing on another machine and is left alone. Not here: runs that never started, and places in pools that Dagster
frees itself (`run_monitoring` in `dagster.yaml`).
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

FOLDER = "processes"


@contextmanager
def at_work(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Mark a run as executed by this process; the run must have ended before the block does."""
    lock = lock_run(instance, run_id)
    try:
        yield
    finally:
        _path(instance, run_id).unlink(missing_ok=True)
        os.close(lock)


def lock_run(instance: dg.DagsterInstance, run_id: str) -> int:
    """Mark a run as executed by this process, until the process ends; return the file descriptor of the lock."""
    path = _path(instance, run_id)
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    lock = os.open(new, os.O_CREAT | os.O_WRONLY, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(path)  # locked before it has its name, so that no other process finds it unlocked
    return lock


def close_dead_runs(instance: dg.DagsterInstance) -> None:
    """Fail the runs whose process died, and free their places in Dagster's pools.

    Otherwise they would count as running for ever: sensors would wait for them, and so would every step that needs
    their place in a pool.
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
            close_run(instance, path.stem, "The process of this run died: it was killed, or its machine stopped.")
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def close_run(instance: dg.DagsterInstance, run_id: str, why: str) -> None:
    """Fail a run that has not ended, and free its places in Dagster's pools."""
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished:
        instance.report_run_failed(run, why)
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _path(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.root_directory) / FOLDER / f"{run_id}.lock"
