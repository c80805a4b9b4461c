"""A worker's side: open the project from its settings, then compute one shard or part after the other.

Here: what processes and Ray have in common. Not here: how a worker is started and reached.
"""

import pickle
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assets.base.asset import Step
from assets.base.context import Context, RunState, Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph, build_graph
from assets.settings import open_context, settings_model
from core.errors import UserError
from resources.lake.files import Provenance


class WorkerError(UserError):
    """A worker died, or its error can't be sent to the process that started it."""


@dataclass(frozen=True)
class Opening:
    """A project, as a worker opens it.

    Attributes:
        config: path of the YAML, for messages and relative paths.
        settings: the checked YAML, JSON values.
        decode: whether encoders keep their own decoding processes; else the worker decodes.
    """

    config: Path
    settings: dict[str, Any]
    decode: bool = False


@dataclass(frozen=True)
class Task:
    """One shard to be computed.

    Attributes:
        step: identifies the step; a worker keeps what its shards share.
        opening: the project.
        asset: key of the asset.
        requested: keys of all assets that the run was asked for.
        provenance: of the file to be written.
    """

    step: str
    opening: Opening
    asset: str
    requested: frozenset[str]
    provenance: Provenance

    @property
    def shard(self) -> str:
        """The shard's name."""
        assert self.provenance.shard is not None
        return self.provenance.shard

    @property
    def name(self) -> str:
        """The shard, for messages."""
        return f"shard {self.shard}"


@dataclass(frozen=True)
class Call:
    """A part of an unpartitioned asset to be computed.

    Attributes:
        step: identifies the step; a worker keeps what its parts share.
        opening: the project.
        asset: key of the asset.
        number: of the part, from 0.
        function: called with a snapshot and the arguments.
        arguments: the arguments.
    """

    step: str
    opening: Opening
    asset: str
    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The part's name, for messages."""
        return f"part {self.number + 1}"


Job = Task | Call


@dataclass(frozen=True)
class Done:
    """A shard or part that a worker has ended with.

    Attributes:
        outcome: the record of its file, the function's result, or the error.
        seconds: time that the worker took.
        rows: rows that it reported as done.
        written_for_others: fingerprints of files that it wrote for other assets of the run.
        written: how many files it wrote for other assets, by key.
        damaged: files that it found damaged and set aside, with the reason.
    """

    outcome: Any
    seconds: float = 0.0
    rows: int = 0
    written_for_others: frozenset[str] = frozenset()
    written: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)


class Worker:
    """Computes shards and parts; keeps the project, its models, and what those of a step share."""

    def __init__(self) -> None:
        self._opening: Opening | None = None
        self._graph: Graph | None = None
        self._context: Context | None = None
        self._step: tuple[str, Snapshot] | None = None

    def compute(self, job: Job) -> Done:
        """Compute a shard or a part; an error is returned, not raised."""
        began = time.perf_counter()
        damaged: dict[str, str] = {}
        try:
            snapshot = self._open(job)
            damaged = snapshot.context.lake.damaged
            damaged.clear()
            done = self._shard(job, snapshot) if isinstance(job, Task) else Done(job.function(snapshot, *job.arguments))
        except Exception as error:  # noqa: BLE001 - fails the shard alone
            done = Done(error)
        outcome = _portable(done.outcome) if isinstance(done.outcome, Exception) else done.outcome
        return replace(done, outcome=outcome, seconds=time.perf_counter() - began, damaged=dict(damaged))

    def _shard(self, task: Task, snapshot: Snapshot) -> Done:
        assert self._graph is not None
        asset = next(node for node in self._graph.nodes if node.key == task.asset)
        assert isinstance(asset, PartitionedAsset)
        rows: list[int] = []
        state = RunState(progress=lambda _asset, _shard, count: rows.append(count))
        step = Step(asset, snapshot, {task.shard: task.provenance}, state, task.requested)
        found = dict(asset.computed(step, [task.shard]))
        outcome = found.get(task.shard) or RuntimeError(f"{task.asset} did not yield shard {task.shard}")
        state.written.pop(asset.key, None)
        others = frozenset(state.written_for_others)
        return Done(outcome, rows=sum(rows), written_for_others=others, written=state.written)

    def _open(self, job: Job) -> Snapshot:
        if self._opening != job.opening:
            self._context = open_context(_settings(job.opening), job.opening.config)
            self._graph, self._opening, self._step = build_graph(self._context), job.opening, None
        assert self._context is not None
        if self._step is None or self._step[0] != job.step:
            self._context.lake.refresh()
            self._step = (job.step, Snapshot(self._context))
        return self._step[1]


def describe(context: Context, *, decode: bool = False) -> Opening:
    """Return a project as a worker opens it."""
    settings = context.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return Opening(context.config, settings, decode)


def _settings(opening: Opening) -> Any:
    settings = settings_model().model_validate(opening.settings, context={"base": opening.config.resolve().parent})
    if opening.decode:
        return settings
    encoders = {name: found.model_copy(update={"workers": 0}) for name, found in settings.encoders.items()}
    return settings.model_copy(update={"encoders": encoders})


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, with the worker's traceback as a note."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"In the worker:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any error of an exception's own pickling
        other = WorkerError(f"{type(error).__name__}: {error}")
        other.add_note(f"In the worker:\n{text}")
        return other
    return error
