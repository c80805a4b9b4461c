"""Shard groups: consecutive tars of a pool that are one shard, as the lake records them.

A group never changes once it is recorded. Records are files `<lake>/shard_groups/00000001.json`, each written once, by
one of the processes that list the pool at the same time.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from resources.pools.errors import PoolError
from resources.storage.by_location import open_store
from resources.storage.stores import Store

FOLDER = "shard_groups"
TAR_STRIDE = 1 << 40
"""Bytes between the beginnings of two tars of a group in `image_offset`: number of the tar x this + byte in the tar."""
MOST_IN_NAME = 100


class ShardGroups:
    """The groups that a lake records.

    Args:
        root: path or URL of the lake.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._read: dict[str, dict[str, list[str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_read": self._read}

    @cached_property
    def _store(self) -> Store:
        return open_store(self.root)

    @property
    def _folder(self) -> str:
        return f"{self.root.rstrip('/')}/{FOLDER}"

    def recorded(self) -> dict[str, list[str]]:
        """Return the names of the tars of each group, without `.tar`, in their order; a record is read once.

        Raises:
            PoolError: a record is damaged.
        """
        for entry in self._store.files(self._folder):
            if entry.name.endswith(".json") and not entry.name.startswith(".") and entry.location not in self._read:
                try:
                    found = json.loads(self._store.read(entry.location))["groups"]
                    self._read[entry.location] = {str(shard): [str(tar) for tar in found[shard]] for shard in found}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise PoolError(
                        f"{entry.location}: damaged: it records which tars are one shard ({error}). Remedy: put it "
                        "back from a backup"
                    ) from error
        return {shard: tars for location in sorted(self._read) for shard, tars in self._read[location].items()}

    def tars(self, shard: str) -> list[str] | None:
        """Return the tars of a group; None where the shard is no recorded group."""
        for known in self._read.values():
            if shard in known:
                return known[shard]
        return self.recorded().get(shard)

    def single(self) -> set[str]:
        """Return the shards that the lake knows from before: each is one tar, and stays so."""
        names = (entry.name for entry in self._store.files(f"{self.root.rstrip('/')}/raw_pool"))
        return {PurePosixPath(name).stem for name in names if not name.startswith(".")}

    def record(self, groups: Mapping[str, Sequence[str]]) -> bool:
        """Record new groups, and return whether it was done: another process may have recorded others meanwhile."""
        number = len(self._read) + 1
        content = json.dumps({"groups": {shard: list(tars) for shard, tars in groups.items()}}, indent=0)
        return self._store.put_if_absent(f"{self._folder}/{number:08d}.json", content.encode())


def grouped(names: Sequence[str], number: int, single: set[str]) -> dict[str, list[str]]:
    """Return consecutive names in groups of `number`, the last one of those that are left; each in `single` is alone.

    Args:
        names: of tars, sorted.
        number: of tars in a group.
        single: names that stay alone.
    """
    found = {name: [name] for name in names if name in single}
    left = [name for name in names if name not in single]
    for start in range(0, len(left), number):
        some = left[start : start + number]
        found[group_name(some)] = some
    return found


def group_name(tars: Sequence[str]) -> str:
    """Return the name of a group: `first-last`, or that of its only tar."""
    if len(tars) == 1:
        return tars[0]
    first, last = tars[0], tars[-1]
    return f"{first[:MOST_IN_NAME]}-{last[-MOST_IN_NAME:]}"
