"""The work that a pass would do: for each asset, its missing and stale files with the reason.

Assets answer whether a file is up to date, as they do for a pass. Here: what follows downstream, if everything that is
due is computed. Not here: rows, bytes and time.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from assets.base.context import Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.base.results import NotReady
from assets.base.unpartitioned import UnpartitionedAsset, UnpartitionedTemplate
from assets.graph import Graph, Node
from assets.subsets.catalog import catalog_is_newest
from assets.subsets.subset import SubsetAsset
from core.errors import UserError
from resources.lake.files import Provenance, Stored
from resources.lake.versions import Versions

MISSING, SETTINGS, CODE = "missing", "settings changed", "code changed"
IF_CHANGED = " (stays if its rows are unchanged)"


@dataclass(frozen=True)
class Work:
    """What is to be computed of an asset.

    Attributes:
        asset: its key.
        node: the asset; None for the catalog.
        due: the reason by shard; that of an asset without shards is under None.
        blocked: the reason why a shard (or None) can't be computed.
        of: number of its shards; 1 for an asset without.
        fingerprints: those that new files will have, where they follow from the inputs as they are.
    """

    asset: str
    node: Node | SubsetAsset | None
    due: Mapping[str | None, str] = field(default_factory=dict)
    blocked: Mapping[str | None, str] = field(default_factory=dict)
    of: int = 1
    fingerprints: Mapping[str | None, str] = field(default_factory=dict)

    @property
    def shards(self) -> list[str]:
        """The shards that are to be computed."""
        return [shard for shard in self.due if shard is not None]

    @property
    def why(self) -> dict[str, int]:
        """How many files are due for each reason, most first."""
        return dict(Counter(self.due.values()).most_common())

    def makes_stale(self, shard: str, stored: Stored | None) -> bool:
        """Check whether a shard's file that reads this asset is stale once the asset is computed.

        Args:
            shard: the shard.
            stored: the record of the file. A file that was lost is written again with the fingerprint that it had.
        """
        place = None if None in self.due else shard
        if place not in self.due:
            return False
        return stored is None or stored.provenance.inputs.get(self.asset) != self.fingerprints.get(place, "")

    @property
    def changed(self) -> bool:
        """Whether files are due because settings or code changed, so that their rates may have."""
        return any(why.startswith((SETTINGS, CODE)) for why in self.due.values())


def find_work(snapshot: Snapshot, graph: Graph, only: Collection[str] | None = None) -> list[Work]:
    """List the work on each asset, upstream first, and on the catalog at the end.

    Args:
        snapshot: the project's inputs.
        graph: its assets.
        only: keys of the assets; by default all.

    Raises:
        PoolError: the pool can't be listed.
    """
    found: dict[str, Work] = {}
    for node in graph.in_order:
        if only is not None and node.key not in only:
            continue
        upstream = [found[dep] for dep in node.deps if dep in found and found[dep].due]
        if isinstance(node, PartitionedAsset):
            found[node.key] = _of_shards(snapshot, node, upstream)
        elif (
            upstream or not isinstance(node, SubsetAsset) or not any(found[k].due for k in node.upstream if k in found)
        ):
            found[node.key] = _of_one(snapshot, node, upstream)
        else:  # files further up were lost, and are written again as they were
            found[node.key] = Work(node.key, node)
    ahead = next((f"{work.asset} is computed" for work in found.values() if work.due), "")
    if not ahead and not catalog_is_newest(snapshot.context):
        ahead = MISSING if not snapshot.context.catalog_path().exists() else "older than the YAML or a subset"
    return [*found.values(), Work("catalog", None, {None: ahead} if ahead else {})]


def _of_shards(snapshot: Snapshot, node: PartitionedAsset, upstream: Sequence[Work]) -> Work:
    due: dict[str | None, str] = {}
    blocked: dict[str | None, str] = {}
    fingerprints: dict[str | None, str] = {}
    for shard in sorted(snapshot.listing):
        stored = snapshot.context.lake.stored(node.key, shard)
        ahead = next((work.asset for work in upstream if work.makes_stale(shard, stored)), None)
        try:
            wanted = node.provenance(snapshot, shard)
        except (NotReady, UserError) as error:
            if ahead is None:
                if not any(shard in work.due or None in work.due for work in upstream):
                    blocked[shard] = str(error)
                continue
        else:
            if node.written(snapshot, wanted) is None:
                due[shard] = _difference(stored, wanted)
                fingerprints[shard] = wanted.digest()
                continue
        if ahead is not None:
            due[shard] = (
                MISSING if stored is None else f"{ahead} is computed again{IF_CHANGED if ahead == 'raw_pool' else ''}"
            )
    return Work(node.key, node, due, blocked, len(snapshot.listing), fingerprints)


def _of_one(snapshot: Snapshot, node: UnpartitionedAsset | SubsetAsset, upstream: Sequence[Work]) -> Work:
    try:
        why = _why_subset(snapshot, node) if isinstance(node, SubsetAsset) else _why(snapshot, node)
    except (NotReady, UserError) as error:
        if not upstream:
            return Work(node.key, node, blocked={None: str(error)})
        why = MISSING
    fingerprints: dict[str | None, str] = {}
    if why and not upstream and isinstance(node, UnpartitionedAsset):
        fingerprints[None] = node.provenance(snapshot).digest()
    if not why and upstream and not _keeps(snapshot, node):
        why = f"{upstream[0].asset} is computed"
    return Work(node.key, node, {None: why} if why else {}, fingerprints=fingerprints)


def _why(snapshot: Snapshot, node: UnpartitionedAsset) -> str:
    wanted = node.provenance(snapshot)
    if node.written(snapshot, wanted) is not None:
        return ""
    return _difference(snapshot.context.lake.stored(node.key), wanted)


def _why_subset(snapshot: Snapshot, node: SubsetAsset) -> str:
    current = Versions(snapshot.context.lake, node.recipe).current()
    if current is None:
        node.inputs(snapshot)  # raises where nothing can be selected from
        return MISSING
    if node.inputs(snapshot).fingerprint(node.model) != current.lineage["fingerprint"]:
        return "its recipe or inputs changed"
    if not node.has_report(snapshot.context.lake):
        return "its report is missing"
    return "checks are due" if node.has_due_checks(snapshot) else ""


def _keeps(snapshot: Snapshot, node: UnpartitionedAsset | SubsetAsset) -> bool:
    """Check whether a file that is up to date stays so when what it was computed from is computed again."""
    if isinstance(node, SubsetAsset):
        return False
    template, stored = node.declared.template, snapshot.context.lake.stored(node.key)
    assert isinstance(template, UnpartitionedTemplate)
    return stored is not None and (node.stays(snapshot) or template.keeps(node.declared, stored, snapshot))


def _difference(stored: Stored | None, wanted: Provenance) -> str:
    """Return why a file is not the wanted one."""
    if stored is None:
        return MISSING
    have = stored.provenance
    if have.code_version != wanted.code_version:
        return CODE
    if have.parameters != wanted.parameters:
        names = {**have.parameters, **wanted.parameters}
        return f"{SETTINGS}: {_some(n for n in names if have.parameters.get(n) != wanted.parameters.get(n))}"
    if have.inputs != wanted.inputs:
        names = {**have.inputs, **wanted.inputs}
        return f"input changed: {_some(n for n in names if have.inputs.get(n) != wanted.inputs.get(n))}"
    return "a file beside it is missing"


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
