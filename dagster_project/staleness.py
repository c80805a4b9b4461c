"""The bookkeeping of shards: which come and go, what is due, and what one run covers.

Here: what the sensors and the headless pass both have to know, read from the pool's listing and the lake's
provenance. Not here: starting runs.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from assets.base.partitioned import SHARDS_NAME, NotReady, ShardAsset
from assets.base.unpartitioned import WholeAsset
from assets.graph import Graph
from assets.project import Project
from assets.subsets.subset import SubsetAsset
from core.hashing import digest
from resources.inputs.external import ExternalError
from resources.inputs.languages import LanguageError
from resources.inputs.targets import TargetError
from resources.inputs.wordnet import WordNetError
from resources.lake.files import LakeError
from resources.models.encoders import EncoderError
from resources.pools.base import PoolError
from selection.recipes.recipe import set_kind

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"

BAD_INPUT = (PoolError, EncoderError, TargetError, ExternalError, LanguageError, WordNetError, LakeError)
"""What a person has to mend; the message says how."""

ATTEMPTS = 3
"""How often automation tries the same work before it leaves it to a person."""


@dataclass(frozen=True)
class Change:
    """How Dagster's partitions differ from the pool's folder.

    Attributes:
        added: shards that have no partition yet, sorted.
        gone: shards that have a partition or files in the lake, and are not in the pool any more, sorted.
    """

    added: list[str]
    gone: list[str]


def look(project: Project, graph: Graph, instance: dg.DagsterInstance) -> Change:
    """Compare the pool's folder with Dagster's partitions and with the lake; listings alone are read.

    The lake is asked too because a run that was under way when its shard was retired may have written since.

    Raises:
        PoolError: the pool's folder is not there or holds no shard, so that nobody can tell what is gone.
    """
    project.look_again()
    listed = project.listing()
    partitions = set(instance.get_dynamic_partitions(SHARDS_NAME))
    stored = {shard for node in _sharded(graph) for shard in project.lake.shards(node.key)}
    return Change(added=sorted(listed.keys() - partitions), gone=sorted((partitions | stored) - listed.keys()))


def clear(project: Project, graph: Graph, shards: Sequence[str]) -> None:
    """Remove what the lake holds of shards; what was exported of a version stays with that version.

    To be done before their partitions are deleted, so that a pass that is killed in between does it again.
    """
    for shard in shards:
        for node in (*graph.exports, *reversed(_sharded(graph))):
            project.lake.remove(node.key, shard)
        project.lake.remove("rejects", shard)


def neighbours(shards: Sequence[str], due: set[str]) -> list[list[str]]:
    """Put shards that are due and follow one another together: a Dagster run covers a range of partitions."""
    return [list(group) for is_due, group in itertools.groupby(shards, due.__contains__) if is_due]


@dataclass
class Due:
    """What is out of date.

    Attributes:
        now: what can be computed at once, by asset: the wanted provenance's mark by shard (None for an asset
            without partitions). What it would read is not due itself.
        given_up: what has been tried too often: asset and shard by mark.
        problems: messages of what a person has to mend before it can be told what is due.
    """

    now: dict[str, dict[str | None, str]] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def marks(self) -> list[str]:
        """Give the marks of all that is out of date and not waiting for something else."""
        return [mark for wanted in self.now.values() for mark in wanted.values()] + list(self.given_up)

    def runs(self, partitions: Sequence[str]) -> list[tuple[list[str], list[str]]]:
        """Give the runs that would bring it up to date: assets, and neighbouring shards (none for whole assets).

        Args:
            partitions: all of Dagster's partitions, in their order.
        """
        together: dict[tuple[str, ...], list[str]] = {}
        for key, wanted in self.now.items():
            shards = {shard for shard in wanted if shard is not None}
            for group in neighbours(partitions, shards) if shards else [[]]:
                together.setdefault(tuple(group), []).append(key)
        return [(keys, list(group)) for group, keys in together.items()]


def find_due(project: Project, graph: Graph, shards: Sequence[str], tried: Mapping[str, int]) -> Due:
    """Find what is out of date and can be computed now.

    A shard waits for its inputs: as long as something that an asset reads is due itself, the asset isn't, so that
    nothing is computed twice. What was tried `ATTEMPTS` times without success is no longer waited for.

    Args:
        project: the opened project.
        graph: its assets.
        shards: shards that are in the pool and have a partition.
        tried: how often work was tried, by its mark.
    """
    due = Due()
    moving: dict[str, set[str | None]] = {}
    for node in graph.in_order:
        upstream: set[str | None] = set().union(*(moving.get(dep, ()) for dep in node.deps))
        moving[node.key] = set() if isinstance(node, WholeAsset) else set(upstream)
        if isinstance(node, SubsetAsset):
            continue  # chosen when all has come to rest; what begins with it waits for what it reads
        for shard in shards if isinstance(node, ShardAsset) else [None]:
            if shard is not None and (shard in upstream or None in upstream):
                continue
            try:
                mark = _mark(project, node, shard)
            except BAD_INPUT as error:
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


def _mark(project: Project, node: ShardAsset | WholeAsset, shard: str | None) -> str | None:
    """Give a short name of what a run would write, or None where a run would write nothing."""
    try:
        wanted = _wanted(node, shard)
    except NotReady:
        return None
    stored = project.lake.stored(node.key, shard)
    return None if stored is not None and stored.provenance.digest() == wanted else wanted[:16]


def _wanted(node: ShardAsset | WholeAsset, shard: str | None) -> str:
    if isinstance(node, ShardAsset):
        assert shard is not None
        return node.provenance(shard).digest()
    return node.provenance(False).digest()


def glance(project: Project, graph: Graph, shards: Sequence[str]) -> str:
    """Give a digest that changes whenever something may have become due; few assets cost a look into every shard.

    It covers the pool's listing, settings and code (through what is wanted of one shard), targets, uid lists, and
    the times of the lake's folders, which change with every file that is written or removed. What is wanted of an
    asset that is made from all shards, such as a search of near duplicates, is asked of each of them.

    Raises:
        PoolError: the pool's folder can't be listed.
        LakeError: the lake is not in a local folder.
    """
    wanted: list[str] = []
    with project.at_rest():
        for node in graph.nodes:
            try:
                wanted.append(_wanted(node, shards[0] if shards else None) if shards or _is_whole(node) else "")
            except (NotReady, *BAD_INPUT) as error:
                wanted.append(str(error))
    folder = project.config.resolve().parent
    lists = [folder / name for subset in graph.subsets for name in subset.model.sets if set_kind(name) == "uids"]
    listing = project.listing()
    return digest(
        {
            "pool": {shard: listing[shard] for shard in shards},
            "wanted": wanted,
            "recipes": {subset.key: subset.model.definition() for subset in graph.subsets},
            "times": [_time(path) for path in (*lake_folders(project, graph), *lists)],
        }
    )


def lake_folders(project: Project, graph: Graph) -> list[Path]:
    """Name the folders of the lake in which a file is renamed whenever an asset is made."""
    root = project.lake.local_root()
    folders = {
        root / (node.key if isinstance(node, ShardAsset) else node.key.rsplit("/", 1)[0]) for node in graph.nodes
    }
    return sorted(folders | {root / subset.key for subset in graph.subsets})


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _sharded(graph: Graph) -> list[ShardAsset]:
    return [node for node in graph.nodes if isinstance(node, ShardAsset)]


def _is_whole(node: ShardAsset | WholeAsset) -> bool:
    return isinstance(node, WholeAsset)
