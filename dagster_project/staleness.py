"""What is out of date, and what one run covers: for sensors and for the headless pass, which start the runs.

Everything follows from the pool's listing and the lake's provenance.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from assets.base.context import Snapshot
from assets.base.keys import SHARDS_NAME
from assets.base.partitioned import PartitionedAsset
from assets.base.results import NotReady
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import Graph, Node
from assets.subsets.subset import SubsetAsset
from core.errors import UserError
from core.hashing import digest
from resources.lake.check_records import remove_checks
from resources.lake.files import Lake
from selection.recipes.recipe import set_kind

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"

ATTEMPTS = 3
"""How often automation tries the same work before it leaves it to a person."""


@dataclass(frozen=True)
class PartitionChanges:
    """How Dagster's partitions differ from the pool's folder.

    Attributes:
        added: shards that have no partition yet, sorted.
        gone: shards that have a partition or files in the lake, and are not in the pool any more, sorted.
    """

    added: list[str]
    gone: list[str]


def diff_partitions(snapshot: Snapshot, graph: Graph, instance: dg.DagsterInstance) -> PartitionChanges:
    """Compare the pool's folder with Dagster's partitions and with the lake; only listings are read.

    The lake is compared too, because a run that was in progress when its shard was removed may have written since.

    Raises:
        PoolError: the pool's folder is missing or holds no shard, so that it is unknown which shards are gone.
    """
    listed = snapshot.listing
    partitions = set(instance.get_dynamic_partitions(SHARDS_NAME))
    lake = snapshot.context.lake
    stored = {shard for node in _partitioned(graph) for shard in lake.shards(node.key)}
    return PartitionChanges(
        added=sorted(listed.keys() - partitions), gone=sorted((partitions | stored) - listed.keys())
    )


def clear(lake: Lake, graph: Graph, shards: Sequence[str]) -> None:
    """Remove the lake's files of shards; exported tars stay with their version.

    Call it before the partitions are deleted, so that a pass that is killed in between does it again.
    """
    for shard in shards:
        for node in (*graph.exports, *reversed(_partitioned(graph))):
            lake.remove(node.key, shard)
            remove_checks(lake, node.key, shard)
        lake.remove("rejects", shard)


def neighbours(shards: Sequence[str], due: set[str]) -> list[list[str]]:
    """Group shards that are due and follow one another: a Dagster run covers a range of partitions."""
    return [list(group) for is_due, group in itertools.groupby(shards, due.__contains__) if is_due]


@dataclass
class Due:
    """The work that is out of date.

    Attributes:
        now: what can be computed at once, by asset: a mark of the wanted provenance by shard (None for an
            unpartitioned asset). None of its inputs is due.
        given_up: work that was tried too often: asset and shard by mark.
        problems: errors that keep it unknown whether something is due.
    """

    now: dict[str, dict[str | None, str]] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def marks(self) -> list[str]:
        """List the marks of all work that is out of date and does not wait for other work."""
        return [mark for wanted in self.now.values() for mark in wanted.values()] + list(self.given_up)

    def runs(self, partitions: Sequence[str]) -> list[tuple[list[str], list[str]]]:
        """List the runs that would do the work: assets, and neighbouring shards (none for unpartitioned assets).

        Args:
            partitions: all of Dagster's partitions, in their order.
        """
        together: dict[tuple[str, ...], list[str]] = {}
        for key, wanted in self.now.items():
            shards = {shard for shard in wanted if shard is not None}
            for group in neighbours(partitions, shards) if shards else [[]]:
                together.setdefault(tuple(group), []).append(key)
        return [(keys, list(group)) for group, keys in together.items()]


def find_due(snapshot: Snapshot, graph: Graph, shards: Sequence[str], tried: Mapping[str, int]) -> Due:
    """Find what is out of date and can be computed now.

    An asset waits while one of its inputs is due itself, so nothing is computed twice. Work that was tried `ATTEMPTS`
    times without success is no longer waited for.

    Args:
        snapshot: the project's inputs.
        graph: its assets.
        shards: shards that are in the pool and have a partition.
        tried: how often work was tried, by its mark.
    """
    due = Due()
    moving: dict[str, set[str | None]] = {}
    for node in graph.in_order:
        upstream: set[str | None] = set().union(*(moving.get(dep, ()) for dep in node.deps))
        moving[node.key] = set() if isinstance(node, UnpartitionedAsset) else set(upstream)
        if isinstance(node, SubsetAsset):
            continue  # selected when nothing else is due; assets that read it wait for its inputs
        for shard in shards if isinstance(node, PartitionedAsset) else [None]:
            if shard is not None and (shard in upstream or None in upstream):
                continue
            try:
                mark = _mark(snapshot, node, shard)
            except UserError as error:
                if str(error) not in due.problems:
                    due.problems.append(str(error))
                continue
            if mark is None:
                continue
            if tried.get(mark, 0) >= ATTEMPTS:
                due.given_up[mark] = f"{node.key} of shard {shard}" if shard else node.key
                continue
            moving[node.key].add(shard)
            if shard is not None or not upstream:
                due.now.setdefault(node.key, {})[shard] = mark
    return due


def _mark(snapshot: Snapshot, node: Node, shard: str | None) -> str | None:
    """Return a short name of the file that a run would write, or None where a run would write nothing."""
    try:
        if isinstance(node, PartitionedAsset):
            assert shard is not None
            fresh = node.is_fresh(snapshot, shard)
        else:
            fresh = node.is_fresh(snapshot)
        return None if fresh else _wanted(snapshot, node, shard)[:16]
    except NotReady:
        return None


def _wanted(snapshot: Snapshot, node: Node, shard: str | None) -> str:
    if isinstance(node, PartitionedAsset):
        assert shard is not None
        return node.provenance(snapshot, shard).digest()
    return node.provenance(snapshot).digest()


def change_token(snapshot: Snapshot, graph: Graph, shards: Sequence[str]) -> str:
    """Return a digest that changes whenever something may have become due; few assets need a look at every shard.

    It covers the pool's listing, settings and code (through the provenance wanted of one shard), targets, uid lists,
    and the times of the lake's folders, which change with every file that is written or removed. Assets that are
    computed from all shards, such as a search of near duplicates, look at each of them.

    Raises:
        PoolError: the pool's folder can't be listed.
        LakeError: the lake is not in a local folder.
    """
    wanted: list[str] = []
    for node in graph.nodes:
        try:
            whole = isinstance(node, UnpartitionedAsset)
            wanted.append(_wanted(snapshot, node, shards[0] if shards else None) if shards or whole else "")
        except (NotReady, UserError) as error:
            wanted.append(str(error))
    folder = snapshot.context.config.resolve().parent
    lists = [folder / name for subset in graph.subsets for name in subset.model.sets if set_kind(name) == "uids"]
    return digest(
        {
            "pool": {shard: snapshot.listing[shard] for shard in shards},
            "wanted": wanted,
            "recipes": {subset.key: subset.model.definition() for subset in graph.subsets},
            "times": [_time(path) for path in (*lake_folders(snapshot.context.lake, graph), *lists)],
        }
    )


def lake_folders(lake: Lake, graph: Graph) -> list[Path]:
    """List the folders of the lake in which a file is renamed whenever an asset is materialized."""
    root = lake.local_root()
    folders = {
        root / (node.key if isinstance(node, PartitionedAsset) else node.key.rsplit("/", 1)[0]) for node in graph.nodes
    }
    return sorted(folders | {root / subset.key for subset in graph.subsets})


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _partitioned(graph: Graph) -> list[PartitionedAsset]:
    return [node for node in graph.nodes if isinstance(node, PartitionedAsset)]
