"""A worker's side: open the project from its settings, then compute, check and write one shard after the other.

Here: what processes and Ray have in common. Not here: how a worker is started and reached.
"""

import pickle
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assets.base.asset import Step
from assets.base.context import Context, RunState, Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.graph import Graph, build_graph
from assets.settings import open_context, settings_model
from core.errors import UserError
from resources.lake.files import Provenance, Stored


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


@dataclass(frozen=True)
class Done:
    """A shard that a worker has ended with.

    Attributes:
        shard: its name.
        outcome: the record of its file, or the error.
        seconds: time that the worker took.
        rows: rows that it reported as done.
        written_for_others: fingerprints of files that it wrote for other assets of the run.
        written: how many files it wrote for other assets, by key.
        damaged: files that it found damaged and set aside, with the reason.
    """

    shard: str
    outcome: Stored | Exception
    seconds: float = 0.0
    rows: int = 0
    written_for_others: frozenset[str] = frozenset()
    written: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)


class Worker:
    """Computes tasks; keeps the project, its models, and what the shards of a step share."""

    def __init__(self) -> None:
        self._opening: Opening | None = None
        self._graph: Graph | None = None
        self._context: Context | None = None
        self._step: tuple[str, Snapshot] | None = None

    def compute(self, task: Task) -> Done:
        """Compute a shard; an error is returned, not raised."""
        began = time.perf_counter()
        rows: list[int] = []
        try:
            asset, snapshot = self._open(task)
            state = RunState(progress=lambda _asset, _shard, count: rows.append(count))
            damaged = snapshot.context.lake.damaged
            damaged.clear()
            step = Step(asset, snapshot, {task.shard: task.provenance}, state, task.requested)
            found = dict(asset.computed(step, [task.shard]))
            outcome = found.get(task.shard) or RuntimeError(f"{task.asset} did not yield shard {task.shard}")
            state.written.pop(asset.key, None)
        except Exception as error:  # noqa: BLE001 - fails the shard alone
            return Done(task.shard, _portable(error), time.perf_counter() - began)
        return Done(
            task.shard,
            _portable(outcome) if isinstance(outcome, Exception) else outcome,
            time.perf_counter() - began,
            sum(rows),
            frozenset(state.written_for_others),
            state.written,
            dict(damaged),
        )

    def _open(self, task: Task) -> tuple[PartitionedAsset, Snapshot]:
        if self._opening != task.opening:
            self._context = open_context(_settings(task.opening), task.opening.config)
            self._graph, self._opening, self._step = build_graph(self._context), task.opening, None
        assert self._graph is not None
        assert self._context is not None
        if self._step is None or self._step[0] != task.step:
            self._context.lake.refresh()
            self._step = (task.step, Snapshot(self._context))
        asset = next(node for node in self._graph.nodes if node.key == task.asset)
        assert isinstance(asset, PartitionedAsset)
        return asset, self._step[1]


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


def tasks(asset: PartitionedAsset, step: Step, shards: list[str], opening: Opening, name: str) -> list[Task]:
    """Return the tasks of a step's shards, in order."""
    return [Task(name, opening, asset.key, step.requested, step.wanted[shard]) for shard in shards]
