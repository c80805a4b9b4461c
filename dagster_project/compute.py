"""`clip-select compute`: some shards of one asset, without a Dagster instance, as a task of a Slurm array does.

Any number of such commands may write to one lake: a file is complete or absent, and two that compute the same shard
write the same file. Not here: engines, and the order of assets (`headless`).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from assets.base.asset import Step
from assets.base.context import Context, RunState, Snapshot
from assets.base.engines import Engine
from assets.base.partitioned import PartitionedAsset
from assets.base.results import NotReady
from assets.graph import build_graph
from core.errors import UserError
from core.names import suggestion
from dagster_project.interrupts import Interrupts
from dagster_project.staleness import record_groups
from resources.lake.files import Provenance


class ComputeError(UserError):
    """The asset or the part of its shards is wrong."""


@dataclass(frozen=True)
class Part:
    """The part `number` of `of`: every `of`-th of the sorted shards, from the one at `number`, which counts from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read a part such as 3/64.

        Raises:
            ComputeError: it is none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ComputeError(f"--part: {text!r} is not a part. Remedy: 1/64, 2/64, … or 64/64")
        return cls(int(found[1]), int(found[2]))

    def shards(self, names: Sequence[str]) -> list[str]:
        """Return the part's shards."""
        return sorted(names)[self.number - 1 :: self.of]


def compute(
    project: Context, key: str, part: Part, engine: Engine, console: Console, interrupts: Interrupts | None = None
) -> int:
    """Compute the part's shards that are missing or out of date, and print how many those were.

    Args:
        project: the opened project.
        key: key of an asset that has shards.
        part: which shards.
        engine: where they are computed.
        console: where to print.
        interrupts: signals that end it.

    Returns:
        The exit status: 1 if a shard failed or lacks an input, else 0.

    Raises:
        ComputeError: there is no such asset.
    """
    asset = _asset(project, key)
    snapshot = Snapshot(project)
    record_groups(snapshot)
    shards = part.shards(list(snapshot.listing))
    wanted: dict[str | None, Provenance] = {}
    errors: dict[str, Exception] = {}
    for shard in shards:
        try:
            provenance = asset.provenance(snapshot, shard)
            if asset.written(snapshot, provenance) is None:
                wanted[shard] = provenance
        except (NotReady, UserError) as error:
            errors[shard] = error
    state = RunState() if interrupts is None else RunState(written=interrupts.kept)
    step = Step(asset, snapshot, wanted, state, frozenset([key]))
    due = [shard for shard in wanted if shard is not None]
    computed = 0
    for shard, outcome in engine.compute(asset, step, due):
        if isinstance(outcome, Exception):
            errors[shard] = outcome
        else:
            computed += 1
    for shard in sorted(errors):
        print(f"{key}, shard {shard}: {errors[shard]}", file=sys.stderr)  # noqa: T201 - one line a shard, for logs
    fresh = len(shards) - len(due) - sum(shard not in wanted for shard in errors)
    text = f"{key}: {computed} shards computed, {fresh} were up to date, {len(errors)} failed or lack an input"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if errors else 0


def _asset(project: Context, key: str) -> PartitionedAsset:
    found = {node.key: node for node in build_graph(project).nodes if isinstance(node, PartitionedAsset)}
    if key not in found:
        raise ComputeError(f"--asset: no asset {key!r} that has shards; {suggestion(key, found)}")
    return found[key]
