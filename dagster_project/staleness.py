"""What is out of date, and what one run covers: for sensors and for the headless pass, which start the runs.

Everything follows from the pool's listing and the lake's provenance.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from assets.base.context import Snapshot
from assets.base.keys import SHARDS_NAME
from assets.base.partitioned import PartitionedAsset
from assets.base.results import NotReady
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import Graph, Node
from core.errors import UserError
from core.hashing import digest
from resources.lake.check_records import remove_checks
from resources.lake.files import Lake, Provenance
from resources.pools.base import TarPool
from selection.recipes.recipe import set_kind

PARTITION = "dagster/partition"
RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
SHARDS_TAG = "clip_selection/shards"
"""The shards of a run, for people: the UI's list of runs shows this tag, and hides Dagster's own."""

SHARDS_PER_RUN_VARIABLE = "CLIP_SELECTION_SHARDS_PER_RUN"

ATTEMPTS = 3
"""How often automation tries the same work before it leaves it to a person."""


class ShardsPerRunError(UserError):
    """The environment's number of shards per run is wrong."""


def shards_per_run(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many shards a sensor or a backfill gives to one run, from CLIP_SELECTION_SHARDS_PER_RUN; None for all.

    Raises:
        ShardsPerRunError: it is not a number of shards.
    """
    given = environment.get(SHARDS_PER_RUN_VARIABLE, "")
    if not given:
        return None
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ShardsPerRunError(f"{SHARDS_PER_RUN_VARIABLE}: {given!r} is not a number of shards. Remedy: 1 or more")
    return int(given)


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
    record_groups(snapshot)
    listed = snapshot.listing
    partitions = set(instance.get_dynamic_partitions(SHARDS_NAME))
    lake = snapshot.context.lake
    stored = {shard for node in _partitioned(graph) for shard in lake.shards(node.key)}
    return PartitionChanges(
        added=sorted(listed.keys() - partitions), gone=sorted((partitions | stored) - listed.keys())
    )


def record_groups(snapshot: Snapshot) -> None:
    """Record the groups of new tars (`tars_per_shard`), and let the snapshot list the pool as they are."""
    pool = snapshot.context.pool
    if not isinstance(pool, TarPool) or pool.groups is None or (pool.settings.tars_per_shard or 1) == 1:
        return
    if snapshot.listing.keys() - pool.groups.recorded().keys():
        pool.record_groups()
        snapshot.refresh_listing()


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


def run_tags(shards: Sequence[str]) -> dict[str, str]:
    """Return the tags of a run that computes neighbouring shards; none for a run of unpartitioned assets."""
    if not shards:
        return {}
    first, last = shards[0], shards[-1]
    shown = first if first == last else f"{first} to {last}: {len(shards)} shards"
    return {RANGE_START: first, RANGE_END: last, SHARDS_TAG: shown}


@dataclass
class Due:
    """The work that is out of date.

    Attributes:
        plan: for each shard, the assets that one run can compute, upstream first; under None the unpartitioned assets.
        marks: a short name of the wanted file, for each planned file whose inputs are up to date.
        retried: shards with a mark that was tried before. They get runs of their own, so that a shard that fails stops
            no other one.
        held: marks of files that are due and have to wait for a run in progress.
        given_up: work that was tried too often: asset and shard by mark.
        problems: errors that keep it unknown whether something is due.
    """

    plan: dict[str | None, list[str]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    retried: set[str | None] = field(default_factory=set)
    held: list[str] = field(default_factory=list)
    given_up: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def runs(self, partitions: Sequence[str], most: int | None = None) -> list[tuple[list[str], list[str]]]:
        """List the runs that would do the work: assets, and neighbouring shards (none for unpartitioned assets).

        Args:
            partitions: all of Dagster's partitions, in their order.
            most: number of shards in one run at most.
        """

        def same_run(shard: str) -> tuple[list[str], bool]:
            return self.plan.get(shard, []), shard in self.retried

        runs: list[tuple[list[str], list[str]]] = [(self.plan[None], [])] if None in self.plan else []
        for (keys, _), group in itertools.groupby(partitions, same_run):
            shards = list(group)
            size = most or len(shards)
            runs += [(keys, shards[at : at + size]) for at in range(0, len(shards), size) if keys]
        return runs


@dataclass(frozen=True)
class _Waits:
    """What those that read an asset have to wait for.

    Attributes:
        shards: those whose file is out of date, or waits for one that is; None stands for all.
        missing: shards whose file can't be computed: an input is missing, or it was tried too often.
        next_run: it can't be computed, or may change, in a run that computes what it reads.
    """

    shards: set[str | None] = field(default_factory=set)
    missing: set[str | None] = field(default_factory=set)
    next_run: bool = False


Hold = Callable[[str, str | None], bool]
"""Checks whether a file, by the key of its asset and its shard, has to wait for a run in progress."""


def find_due(
    snapshot: Snapshot,
    graph: Graph,
    shards: Sequence[str],
    tried: Mapping[str, int],
    hold: Hold = lambda _key, _shard: False,
) -> Due:
    """Find what is out of date, and what runs can compute now.

    An asset of a shard is computed in the same run as the shard's inputs. It waits for another run if an unpartitioned
    input or a subset is out of date, or would be after this run. Work that was tried `ATTEMPTS` times without success
    is no longer waited for.

    Args:
        snapshot: the project's inputs.
        graph: its assets.
        shards: shards that are in the pool and have a partition.
        tried: how often work was tried, by its mark.
        hold: checks what has to wait for a run in progress.
    """
    due = Due()
    found: dict[str, _Waits] = {}
    for node in graph.in_order:
        deps = [found[dep] for dep in node.deps if dep in found]
        upstream = _Waits(
            set().union(*(dep.shards for dep in deps)),
            set().union(*(dep.missing for dep in deps)),
            any(dep.next_run for dep in deps),
        )
        if isinstance(node, PartitionedAsset):
            found[node.key] = _look_at_shards(snapshot, node, shards, tried, upstream, due, hold)
        elif isinstance(node, UnpartitionedAsset):
            found[node.key] = _look_at_whole(snapshot, node, tried, upstream, due, hold)
        else:  # a subset is selected when nothing else is due
            found[node.key] = _Waits(upstream.shards, next_run=bool(upstream.shards) or upstream.next_run)
    return due


def _look_at_shards(
    snapshot: Snapshot,
    node: PartitionedAsset,
    shards: Sequence[str],
    tried: Mapping[str, int],
    upstream: _Waits,
    due: Due,
    hold: Hold,
) -> _Waits:
    waits = _Waits(set(upstream.shards), set(upstream.missing), upstream.next_run)
    for shard in shards:
        if None in upstream.shards:
            continue
        if shard in upstream.shards:
            if shard not in upstream.missing and not upstream.next_run:
                if hold(node.key, shard):
                    waits.missing.add(shard)
                else:
                    due.plan[shard].append(node.key)
            continue
        mark = _due_mark(snapshot, node, shard, tried, due)
        if mark is None:
            waits.missing.add(shard)
        elif mark:
            waits.shards.add(shard)
            if hold(node.key, shard):
                waits.missing.add(shard)
                due.held.append(mark)
            else:
                _plan(due, node, shard, mark, tried)
    return waits


def _look_at_whole(
    snapshot: Snapshot, node: UnpartitionedAsset, tried: Mapping[str, int], upstream: _Waits, due: Due, hold: Hold
) -> _Waits:
    mark = _due_mark(snapshot, node, None, tried, due)
    if mark and hold(node.key, None):
        due.held.append(mark)
    elif mark and not upstream.shards:
        _plan(due, node, None, mark, tried)
    may_change = bool(upstream.shards or upstream.next_run) and not node.stays(snapshot)
    return _Waits({None} if mark else set(), next_run=mark != "" or may_change)


def _plan(due: Due, node: Node, shard: str | None, mark: str, tried: Mapping[str, int]) -> None:
    due.plan.setdefault(shard, []).append(node.key)
    due.marks.append(mark)
    if mark in tried:
        due.retried.add(shard)


def _due_mark(snapshot: Snapshot, node: Node, shard: str | None, tried: Mapping[str, int], due: Due) -> str | None:
    """Return the mark of a file that is out of date; "" where it is up to date, None where it can't be computed."""
    try:
        mark = _mark(snapshot, node, shard)
    except NotReady:
        return None
    except UserError as error:
        if str(error) not in due.problems:
            due.problems.append(str(error))
        return None
    if tried.get(mark, 0) >= ATTEMPTS:
        due.given_up[mark] = f"{node.key} of shard {shard}" if shard else node.key
        return None
    return mark


def _mark(snapshot: Snapshot, node: Node, shard: str | None) -> str:
    """Return a short name of the file that a run would write; empty where a run would write nothing.

    Raises:
        NotReady: an input is missing or out of date.
    """
    wanted = _wanted(snapshot, node, shard)
    return "" if node.written(snapshot, wanted) is not None else wanted.digest()[:16]


def _wanted(snapshot: Snapshot, node: Node, shard: str | None) -> Provenance:
    if isinstance(node, PartitionedAsset):
        assert shard is not None
        return node.provenance(snapshot, shard)
    return node.provenance(snapshot)


def change_token(snapshot: Snapshot, graph: Graph, shards: Sequence[str]) -> str:
    """Return a digest that changes whenever something may have become due; few assets need a look at every shard.

    It covers the pool's listing, settings and code (through the provenance wanted of one shard), targets, uid lists,
    and the listing of the lake's folders. Assets that are computed from all shards, such as a search of near
    duplicates, look at each of them.

    Raises:
        PoolError: the pool's folder can't be listed.
    """
    wanted: list[str] = []
    for node in graph.nodes:
        try:
            whole = isinstance(node, UnpartitionedAsset)
            some = shards[0] if shards else None
            wanted.append(_wanted(snapshot, node, some).digest() if shards or whole else "")
        except (NotReady, UserError) as error:
            wanted.append(str(error))
    folder = snapshot.context.config.resolve().parent
    lists = [folder / name for subset in graph.subsets for name in subset.model.sets if set_kind(name) == "uids"]
    return digest(
        {
            "pool": {shard: snapshot.listing[shard] for shard in shards},
            "wanted": wanted,
            "recipes": {subset.key: subset.model.definition() for subset in graph.subsets},
            "lake": lake_token(snapshot.context.lake, graph),
            "times": [_time(path) for path in lists],
        }
    )


def lake_token(lake: Lake, graph: Graph) -> str:
    """Return a digest of the lake's listing, which changes whenever an asset is materialized or its file removed."""
    listed = [
        (entry.location, entry.tag)
        for folder in lake_folders(lake, graph)
        for entry in lake.listing(folder)
        if not entry.name.startswith(".")
    ]
    return digest([*listed, *(lake.store.folders(f"{lake.root}/{subset.key}") for subset in graph.subsets)])


def lake_folders(lake: Lake, graph: Graph) -> list[str]:
    """List the folders of the lake in which a file is written whenever an asset is materialized."""
    keys = {node.key if isinstance(node, PartitionedAsset) else node.key.rsplit("/", 1)[0] for node in graph.nodes}
    return sorted(f"{lake.root}/{key}" for key in keys | {subset.key for subset in graph.subsets})


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _partitioned(graph: Graph) -> list[PartitionedAsset]:
    return [node for node in graph.nodes if isinstance(node, PartitionedAsset)]
