"""Engines: where the shards of a step are computed. The deployment chooses one, the project's YAML does not.

Here: the interface, and the engine that computes in this process. Not here: worker processes and clusters
(`dagster_project.engines`).
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from assets.base.asset import Step
from resources.lake.files import Stored

Computed = Generator[tuple[str, Stored | Exception], None, None]
"""Shards in the order in which they end, each with the record of its file or its error."""


class Engine(Protocol):
    """Computes shards and writes their files to the lake.

    Attributes:
        name: as a deployment chooses it.
        workers: how many shards it computes at once, at most.
    """

    name: str
    workers: int

    def compute(self, asset: Any, step: Step, shards: Sequence[str]) -> Computed:
        """Compute a `PartitionedAsset`'s shards, and yield each when its file is written or it has failed."""
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...


def measured_with(engine: Engine) -> dict[str, Any]:
    """Return the metadata of an event that holds the engine which its time was measured with."""
    return {"engine": engine.name, "workers": engine.workers}


class InProcess:
    """Computes one shard after the other in this process."""

    name = "in_process"
    workers = 1

    def compute(self, asset: Any, step: Step, shards: Sequence[str]) -> Computed:
        """Compute and write shards in order."""
        yield from asset.computed(step, shards)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
