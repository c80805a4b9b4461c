"""Making a version of a subset again, bit for bit, from its lineage record.

Here: `choose_again`, from the scores that lie in a lake, and `rebuild`, from the pool itself. Both check every
fingerprint that they rely on and say which one differs. Not here: what a record holds (`assets.subsets.lineage`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from assets.base.partitioned import ShardAsset
from assets.base.selection_table import chosen
from assets.base.unpartitioned import WholeAsset
from assets.graph import build_graph
from assets.project import Project, ProjectSettings, load_settings
from assets.scores.clusters import GIVEN
from assets.scores.external import read_uids
from assets.subsets.lineage import FORMAT, FROM_SHARDS, packages
from assets.subsets.subset import manifest, read_uid_list
from core.hashing import sha256
from resources.lake.files import Lake, LakeError, sample_digest
from resources.lake.versions import Versions, set_file, write_selection
from resources.settings import ExternalUids
from selection.recipes.recipe import UID_LIST_ASSETS, is_uid_list_asset


def choose_again(
    lake: Lake, record: Mapping[str, Any], folder: Path, sets: Mapping[str, pa.Table] | None = None
) -> Path:
    """Choose a version's rows again from the files in a lake.

    Args:
        lake: where the scores lie.
        record: the version's lineage record.
        folder: where `manifest.parquet` and `subset.npy` are written; it is made.
        sets: the uids of each recipe and uid list that the recipe reads, by name; without them those that lie beside
            the version in the lake.

    Returns:
        The folder.

    Raises:
        LakeError: a file is no longer the one that the version was chosen from, or what was chosen differs from
            the version. The message names every difference.
    """
    _check_format(record)
    settings = ProjectSettings.model_validate({**record["project"], "lake": str(lake.root)})
    name = record["recipe"]
    recipe = settings.recipes[name]
    _refuse(record, _other_files(lake, record["shards"]))
    if sets is None:
        sets = {other: Versions(lake, name).read_uids(record["version"], set_file(other)) for other in recipe.sets}
    scores = {score: settings.score_columns[score] for score in recipe.columns().scores}
    folder.mkdir(parents=True, exist_ok=True)
    with chosen(lake, name, recipe, scores, record["shards"], sets) as (selection, _):
        found = write_selection(manifest(selection), folder / "manifest.parquet", folder / "subset.npy")
    _refuse(
        record,
        [
            f"{folder / file}: sha256 {found[file]}, not {wanted}"
            for file, wanted in record["files"].items()
            if found[file] != wanted
        ],
    )
    return folder


def rebuild(record: Mapping[str, Any], folder: Path) -> Path:
    """Make a version again from the pool: every row, embedding, draw and score that it rests on, and the choice.

    Needs the pool, the models, the targets and the uid list where the record says, and nothing else. What was made
    before a run was killed is not made again.

    Args:
        record: the version's lineage record.
        folder: gets `project.yaml`, `lake/`, `manifest.parquet` and `subset.npy`; for a recipe that rests on
            another, `sets/<recipe>/` holds the same of that one.

    Returns:
        The folder.

    Raises:
        LakeError: something is no longer what it was; the message names it.
    """
    _check_format(record)
    folder.mkdir(parents=True, exist_ok=True)
    named = [record["source"], *record["sets"].values()]
    lists = record["project"].get("external_uids", {})
    sets = {read["name"]: _set_again(read, folder, lists) for read in named if read["kind"] != "pool"}
    config = folder / "project.yaml"
    config.write_text(yaml.safe_dump({**record["project"], "lake": str(folder / "lake")}), encoding="utf-8")
    project = _Recorded(load_settings(config), config)
    _refuse(
        record,
        [
            f"encoder {name} is {project.encoder(name).identity()}, not {identity}"
            for name, identity in record["encoders"].items()
            if project.encoder(name).identity() != identity
        ],
    )
    made_from = {
        asset: read["provenance"]["inputs"]
        for asset, read in record["inputs"].items()
        if asset.split("/")[0] in FROM_SHARDS and GIVEN not in read["provenance"]["inputs"]
    }
    begun = [
        f"{asset} began with {name}" for asset, read in made_from.items() for name in read if name.startswith("subset/")
    ]
    begun += [f"{asset} began with {read['of']}" for asset, read in record["scores"].items() if read.get("of")]
    _refuse(
        record,
        [f"{begin}, which `rebuild` does not make first. Remedy: `choose_again` in its own lake" for begin in begun],
    )
    draws = {asset: {shard: read[shard] for shard in read if "/" not in shard} for asset, read in made_from.items()}
    project.only = {*record["shards"], *(shard for drawn in draws.values() for shard in drawn)}
    gone = project.only - set(project.listing())
    _refuse(record, [f"the pool has no shard {shard} any more" for shard in sorted(gone)])
    needed = {"raw_pool", *record["inputs"], *record["scores"], *(f"embeddings/{e}" for e in record["encoders"])}
    nodes = {node.key: node for node in build_graph(project).nodes}
    for node in nodes.values():
        if node.key not in needed:
            continue
        if isinstance(node, ShardAsset):
            wholes = (node.key.replace("embeddings", whole) for whole in FROM_SHARDS)
            drawn = {shard: read for whole in wholes for shard, read in draws.get(whole, {}).items()}
            searches = [key for key in draws if key.startswith("duplicate_search/") and _reads(nodes, key, node.key)]
            searched = {shard for key in searches for shard in draws[key]}
            shards = project.only if node.key == "raw_pool" else {*record["shards"], *drawn, *searched}
            _make_shards(project, node, sorted(shards))
            wanted = {s: {node.key: read[node.key]} for s, read in record["shards"].items() if node.key in read}
            of_draws = {shard: {node.key: fingerprint} for shard, fingerprint in drawn.items()}
            _refuse(record, _other_files(project.lake, {**wanted, **of_draws}))
        else:
            _make_whole(project, node, draws.get(node.key))
            _refuse(record, _other_files(project.lake, {None: {node.key: record["inputs"][node.key]["fingerprint"]}}))
    return choose_again(project.lake, record, folder, sets)


def _reads(nodes: Mapping[str, ShardAsset | WholeAsset], key: str, other: str) -> bool:
    """Tell whether an asset is made from another one, or from what is made from it."""
    return key in nodes and any(dep == other or _reads(nodes, dep, other) for dep in nodes[key].deps)


class _Recorded(Project):
    """A project that sees some of its pool's shards, such as those that negatives were drawn from.

    Attributes:
        only: these shards; None for all.
    """

    only: Collection[str] | None = None

    def listing(self) -> dict[str, str]:
        """Give the shards and their fingerprints."""
        found = super().listing()
        return found if self.only is None else {shard: found[shard] for shard in found if shard in self.only}


def _set_again(read: Mapping[str, Any], folder: Path, lists: Mapping[str, Any]) -> pa.Table:
    if read["kind"] == "recipe":
        again = rebuild(read["record"], folder / "sets" / read["name"])
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


def _make_shards(project: Project, node: ShardAsset, shards: Sequence[str]) -> None:
    due = {shard: node.provenance(shard) for shard in shards if not node.is_fresh(project, shard)}
    for shard, outcome in node.compute(list(due)) if due else ():
        if isinstance(outcome, Exception):
            raise outcome
        project.lake.write(outcome.table, due[shard], content=outcome.content, summary=outcome.summary)


def _make_whole(project: _Recorded, node: WholeAsset, drawn: Collection[str] | None) -> None:
    """Make an unpartitioned asset; negatives from the shards that they were drawn from, whichever have come since."""
    everything = project.only
    project.only = everything if drawn is None else drawn
    if not node.is_fresh(project):
        wanted = node.provenance(False)
        result = node.compute()
        project.lake.write(result.table, wanted, content=result.content, summary=result.summary)
    project.only = everything


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
        f"subset/{record['recipe']} {record['version']} can't be made again as it was:\n"
        + "\n".join([*found[:20], *more, *beside])
    )
