"""Inputs that are subsets, or shards complete up to a set of scores: whether they are there, and up to date.

These are the questions that assets ask beyond the recorded `deps` (`assets.base.asset`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from assets.base.context import Snapshot
from assets.base.results import NotReady
from core.errors import UserError
from resources.lake.versions import Version, Versions


def newest_version(snapshot: Snapshot, subset: Any) -> Version:
    """Return the newest version of a `SubsetAsset`.

    Raises:
        NotReady: there is none, or it is out of date.
    """

    def read() -> Version:
        current = Versions(snapshot.context.lake, subset.recipe).current()
        if current is None or not subset.is_fresh(snapshot):
            raise NotReady(f"{subset.key} is not there yet, or out of date. Remedy: materialize it first")
        return current

    return snapshot.memoized(f"{subset.key} newest", read)


def shard_inputs(snapshot: Snapshot, shard: str, scores: Collection[str], assets: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of a shard's files, by asset: `raw_pool` and the given scores.

    Args:
        snapshot: the project's inputs.
        shard: the shard.
        scores: keys of score assets.
        assets: all assets of the project, by key.

    Raises:
        NotReady: one of them, or the embeddings that it is computed from, is missing or out of date.
    """
    lake = snapshot.context.lake
    pool = lake.stored("raw_pool", shard)
    if pool is None:
        raise NotReady("raw_pool is not there yet. Remedy: materialize it first")
    if not assets["raw_pool"].is_fresh(snapshot, shard):
        raise NotReady("raw_pool is out of date: the shard changed. Remedy: materialize it")
    fingerprints = {"raw_pool": pool.fingerprint}
    for key in scores:
        stored = lake.stored(key, shard)
        if stored is None:
            raise NotReady(f"{key} is not there yet. Remedy: materialize it first")
        embeddings = [dep for dep in assets[key].deps if dep.startswith("embeddings/")]
        for upstream in (*embeddings, key):
            if not assets[upstream].is_fresh(snapshot, shard):
                raise NotReady(f"{upstream} is out of date. Remedy: materialize it")
        fingerprints[key] = stored.fingerprint
    return fingerprints


@dataclass(frozen=True)
class ShardState:
    """How far a shard is.

    Attributes:
        shard: its name.
        rows: its rows in `raw_pool`; None if it is not there yet.
        complete: keys of the assets that are up to date.
        due: keys of those that a run would compute now.
        waiting: keys of those whose inputs are missing, out of date or not readable.
    """

    shard: str
    rows: int | None
    complete: tuple[str, ...]
    due: tuple[str, ...]
    waiting: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether everything is up to date."""
        return not self.due and not self.waiting


def shard_states(snapshot: Snapshot, assets: Mapping[str, Any]) -> list[ShardState]:
    """Return the state of each shard of the pool: those that are not complete first, then by name.

    Args:
        snapshot: the project's inputs.
        assets: assets by key; only those partitioned by shard count.
    """

    def state(node: Any, shard: str) -> str:
        try:
            return "complete" if node.is_fresh(snapshot, shard) else "due"
        except (NotReady, UserError):
            return "waiting"

    found = []
    nodes = {key: node for key, node in assets.items() if node.partitioned}
    for shard in sorted(snapshot.listing):
        keys: dict[str, list[str]] = {"complete": [], "due": [], "waiting": []}
        for key, node in nodes.items():
            keys[state(node, shard)].append(key)
        stored = snapshot.context.lake.stored("raw_pool", shard)
        rows = None if stored is None else stored.rows
        found.append(ShardState(shard, rows, *(tuple(some) for some in keys.values())))
    return sorted(found, key=lambda each: each.is_complete)


def embedded_shards(snapshot: Snapshot, key: str) -> dict[str, str]:
    """Return the fingerprints of the pool's shards that have a file of `key`, such as embeddings, by shard."""
    lake = snapshot.context.lake
    found = {shard: lake.stored(key, shard) for shard in sorted(snapshot.listing)}
    return {shard: stored.fingerprint for shard, stored in found.items() if stored is not None}
