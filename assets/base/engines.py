"""Engines: where the shards of a step are computed. The deployment chooses one, the project's YAML does not.

Here: the interface, and the engine that computes in this process. Not here: worker processes and clusters
(`dagster_project.engines`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from resources.lake.files import Stored

T = TypeVar("T")

Computed = Generator[tuple[str, Stored | Exception], None, None]
"""Shards in the order in which they end, each with the record of its file or its error."""


Spread = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""Computes parts: `Step.map`, or `map_here` of a snapshot."""


def map_here(snapshot: Any, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield `function(snapshot, *some)` for `some` in `arguments`, computed one after the other in this process."""
    for some in arguments:
        yield function(snapshot, *some)


class Engine(Protocol):
    """Computes shards and writes their files to the lake, and computes the parts of unpartitioned assets.

    Attributes:
        name: as a deployment chooses it.
        workers: how many shards or parts it computes at once, at most.
    """

    name: str
    workers: int

    def compute(self, asset: Any, step: Any, shards: Sequence[str]) -> Computed:
        """Compute a `PartitionedAsset`'s shards of a `Step`, and yield each when its file is written or it failed."""
        ...

    def has_files(self, context: Any) -> bool:
        """Check whether workers see the work folders of the lake: they are on this machine, or share its disks."""
        ...

    def map(self, step: Any, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `function(snapshot, *some)` for `some` in `arguments`, in their order.

        Workers compute them side by side, so a function must be importable, and it, its arguments and its result must
        be picklable; arrays as numpy's. What `snapshot.memoized` keeps stays with a worker until the step ends.

        Args:
            step: the step whose snapshot the function gets.
            function: computes a part.
            arguments: of each part. They are asked for when a worker is free.

        Raises:
            Exception: the first error of the function, in the order of the arguments.
        """
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...


def measured_with(engine: Engine) -> dict[str, Any]:
    """Return the metadata of an event that holds the engine which its time was measured with."""
    return {"engine": engine.name, "workers": engine.workers}


class InProcess:
    """Computes one shard or part after the other in this process."""

    name = "in_process"
    workers = 1

    def compute(self, asset: Any, step: Any, shards: Sequence[str]) -> Computed:
        """Compute and write shards in order."""
        yield from asset.computed(step, shards)

    def has_files(self, context: Any) -> bool:
        """Return True."""
        del context
        return True

    def map(self, step: Any, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Compute parts in order."""
        return map_here(step.snapshot, function, arguments)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
