"""A crew of workers that take the shards of a step: one shard each at a time, so that nothing piles up.

A shard whose worker dies goes to another worker, `ATTEMPTS` times at most; then it fails alone. Here: what processes
and Ray have in common.
"""

import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

from assets.base.asset import Step
from assets.base.engines import Computed
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from dagster_project.engines.work import Done, Opening, Task, WorkerError, describe, tasks

ATTEMPTS = 3
"""How many workers may die with a shard before the shard fails."""


class Crew(ABC):
    """An engine of several workers.

    Args:
        workers: their number at most.
        decode: whether encoders keep their own decoding processes in a worker.
    """

    name: str

    def __init__(self, workers: int, *, decode: bool = False) -> None:
        self.workers, self.decode = workers, decode
        self._idle: list[Any] = []
        self._opening: tuple[Any, Opening] | None = None

    @abstractmethod
    def start(self, busy: Sequence[Any]) -> Any:
        """Start a worker beside those that are busy, and return it."""

    @abstractmethod
    def send(self, worker: Any, task: Task) -> None:
        """Send a task to a worker."""

    @abstractmethod
    def wait(self, busy: Sequence[Any]) -> list[tuple[Any, Done | None]]:
        """Wait until a worker has ended its task, and return those that have; None for one that died."""

    @abstractmethod
    def end(self, worker: Any) -> None:
        """End a worker at once. Files of the lake are complete or absent, so it may be in the middle of one."""

    def compute(self, asset: PartitionedAsset, step: Step, shards: Sequence[str]) -> Computed:
        """Hand shards to the workers; an asset that reads its input once for all shards is computed here."""
        template = asset.declared.template
        assert isinstance(template, PartitionedTemplate)
        if not template.spread:
            yield from asset.computed(step, shards)
            return
        if self._opening is None or self._opening[0] is not step.context.settings:
            self._opening = (step.context.settings, describe(step.context, decode=self.decode))
        yield from self._share_out(
            deque(tasks(asset, step, list(shards), self._opening[1], str(uuid.uuid4()))), step, asset
        )

    def _share_out(self, left: deque[Task], step: Step, asset: PartitionedAsset) -> Computed:
        busy: dict[Any, Task] = {}
        deaths: dict[str, int] = {}
        try:
            while left or busy:
                while left and len(busy) < self.workers:
                    worker = self._idle.pop() if self._idle else self.start(list(busy))
                    busy[worker] = left.popleft()
                    self.send(worker, busy[worker])
                for worker, done in self.wait(list(busy)):
                    task = busy.pop(worker)
                    if done is not None:
                        self._idle.append(worker)
                        yield task.shard, _noted(step, asset, done)
                        continue
                    self.end(worker)
                    deaths[task.shard] = deaths.get(task.shard, 0) + 1
                    if deaths[task.shard] < ATTEMPTS:
                        left.append(task)
                        continue
                    yield (
                        task.shard,
                        WorkerError(
                            f"{task.asset}, shard {task.shard}: {ATTEMPTS} workers died while they computed it. "
                            "Remedy: look for `killed` in the system's log; fewer workers need less memory"
                        ),
                    )
        finally:
            for worker in busy:
                self.end(worker)
            step.context.lake.refresh()  # workers wrote

    def close(self) -> None:
        """End all workers."""
        while self._idle:
            self.end(self._idle.pop())


def _noted(step: Step, asset: PartitionedAsset, done: Done) -> Any:
    """Take over into this run what a worker has counted; return the outcome."""
    if done.rows:
        step.progress(done.rows, done.shard)
    step.state.written_for_others.update(done.written_for_others)
    step.state.written.update(done.written)
    if not isinstance(done.outcome, Exception):
        step.state.written[asset.key] += 1
    step.context.lake.damaged.update(done.damaged)
    return done.outcome
