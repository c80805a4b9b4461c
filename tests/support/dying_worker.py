"""Workers that die: with a shard's first task, or with every task of one shard."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from assets.base.context import Snapshot
from dagster_project.engines.processes import Processes
from resources.lake.files import LakeError


class Mortal(Processes):
    """Processes whose worker is killed when it is sent a task.

    Args:
        workers: their number.
        kills: how often, by shard or by the number of a part, a worker is killed with its task.

    Attributes:
        killed: how often it was done.
        parts: number of jobs sent, by asset.
    """

    def __init__(self, workers: int, kills: dict[str, int]) -> None:
        super().__init__(workers)
        self.kills, self.killed = dict(kills), 0
        self.parts: Counter[str] = Counter()

    def send(self, worker, job):
        """Send a job, and kill the worker if its shard is one of those."""
        super().send(worker, job)
        self.parts[job.asset] += 1
        name = job.name.partition(" ")[2]
        if self.kills.get(name, 0) > 0:
            self.kills[name] -= 1
            self.killed += 1
            os.kill(worker.popen.pid, signal.SIGKILL)


def running_workers() -> list[int]:
    """List the worker processes that this process has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if b"dagster_project.engines.processes" in command and parent == os.getpid():
            found.append(int(path.name))
    return found


def odd_part(snapshot: Snapshot, number: int) -> int:
    """Return a number, or fail for an odd one from 3 on."""
    if number >= 3 and number % 2:
        raise LakeError(f"{snapshot.context.lake.root}: part {number} is odd")
    return number


def echoed(snapshot: Snapshot, number: int) -> Any:
    """Return a number; in place of 7, what can't be sent."""
    del snapshot
    return (lambda: None) if number == 7 else number
