"""A crew of workers that take the shards or parts of a step: one each at a time, so that nothing piles up.

A shard whose worker dies goes to another worker, `ATTEMPTS` times at most; then it fails alone. Here: what processes
and Ray have in common.
"""

import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from assets.base.asset import Step
from assets.base.context import Context, Snapshot
from assets.base.engines import Computed
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from assets.scores import KINDS
from dagster_project.engines.work import Call, Done, Job, Opening, Task, WorkerError, describe

ATTEMPTS = 3
"""How many workers may die with a shard before the shard fails."""

T = TypeVar("T")


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
        self._busy: dict[Any, Job] = {}
        self._opening: tuple[Any, Opening] | None = None
        self._step: tuple[Snapshot, str] | None = None

    def open(self) -> None:  # noqa: B027 - not every engine has something to open
        """Open what the workers need, before the first one starts."""

    @abstractmethod
    def start(self, busy: Sequence[Any]) -> Any:
        """Start a worker beside those that are busy, and return it."""

    @abstractmethod
    def send(self, worker: Any, job: Job) -> None:
        """Send a shard or a part to a worker."""

    @abstractmethod
    def wait(self, busy: Sequence[Any]) -> list[tuple[Any, Done | None]]:
        """Wait until a worker has ended its job, and return those that have; None for one that died."""

    @abstractmethod
    def end(self, worker: Any) -> None:
        """End a worker at once. Files of the lake are complete or absent, so it may be in the middle of one."""

    def has_files(self, context: Context) -> bool:
        """Check whether workers see the work folders of the lake: they are on this machine, or share its disks."""
        del context
        return True

    def compute(self, asset: PartitionedAsset, step: Step, shards: Sequence[str]) -> Computed:
        """Hand shards to the workers; an asset that reads its input once for all shards is computed here."""
        template = asset.declared.template
        assert isinstance(template, PartitionedTemplate)
        if not template.spread:
            yield from asset.computed(step, shards)
            return
        name, opening = self._described(step)
        tasks = (Task(name, opening, asset.key, step.requested, step.wanted[shard]) for shard in shards)
        for job, done in self._share_out(tasks, step):
            assert isinstance(job, Task)
            if done.rows:
                step.progress(done.rows, job.shard)
            step.state.written_for_others.update(done.written_for_others)
            step.state.written.update(done.written)
            if not isinstance(done.outcome, Exception):
                step.state.written[asset.key] += 1
            yield job.shard, done.outcome

    def map(self, step: Step, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Hand parts to the workers, and yield their results in order."""
        name, opening = self._described(step)
        calls = (Call(name, opening, step.asset.key, number, function, some) for number, some in enumerate(arguments))
        ended: dict[int, Any] = {}  # results that wait for an earlier one
        following = 0
        for job, done in self._share_out(calls, step, lambda: len(ended) < 2 * self.workers):
            assert isinstance(job, Call)
            ended[job.number] = done.outcome
            while following in ended:
                outcome = ended.pop(following)
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                following += 1

    def _described(self, step: Step) -> tuple[str, Opening]:
        """Return a name by which workers recognise the step, and the project as they open it.

        Raises:
            WorkerError: they can't open it.
        """
        settings = step.context.settings
        if settings.kinds != KINDS:
            own = ", ".join(kind.name for kind in settings.kinds if kind not in KINDS)
            raise WorkerError(
                f"Workers know the scores of the package alone, and not {own}. Remedy: add the kind to KINDS in "
                "assets/scores/__init__.py, or compute in process (--engine in_process)"
            )
        self.open()
        if self._opening is None or self._opening[0] is not settings:
            self._opening = (settings, describe(step.context, decode=self.decode))
        if self._step is None or self._step[0] is not step.snapshot:
            self._step = (step.snapshot, str(uuid.uuid4()))
        return self._step[1], self._opening[1]

    def _share_out(
        self, jobs: Iterator[Job], step: Step, has_room: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[Job, Done]]:
        """Yield jobs as they end; while there is no room for results, no further one begins."""
        again: deque[Job] = deque()
        deaths: dict[str, int] = {}
        busy, more = self._busy, True
        try:
            while True:
                while len(busy) < self.workers and (again or (more and has_room())):
                    job = again.popleft() if again else next(jobs, None)
                    if job is None:
                        more = False
                        break
                    worker = self._idle.pop() if self._idle else self.start(list(busy))
                    busy[worker] = job
                    self.send(worker, job)
                if not busy:
                    return
                for worker, done in self.wait(list(busy)):
                    job = busy.pop(worker)
                    if done is not None:
                        self._idle.append(worker)
                        step.context.lake.damaged.update(done.damaged)
                        yield job, done
                        continue
                    self.end(worker)
                    deaths[job.name] = deaths.get(job.name, 0) + 1
                    if deaths[job.name] < ATTEMPTS:
                        again.append(job)
                    else:
                        yield job, Done(_killed(job))
        finally:
            self._end_busy()
            step.context.lake.refresh()  # workers wrote

    def _end_busy(self) -> None:
        while self._busy:
            self.end(self._busy.popitem()[0])

    def close(self) -> None:
        """End all workers."""
        self._end_busy()
        while self._idle:
            self.end(self._idle.pop())


def _killed(job: Job) -> WorkerError:
    return WorkerError(
        f"{job.asset}, {job.name}: {ATTEMPTS} workers died while they computed it. "
        "Remedy: look for `killed` in the system's log; fewer workers need less memory"
    )
