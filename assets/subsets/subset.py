"""`subset/<recipe>`: the samples that a recipe selects, why, and from what. Every materialization stays.

The subset is built from the shards whose scores are complete and belong together; the others are named in the
lineage record with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from assets.base.checks import CheckFailed, asset_key, results, tell
from assets.base.partitioned import NotReady, ShardAsset, once
from assets.base.selection_table import SharedSource, chosen
from assets.project import Project
from assets.scores.external import fresh_uids
from assets.subsets.checks import examine_before_the_record, examine_stored, specs
from assets.subsets.funnel import funnel_markdown
from assets.subsets.lineage import lineage_record
from assets.subsets.report import report_metadata, write_report
from core.hashing import digest, sha256
from core.sql import quoted
from core.uids import parse_uids, subset_array, subset_words
from resources.lake.versions import Manifest, Version, Versions, set_file, step_file
from selection.recipes.execute import Selection, set_column
from selection.recipes.recipe import Recipe, is_uid_list_asset, set_kind
from selection.recipes.steps import POOL

CODE_VERSION = "2"
SHOWN = 150  # files that were read, in the event log, which has room for 256 KB of pictures and tables


@dataclass(frozen=True)
class Inputs:
    """What a subset would be built from now.

    Attributes:
        shards: for each usable shard, the fingerprints of what is read of it, by asset.
        missing: for each other shard, the reason.
        source: kind, name and fingerprint of what the recipe begins with.
        sets: the same of every other recipe and uid list that it reads, `from` included, by name.
    """

    shards: Mapping[str, Mapping[str, str]]
    missing: Mapping[str, str]
    source: Mapping[str, str]
    sets: Mapping[str, Mapping[str, str]]

    def fingerprint(self, recipe: Recipe) -> str:
        """Give the fingerprint of the subset that they lead to."""
        of_steps = {name: dict(read) for name, read in self.sets.items() if name != recipe.source}
        return digest(
            {
                "code_version": CODE_VERSION,
                "recipe": recipe.definition(),
                "shards": {shard: dict(read) for shard, read in self.shards.items()},
                "source": dict(self.source),
                **({"sets": of_steps} if of_steps else {}),
            }
        )


@dataclass(frozen=True)
class SubsetAsset:
    """A recipe's subset.

    Attributes:
        key: `subset/<recipe>`.
        deps: keys of the assets it reads.
        recipe: name of the recipe.
        inputs: gives what the subset would be built from now; raises NotReady.
        definition: the Dagster asset.
    """

    key: str
    deps: tuple[str, ...]
    recipe: str
    model: Recipe
    inputs: Any
    definition: dg.AssetsDefinition

    def is_fresh(self, project: Project) -> bool:
        """Tell whether the newest version is what a run would write; False also when inputs are missing."""
        current = Versions(project.lake, self.recipe).current()
        if current is None:
            return False
        try:
            return bool(current.lineage["fingerprint"] == self.inputs().fingerprint(self.model))
        except NotReady:
            return False


def newest(project: Project, subset: SubsetAsset) -> Version:
    """Give a subset's newest version; within `Project.at_rest` it is asked once whether it is up to date.

    Raises:
        NotReady: it is not there, or out of date.
    """

    def look() -> Version:
        current = Versions(project.lake, subset.recipe).current()
        if current is None or not subset.is_fresh(project):
            raise NotReady(f"{subset.key} is not there yet, or out of date. Remedy: materialize it first")
        return current

    return once(project, subset.key, look)


def subset(project: Project, name: str, sharded: Mapping[str, ShardAsset], shared: SharedSource) -> SubsetAsset:
    """Make the asset `subset/<recipe>`.

    Args:
        project: the project.
        name: the recipe's name.
        sharded: the project's assets of shards, by key.
        shared: the rows to choose from, for all recipes of a project.
    """
    recipe = project.settings.recipes[name]
    key = f"subset/{name}"
    scores = {score: project.settings.score_columns[score] for score in recipe.columns().scores}
    score_assets = sorted({asset for asset, _ in scores.values()})
    lists = [other for other in recipe.sets if is_uid_list_asset(other)]
    deps = ["raw_pool", *score_assets, *lists, *(f"subset/{other}" for other in recipe.recipes)]

    def inputs() -> Inputs:
        return _inputs(project, recipe, score_assets, sharded)

    @dg.asset(
        key=asset_key(key),
        deps=[asset_key(dep) for dep in deps],
        code_version=CODE_VERSION,
        group_name="subsets",
        kinds={"duckdb", "parquet"},
        check_specs=specs(key),
        description="\n\n".join(filter(None, [recipe.description, *(f"- {step.text}" for step in recipe.steps)])),
        metadata={"recipe": dg.MetadataValue.json(recipe.definition())},
    )
    def body(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        project.look_again()
        versions = Versions(project.lake, name)
        try:
            found = inputs()
        except NotReady as error:
            raise dg.Failure(f"{key}: {error}", allow_retries=False) from error
        current = versions.current()
        if current is None or current.lineage["fingerprint"] != found.fingerprint(recipe):
            try:
                current = _choose(project, name, recipe, scores, found, shared)
            except CheckFailed as error:
                tell(context, key, None, error.findings)
                raise dg.Failure(str(error), allow_retries=False) from error
        return dg.MaterializeResult(
            metadata=_metadata(current) | report_metadata(project, current),
            check_results=results(context, examine_stored(project.lake, current)),
            data_version=dg.DataVersion(current.lineage["fingerprint"]),
        )

    return SubsetAsset(key, tuple(deps), name, recipe, inputs, body)


def _inputs(project: Project, recipe: Recipe, score_assets: Sequence[str], sharded: Mapping[str, ShardAsset]) -> Inputs:
    shards: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    with project.at_rest():
        for shard in sorted(project.listing()):
            try:
                shards[shard] = shard_inputs(project, shard, score_assets, sharded)
            except NotReady as error:
                missing[shard] = str(error)
    if not shards:
        reasons = "; ".join(sorted(set(missing.values()))[:3])
        raise NotReady(f"no shard has all that the recipe reads: {reasons}")
    sets = {name: _set(project, name) for name in recipe.sets}
    return Inputs(shards, missing, sets.get(recipe.source, {"kind": "pool", "name": POOL}), sets)


def shard_inputs(
    project: Project, shard: str, score_assets: Sequence[str], sharded: Mapping[str, ShardAsset]
) -> dict[str, str]:
    """Give the fingerprints of what is read of a shard, by asset.

    Args:
        project: the project.
        shard: the shard.
        score_assets: keys of the assets that are read besides `raw_pool`.
        sharded: the project's assets of shards, by key.

    Raises:
        NotReady: one of them, or the embeddings that it is made from, is not there or out of date.
    """
    read = {}
    pool = project.lake.stored("raw_pool", shard)
    if pool is None:
        raise NotReady("raw_pool is not there yet. Remedy: materialize it first")
    if not sharded["raw_pool"].is_fresh(project, shard):
        raise NotReady("raw_pool is out of date: the shard changed. Remedy: materialize it")
    read["raw_pool"] = pool.fingerprint
    for asset in score_assets:
        stored = project.lake.stored(asset, shard)
        if stored is None:
            raise NotReady(f"{asset} is not there yet. Remedy: materialize it first")
        embeddings = [dep for dep in sharded[asset].deps if dep.startswith("embeddings/")]
        for upstream in (*embeddings, asset):
            if not sharded[upstream].is_fresh(project, shard):
                raise NotReady(f"{upstream} is out of date. Remedy: materialize it")
        read[asset] = stored.fingerprint
    return read


def _set(project: Project, name: str) -> dict[str, str]:
    """Give kind, name and fingerprint of another recipe's subset or of a uid list."""
    if set_kind(name) == "recipe":
        version = Versions(project.lake, name).current()
        if version is None:
            raise NotReady(f"subset/{name} is not there yet. Remedy: materialize it first")
        fingerprint = version.lineage["fingerprint"]
        return {"kind": "recipe", "name": name, "version": version.name, "fingerprint": fingerprint}
    if is_uid_list_asset(name):
        return {"kind": "uids", "name": name, "fingerprint": fresh_uids(project, name)}
    path = _uid_list(project, name)
    if not path.is_file():
        raise NotReady(f"{path}: no such uid list. Remedy: correct the recipe, or put the file there")
    return {"kind": "uids", "name": name, "fingerprint": sha256(path)}


def _uid_list(project: Project, name: str) -> Path:
    return project.config.resolve().parent / name


def _choose(
    project: Project,
    name: str,
    recipe: Recipe,
    scores: Mapping[str, tuple[str, str]],
    inputs: Inputs,
    shared: SharedSource,
) -> Version:
    """Run the recipe and write a new version."""
    sets = {other: _uids(project, read) for other, read in inputs.sets.items()}
    with chosen(project.lake, name, recipe, scores, inputs.shards, sets, shared) as (selection, duplicates):
        told = {other: _told(project, read, sets[other], selection) for other, read in inputs.sets.items()}
        lineage = lineage_record(
            project,
            name,
            selection,
            shards=inputs.shards,
            missing=inputs.missing,
            source=told.pop(recipe.source, inputs.source),
            sets=told,
            duplicates=duplicates,
            fingerprint=inputs.fingerprint(recipe),
            code_version=CODE_VERSION,
        )
        version = Versions(project.lake, name).write(
            manifest(selection), lineage, lambda written: examine_before_the_record(project.lake, written), sets
        )
        write_report(project, version, selection)
        return version


def _uids(project: Project, read: Mapping[str, str]) -> pa.Table:
    if read["kind"] == "recipe":
        return Versions(project.lake, read["name"]).read_uids(read["version"])
    if is_uid_list_asset(read["name"]):
        return project.lake.read(read["name"], columns=["f0", "f1"])
    return read_uid_list(_uid_list(project, read["name"]))


def _told(project: Project, read: Mapping[str, str], uids: pa.Table, selection: Selection) -> dict[str, Any]:
    """Give what the lineage record says of a set: where it came from, and how much of it is in the pool."""
    column = quoted(set_column(read["name"]))
    ((found,),) = selection.con.execute(f"SELECT count(*) FROM {selection.source} WHERE {column}").fetchall()
    told: dict[str, Any] = {**read, "uids": uids.num_rows, "in_pool": found, "file": set_file(read["name"])}
    if read["kind"] == "recipe":
        return {**told, "record": Versions(project.lake, read["name"]).read(read["version"]).lineage}
    if is_uid_list_asset(read["name"]):
        return told
    return {**told, "path": str(_uid_list(project, read["name"]))}


def manifest(selection: Selection) -> Manifest:
    """Give a selection as it is written; valid as long as the selection."""
    return Manifest(
        rows=selection.rows,
        reader=selection.manifest().to_arrow_reader,
        ranks=selection.ranks(),
        samples=selection.samples,
        tables={
            step_file(number, selection.steps[number - 1].kind): selection.con.sql(query).to_arrow_reader
            for number, query in selection.tables.items()
        },
    )


def read_uid_list(path: Path) -> pa.Table:
    """Read a uid list: columns f0 and f1, sorted, without repeats.

    Raises:
        ValueError: the file is not DataComp's array, or a line is not a uid; the message names the file.
    """
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                uids = np.lib.format.read_array(file, allow_pickle=False)
        else:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            uids = subset_array(*parse_uids([line for line in lines if line]))
        f0, f1 = subset_words(np.unique(uids))
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: not a uid list: {error}. Remedy: an .npy of dtype u8,u8, or a .txt of one uid a line"
        ) from error
    if not len(f0):
        raise ValueError(f"{path}: this uid list is empty. Remedy: another list, or leave the recipe out")
    return pa.table({"f0": f0, "f1": f1})


def _metadata(version: Version) -> dict[str, Any]:
    """Give what the UI shows of a version: rows, funnel, and the shards that are not in it."""
    lineage = version.lineage
    metadata: dict[str, Any] = {
        "dagster/row_count": lineage["rows"],
        "samples": version.samples,
        "version": version.name,
        "fraction_of_source": lineage["rows"] / lineage["source"]["rows"],
        "funnel": dg.MetadataValue.md(funnel_markdown(lineage)),
        "shards": len(lineage["shards"]),
        "shards_missing": len(lineage["shards_missing"]),
        "duplicates_left_out": lineage["source"]["duplicates"],
        "folder": dg.MetadataValue.path(version.folder),
        "lineage": dg.MetadataValue.path(f"{version.folder}/lineage.json"),
        **_upstream(lineage),
    }
    if lineage["shards_missing"]:
        listed = [f"- {shard}: {why}" for shard, why in list(lineage["shards_missing"].items())[:50]]
        metadata["shards_missing_why"] = dg.MetadataValue.md("\n".join(listed))
    return metadata


def _upstream(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Give links to the assets that a version read, and the fingerprint of each file of theirs.

    Fingerprints are the data versions of those assets' own events. The table is cut, so that the event stays small.
    """
    files = [(asset, "", read["fingerprint"]) for asset, read in lineage["inputs"].items()]
    for read in (lineage["source"], *lineage["sets"].values()):
        if read["kind"] == "recipe":
            files.append((f"subset/{read['name']}", read["version"], read["fingerprint"]))
        elif is_uid_list_asset(read["name"]):
            files.append((read["name"], "", read["fingerprint"]))
    files += [(asset, shard, fp) for shard, read in lineage["shards"].items() for asset, fp in read.items()]
    links = {f"read/{asset}": dg.MetadataValue.asset(asset_key(asset)) for asset, _, _ in files}
    table = dg.MetadataValue.table(
        [dg.TableRecord({"asset": a, "shard or version": s, "fingerprint": fp}) for a, s, fp in files[:SHOWN]]
    )
    return {"files_read": len(files), f"files_read_first_{SHOWN}": table, **links}
