"""Reproducing a version of a subset, bit for bit, from its lineage record.

Here: `choose_again`, from the scores in a lake, and `rebuild`, from the pool itself. Both check every fingerprint that
they rely on and report the ones that differ. Not here: the content of a record (`assets.subsets.lineage`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from assets.base.asset import Step
from assets.base.context import Context, Snapshot
from assets.base.partitioned import PartitionedAsset, write_unchecked
from assets.base.score_kind import Scores
from assets.base.selection_table import CachedTable, open_selection
from assets.base.settings import ProjectSettings
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import Node, build_graph
from assets.scores import KINDS
from assets.scores.external_uids import read_uids
from assets.settings import Kinds, load_settings, open_context, settings_model
from assets.subsets.lineage import FORMAT, packages
from assets.subsets.subset import manifest, read_uid_list
from core.hashing import sha256
from resources.lake.files import Lake, LakeError, Provenance, sample_digest
from resources.lake.versions import Versions, set_file, write_selection
from resources.pools.base import TarPool
from resources.settings import ExternalUids
from selection.recipes.execute import Selection
from selection.recipes.recipe import UID_LIST_ASSETS, is_uid_list_asset


def choose_again(
    lake: Lake,
    record: Mapping[str, Any],
    folder: Path,
    sets: Mapping[str, pa.Table] | None = None,
    kinds: Kinds = KINDS,
) -> Path:
    """Select a version's rows again from the files in a lake.

    Args:
        lake: the lake.
        record: the version's lineage record.
        folder: where `manifest.parquet` and `subset.npy` are written; it is created.
        sets: the uids of each recipe and uid list that the recipe reads, by name; by default those stored beside the
            version in the lake.
        kinds: the score kinds that the record may use.

    Returns:
        The folder.

    Raises:
        LakeError: a file is not the one that the version was selected from, or the selection differs from the version.
            The message lists the differences.
    """
    with open_recorded(lake, record, sets, kinds) as selection:
        folder.mkdir(parents=True, exist_ok=True)
        found = write_selection(manifest(selection), folder / "manifest.parquet", folder / "subset.npy")
    differences = [
        f"{folder / file}: sha256 {found[file]}, not {wanted}"
        for file, wanted in record["files"].items()
        if found[file] != wanted
    ]
    _refuse(record, differences)
    return folder


@contextmanager
def open_recorded(
    lake: Lake,
    record: Mapping[str, Any],
    sets: Mapping[str, pa.Table] | None = None,
    kinds: Kinds = KINDS,
    cached: CachedTable | None = None,
) -> Iterator[Selection]:
    """Run a version's own recipe over the files that it was selected from.

    Args:
        lake: the lake.
        record: the version's lineage record.
        sets: the uids of each recipe and uid list that the recipe reads, by name; by default those stored beside the
            version in the lake.
        kinds: the score kinds that the record may use.
        cached: as `open_selection` takes it.

    Yields:
        The selection, valid within the block.

    Raises:
        LakeError: a file is not the one that the version was selected from.
    """
    name = record["recipe"]
    settings = recorded_settings(lake, record, record["shards"], kinds)
    recipe = settings.recipes[name]
    if sets is None:
        versions = Versions(lake, name)
        version = versions.of_record(record["version"], dict(record))
        sets = {other: versions.read_uids(version, set_file(other)) for other in recipe.sets}
    scores = Scores(settings).places(recipe.columns().scores)
    with open_selection(lake, name, recipe, scores, record["shards"], sets, cached) as (selection, _):
        yield selection


def recorded_settings(
    lake: Lake, record: Mapping[str, Any], shards: Mapping[str, Mapping[str, str]], kinds: Kinds = KINDS
) -> ProjectSettings:
    """Return the settings that a version was selected with, for reading the same files.

    Args:
        lake: the lake.
        record: the version's lineage record.
        shards: those of the record that are read.
        kinds: the score kinds that the record may use.

    Raises:
        LakeError: a file is not the one that the version was selected from.
    """
    _check_format(record)
    settings = settings_model(kinds).model_validate({**record["project"], "lake": str(lake.root)})
    tables = settings.recipes[record["recipe"]].tables
    _refuse(record, _other_files(lake, shards))
    _refuse(record, _other_files(lake, {None: {key: record["inputs"][key]["fingerprint"] for key in tables}}))
    return settings


def rebuild(record: Mapping[str, Any], folder: Path, kinds: Kinds = KINDS) -> Path:
    """Reproduce a version from the pool: every row, embedding, draw and score that it needs, and the selection.

    Needs the pool, the models, the targets and the uid list at the recorded paths, and nothing else. An interrupted
    call resumes: existing files are not computed again.

    Args:
        record: the version's lineage record.
        folder: gets `project.yaml`, `lake/`, `manifest.parquet` and `subset.npy`; for a recipe that reads another one,
            `sets/<recipe>/` holds the same of that one.
        kinds: the score kinds that the record may use.

    Returns:
        The folder.

    Raises:
        LakeError: an input differs from the recorded one; the message names it.
    """
    _check_format(record)
    folder.mkdir(parents=True, exist_ok=True)
    named = [record["source"], *record["sets"].values()]
    lists = record["project"].get("external_uids", {})
    sets = {read["name"]: _set_again(read, folder, lists, kinds) for read in named if read["kind"] != "pool"}
    config = folder / "project.yaml"
    config.write_text(yaml.safe_dump({**record["project"], "lake": str(folder / "lake")}), encoding="utf-8")
    context = open_context(load_settings(config, kinds), config)
    if isinstance(context.pool, TarPool) and context.pool.groups is not None and "shard_groups" in record:
        context.pool.groups.record(record["shard_groups"])  # an interrupted call has done it
    _check_encoders(record, context)
    _refuse_subsets(record)
    graph = build_graph(context)
    nodes = {node.key: node for node in graph.nodes}
    drawn = {key: _recorded_shards(record, nodes[key]) for key in record["inputs"] if key in nodes}
    shards = {*record["shards"], *(shard for some in drawn.values() for shard in some)}
    gone = shards - set(Snapshot(context).listing)
    _refuse(record, [f"the pool has no shard {shard} any more" for shard in sorted(gone)])
    needed = {"raw_pool", *record["inputs"], *record["scores"], *(f"embeddings/{e}" for e in record["encoders"])}
    for node in graph.nodes:
        if node.key not in needed:
            continue
        if isinstance(node, PartitionedAsset):
            of_node = {key: some for key, some in drawn.items() if _reads(nodes, key, node.key)}
            others = {shard for some in of_node.values() for shard in some}
            some = shards if node.key == "raw_pool" else {*record["shards"], *others}
            _make_shards(Snapshot(context, shards), node, sorted(some))
            wanted = {s: {node.key: read[node.key]} for s, read in record["shards"].items() if node.key in read}
            if node.key.startswith("embeddings/"):  # whose fingerprints an unpartitioned asset records by shard
                for key in of_node:
                    if node.key in nodes[key].deps:
                        wanted |= {shard: {node.key: fingerprint} for shard, fingerprint in drawn[key].items()}
            _refuse(record, _other_files(context.lake, wanted))
        else:
            _make_unpartitioned(context, node, drawn.get(node.key) or shards)
            fingerprint = record["inputs"][node.key]["fingerprint"]
            _refuse(record, _other_files(context.lake, {None: {node.key: fingerprint}}))
    return choose_again(context.lake, record, folder, sets, kinds)


def _check_encoders(record: Mapping[str, Any], context: Context) -> None:
    found = {name: context.models.encoder(name).identity() for name in record["encoders"]}
    recorded = record["encoders"]
    _refuse(record, [f"encoder {n} is {found[n]}, not {recorded[n]}" for n in found if found[n] != recorded[n]])


def _refuse_subsets(record: Mapping[str, Any]) -> None:
    """Refuse a version whose scores were computed over a subset.

    Raises:
        LakeError: it is such a version.
    """
    started = [
        f"{asset} started from {name}"
        for asset, read in record["inputs"].items()
        for name in read["provenance"]["inputs"]
        if name.startswith("subset/")
    ]
    started += [f"{asset} started from {read['of']}" for asset, read in record["scores"].items() if read.get("of")]
    encoders = record["project"]["encoders"]
    started += [
        f"embeddings/{name} started from {of}" for name in record["encoders"] if (of := encoders[name].get("of"))
    ]
    remedy = "which `rebuild` does not make first. Remedy: `choose_again` in its own lake"
    _refuse(record, [f"{start}, {remedy}" for start in started])


def _recorded_shards(record: Mapping[str, Any], node: Node) -> Mapping[str, str]:
    """Return the shards, and fingerprints of their files, that an unpartitioned asset was computed from."""
    from_shards = any(not dep.recorded and not dep.key.startswith("subset/") for dep in node.declared.deps)
    inputs: Mapping[str, str] = record["inputs"][node.key]["provenance"]["inputs"]
    return {name: inputs[name] for name in inputs if "/" not in name} if from_shards else {}


def _reads(nodes: Mapping[str, Node], key: str, other: str) -> bool:
    """Check whether an asset is computed from another one, directly or not."""
    return key in nodes and any(dep == other or _reads(nodes, dep, other) for dep in nodes[key].deps)


def _set_again(read: Mapping[str, Any], folder: Path, lists: Mapping[str, Any], kinds: Kinds) -> pa.Table:
    if read["kind"] == "recipe":
        again = rebuild(read["record"], folder / "sets" / read["name"], kinds)
        return pq.read_table(again / "manifest.parquet", columns=["f0", "f1"])
    if is_uid_list_asset(read["name"]):
        uids = read_uids(ExternalUids.model_validate(lists[read["name"].removeprefix(UID_LIST_ASSETS)]))
        if sample_digest(uids) != read["fingerprint"]:
            raise LakeError(f"{read['name']}: its files hold other uids now. Remedy: put the old ones back")
        return uids
    path = Path(read["path"])
    if not path.is_file() or sha256(path) != read["fingerprint"]:
        raise LakeError(f"{path}: not the uid list that the subset was made with. Remedy: put that list back")
    return read_uid_list(path)


def _make_shards(snapshot: Snapshot, node: PartitionedAsset, shards: Sequence[str]) -> None:
    due: dict[str | None, Provenance] = {
        shard: node.provenance(snapshot, shard) for shard in shards if not node.is_fresh(snapshot, shard)
    }
    if not due:
        return
    for shard, outcome in node.compute(Step(node, snapshot, due), [shard for shard in shards if shard in due]):
        if isinstance(outcome, Exception):
            raise outcome
        write_unchecked(snapshot.context.lake, due[shard], outcome)


def _make_unpartitioned(context: Context, node: UnpartitionedAsset, shards: Collection[str]) -> None:
    """Compute an unpartitioned asset as if the pool had only the given shards."""
    snapshot = Snapshot(context, shards)
    if not node.is_fresh(snapshot):
        wanted = node.provenance(snapshot)
        result = node.compute(Step(node, snapshot, {None: wanted}))
        context.lake.write(result.table, wanted, content=result.content, summary=result.summary)


def _other_files(
    lake: Lake, shards: Mapping[str, Mapping[str, str]] | Mapping[None, Mapping[str, str]]
) -> Iterator[str]:
    for shard, read in shards.items():
        for asset, wanted in read.items():
            stored = lake.stored(asset, shard)
            if stored is None:
                yield f"{lake.path(asset, shard)} is not there"
            elif stored.fingerprint != wanted:
                yield f"{lake.path(asset, shard)} has fingerprint {stored.fingerprint}, not {wanted}"


def _check_format(record: Mapping[str, Any]) -> None:
    if record["format"] != FORMAT:
        raise LakeError(
            f"subset/{record['recipe']} {record['version']}: its lineage record has format {record['format']}, which "
            f"does not hold all that is needed (format {FORMAT} does). Remedy: materialize the subset again"
        )


def _refuse(record: Mapping[str, Any], differences: Iterator[str] | list[str]) -> None:
    found = list(differences)
    if not found:
        return
    now = packages()
    other = [f"{name} {now.get(name)}, not {was}" for name, was in record["packages"].items() if now.get(name) != was]
    more = [f"... and {len(found) - 20} more"] if len(found) > 20 else []
    beside = [f"besides, packages differ: {', '.join(other)}"] if other else []
    raise LakeError(
        f"subset/{record['recipe']} {record['version']} can't be reproduced:\n"
        + "\n".join([*found[:20], *more, *beside])
    )
