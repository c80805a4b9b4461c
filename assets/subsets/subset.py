"""`subset/<recipe>`: the samples that a recipe selects, with the reasons and the inputs. Every materialization is kept.

A subset is selected from the shards whose scores are complete and belong together; the lineage record lists the other
shards with the reason.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import numpy as np
import pyarrow as pa

from assets.base.checks import CheckFailed, check_results, log_checks
from assets.base.contact_sheets import escaped
from assets.base.context import Context, Snapshot
from assets.base.freshness import newest_version, shard_inputs
from assets.base.keys import asset_key
from assets.base.results import NotReady
from assets.base.runtime import REQUIRED_RESOURCES, run_context
from assets.base.score_kind import Scores
from assets.base.selection_table import CachedTable, open_selection
from assets.base.upstream_checks import is_any_due, run_due_checks, upstream, verdicts, warning_text, warnings_of
from assets.subsets.checks import duplicate_warnings, examine_before_the_record, examine_stored, specs
from assets.subsets.funnel import funnel_markdown
from assets.subsets.lineage import lineage_record
from assets.subsets.report import is_reported, report_metadata, write_report
from core.hashing import digest, sha256
from core.links import browse_link
from core.sql import quoted
from core.uids import parse_uids, subset_array, subset_words
from resources.lake.files import Lake
from resources.lake.versions import Manifest, Version, Versions, set_file, step_file
from selection.recipes.execute import Selection, set_column
from selection.recipes.matching import CONCEPTS
from selection.recipes.model import POOL
from selection.recipes.recipe import Recipe, is_uid_list_asset, set_kind

CODE_VERSION = "2"
SHOWN = 150  # input files in the event, which has room for 256 KB of pictures and tables


@dataclass(frozen=True)
class Inputs:
    """The inputs that a subset would be selected from now.

    Attributes:
        shards: for each usable shard, the fingerprints of its files, by asset.
        missing: for each other shard, the reason.
        source: kind, name and fingerprint of the set that the recipe starts from.
        sets: the same of every other recipe and uid list that it reads, `from` included, by name.
        tables: the fingerprint of each unpartitioned asset that a step reads.
    """

    shards: Mapping[str, Mapping[str, str]]
    missing: Mapping[str, str]
    source: Mapping[str, str]
    sets: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, str]

    def fingerprint(self, recipe: Recipe) -> str:
        """Return the fingerprint of the subset that they lead to."""
        of_steps = {name: dict(read) for name, read in self.sets.items() if name != recipe.source}
        return digest(
            {
                "code_version": CODE_VERSION,
                "recipe": recipe.definition(),
                "shards": {shard: dict(read) for shard, read in self.shards.items()},
                "source": dict(self.source),
                **({"sets": of_steps} if of_steps else {}),
                **({"tables": dict(self.tables)} if self.tables else {}),
            }
        )


@dataclass(frozen=True, eq=False)
class SubsetAsset:
    """A recipe's subset.

    Attributes:
        recipe: name of the recipe.
        model: the recipe.
        scores: asset and column of each score that it reads.
        assets: all assets of the project, by key.
        definition: the Dagster asset.
    """

    recipe: str
    model: Recipe
    scores: Mapping[str, tuple[str, str]]
    assets: Mapping[str, Any]
    definition: dg.AssetsDefinition
    partitioned: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """`subset/<recipe>`."""
        return f"subset/{self.recipe}"

    @property
    def deps(self) -> tuple[str, ...]:
        """Keys of the assets it reads."""
        return _deps(self.model, self.scores)

    @cached_property
    def upstream(self) -> list[str]:
        """Keys of everything it depends on."""
        return upstream(self.key, self.assets)

    def warnings(self, lake: Lake) -> list[dict[str, Any]]:
        """List the warnings of the newest version's own checks, as `warnings_of` does."""
        current = Versions(lake, self.recipe).current()
        return [] if current is None else duplicate_warnings(self.key, current.lineage["source"]["duplicates"])

    def has_due_checks(self, snapshot: Snapshot) -> bool:
        """Check whether a run is to measure something on demand, such as the drift of negatives."""
        return is_any_due(snapshot, self.assets, self.upstream)

    def inputs(self, snapshot: Snapshot, only: Collection[str] | None = None) -> Inputs:
        """Return the inputs that the subset would be selected from now.

        Args:
            snapshot: the project's inputs.
            only: the shards to look at; by default all.

        Raises:
            NotReady: no shard is complete, or another set is missing.
        """
        shards: dict[str, dict[str, str]] = {}
        missing: dict[str, str] = {}
        score_assets = sorted({asset for asset, _ in self.scores.values()})
        for shard in sorted(snapshot.listing if only is None else snapshot.listing.keys() & set(only)):
            try:
                shards[shard] = shard_inputs(snapshot, shard, score_assets, self.assets)
            except NotReady as error:
                missing[shard] = str(error)
        if not shards:
            reasons = "; ".join(sorted(set(missing.values()))[:3])
            raise NotReady(f"no shard has all that the recipe reads: {reasons}")
        sets = {name: self._set(snapshot, name) for name in self.model.sets}
        tables = {key: self.assets[key].fingerprint(snapshot) for key in self.model.tables}
        return Inputs(shards, missing, sets.get(self.model.source, {"kind": "pool", "name": POOL}), sets, tables)

    def _set(self, snapshot: Snapshot, name: str) -> dict[str, str]:
        """Return kind, name and fingerprint of another recipe's subset or of a uid list."""
        context = snapshot.context
        if set_kind(name) == "recipe":
            version = Versions(context.lake, name).current()
            if version is None:
                raise NotReady(f"subset/{name} is not there yet. Remedy: materialize it first")
            fingerprint = version.lineage["fingerprint"]
            return {"kind": "recipe", "name": name, "version": version.name, "fingerprint": fingerprint}
        if is_uid_list_asset(name):
            return {"kind": "uids", "name": name, "fingerprint": self.assets[name].fingerprint(snapshot)}
        path = _uid_list(context, name)
        if not path.is_file():
            raise NotReady(f"{path}: no such uid list. Remedy: correct the recipe, or put the file there")
        return {"kind": "uids", "name": name, "fingerprint": sha256(path)}

    def is_fresh(self, snapshot: Snapshot) -> bool:
        """Check whether the newest version is the one that a run would write; False also when inputs are missing.

        Raises:
            DamagedError: its record is damaged.
        """
        current = Versions(snapshot.context.lake, self.recipe).current()
        if current is None:
            return False
        try:
            return bool(current.lineage["fingerprint"] == self.inputs(snapshot).fingerprint(self.model))
        except NotReady:
            return False

    def has_report(self, lake: Lake) -> bool:
        """Check whether the newest version has its report; a run that was ended early may have left it out."""
        current = Versions(lake, self.recipe).current()
        return current is not None and is_reported(lake, current)

    def fingerprint(self, snapshot: Snapshot) -> str:
        """Return the fingerprint of the newest version, for an asset that reads it.

        Raises:
            NotReady: there is none, or it is out of date.
        """
        fingerprint: str = newest_version(snapshot, self).lineage["fingerprint"]
        return fingerprint


def _deps(recipe: Recipe, scores: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    score_assets = sorted({asset for asset, _ in scores.values()})
    lists = [other for other in recipe.sets if is_uid_list_asset(other)]
    return ("raw_pool", *score_assets, *recipe.tables, *lists, *(f"subset/{other}" for other in recipe.recipes))


def subset(project: Context, name: str, scores: Scores, assets: Mapping[str, Any], cached: CachedTable) -> SubsetAsset:
    """Return the asset `subset/<recipe>` of a project.

    Args:
        project: the project.
        name: the recipe's name.
        scores: the project's scores.
        assets: all assets of the project, by key; filled in by the caller.
        cached: the table to select from, shared by all recipes.
    """
    recipe = project.settings.recipes[name]
    places = scores.places(recipe.columns().scores)
    key = f"subset/{name}"

    @dg.asset(
        key=asset_key(key),
        deps=[asset_key(dep) for dep in _deps(recipe, places)],
        code_version=CODE_VERSION,
        group_name="subsets",
        kinds={"duckdb", "parquet"},
        check_specs=specs(key),
        description="\n\n".join(filter(None, [recipe.description, *(f"- {step.text}" for step in recipe.steps)])),
        metadata={"recipe": dg.MetadataValue.json(recipe.definition())},
        required_resource_keys=REQUIRED_RESOURCES,
    )
    def body(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        snapshot = Snapshot(run_context(context, project))
        try:
            inputs = asset.inputs(snapshot)
        except NotReady as error:
            raise dg.Failure(f"{key}: {error}", allow_retries=False) from error
        lake = snapshot.context.lake
        versions = Versions(lake, name)
        versions.set_damaged_aside()
        run_due_checks(context, snapshot, assets, asset.upstream)
        current = versions.current()
        if current is None or current.lineage["fingerprint"] != inputs.fingerprint(recipe):
            try:
                current = _select(snapshot.context, asset, inputs, cached)
            except CheckFailed as error:
                log_checks(context, key, None, error.findings)
                raise dg.Failure(str(error), allow_retries=False) from error
            context.resources.run.written[key] += 1
        elif not is_reported(lake, current):
            sets = {other: set_uids(snapshot.context, read) for other, read in inputs.sets.items()}
            with open_selection(lake, name, recipe, places, inputs.shards, sets, cached) as (selection, _):
                write_report(snapshot.context, current, selection)
        return dg.MaterializeResult(
            metadata=_metadata(current)
            | _check_metadata(lake, asset, current)
            | report_metadata(snapshot.context, current),
            check_results=check_results(context, examine_stored(lake, current)),
            data_version=dg.DataVersion(current.lineage["fingerprint"]),
        )

    asset = SubsetAsset(name, recipe, places, assets, body)
    return asset


def _uid_list(context: Context, name: str) -> Path:
    return context.config.resolve().parent / name


def _select(context: Context, asset: SubsetAsset, inputs: Inputs, cached: CachedTable) -> Version:
    """Run the recipe and write a new version."""
    name, recipe, lake = asset.recipe, asset.model, context.lake
    sets = {other: set_uids(context, read) for other, read in inputs.sets.items()}
    with open_selection(lake, name, recipe, asset.scores, inputs.shards, sets, cached) as (selection, duplicates):
        recorded = {other: _recorded(context, read, sets[other], selection) for other, read in inputs.sets.items()}
        lineage = lineage_record(
            context,
            name,
            selection,
            assets=asset.assets,
            shards=inputs.shards,
            missing=inputs.missing,
            source=recorded.pop(recipe.source, inputs.source),
            sets=recorded,
            duplicates=duplicates,
            fingerprint=inputs.fingerprint(recipe),
            code_version=CODE_VERSION,
        )
        lineage["warnings"] = [
            *warnings_of(lake, asset.assets, asset.upstream, inputs.shards),
            *duplicate_warnings(asset.key, duplicates),
        ]
        lineage["drift"] = verdicts(lake, asset.assets, asset.upstream)
        version = Versions(lake, name).write(
            manifest(selection), lineage, lambda written: examine_before_the_record(lake, written), sets
        )
        write_report(context, version, selection)
        return version


def set_uids(context: Context, read: Mapping[str, str]) -> pa.Table:
    """Return f0 and f1 of a set that a recipe reads, as `Inputs.sets` describes it."""
    if read["kind"] == "recipe":
        versions = Versions(context.lake, read["name"])
        return versions.read_uids(versions.read(read["version"]))
    if is_uid_list_asset(read["name"]):
        return context.lake.read(read["name"], columns=["f0", "f1"])
    return read_uid_list(_uid_list(context, read["name"]))


def _recorded(context: Context, read: Mapping[str, str], uids: pa.Table, selection: Selection) -> dict[str, Any]:
    """Return a set as the lineage record holds it: its origin, and how many of its uids are in the pool."""
    column = quoted(set_column(read["name"]))
    ((found,),) = selection.con.execute(f"SELECT count(*) FROM {selection.source} WHERE {column}").fetchall()
    recorded: dict[str, Any] = {**read, "uids": uids.num_rows, "in_pool": found, "file": set_file(read["name"])}
    if read["kind"] == "recipe":
        return {**recorded, "record": Versions(context.lake, read["name"]).read(read["version"]).lineage}
    if is_uid_list_asset(read["name"]):
        return recorded
    return {**recorded, "path": str(_uid_list(context, read["name"]))}


def manifest(selection: Selection) -> Manifest:
    """Return a selection as it is written; valid as long as the selection is."""
    return Manifest(
        rows=selection.rows,
        reader=selection.manifest().to_arrow_reader,
        ranks=selection.ranks(),
        samples=selection.samples,
        tables={
            step_file(number, name): selection.con.sql(query).to_arrow_reader
            for number, name, query in [
                *((number, selection.steps[number - 1].kind, query) for number, query in selection.tables.items()),
                *((number, CONCEPTS, query) for number, query in selection.concepts.items()),
            ]
        },
    )


def read_uid_list(path: Path) -> pa.Table:
    """Read a uid list: columns f0 and f1, sorted, each uid once.

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
    """Return the metadata of a version: rows, funnel, and the shards that were left out."""
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
        "browse": dg.MetadataValue.md(_browse_links(version)),
        **_upstream(lineage),
    }
    for asset, counted in lineage.get("rows_in_targets", {}).items():
        metadata[f"rows_in_target/{asset}"] = counted["rows"]
    if lineage["shards_missing"]:
        listed = [f"- {shard}: {why}" for shard, why in list(lineage["shards_missing"].items())[:50]]
        metadata["shards_missing_why"] = dg.MetadataValue.md("\n".join(listed))
    return metadata


def _browse_links(version: Version) -> str:
    """Return links to the version's rows, to those that each step dropped, and to thresholds to try."""
    named = {"recipe": version.recipe, "version": version.name}
    links = {"kept": browse_link(**named)}
    for step in version.lineage["steps"]:
        if step["kept"] < step["entered"]:
            number = step["step"]
            links[f"dropped at step {number}"] = browse_link(**named, member="dropped", step=number)
    links["what if"] = browse_link("/what-if", recipe=version.recipe)
    return " · ".join(f"[{text}]({link})" for text, link in links.items())


def _check_metadata(lake: Lake, asset: SubsetAsset, version: Version) -> dict[str, Any]:
    """Return the present warnings about everything that a version depends on, and the drift of its negatives."""
    metadata: dict[str, Any] = {}
    found = warnings_of(lake, asset.assets, asset.upstream, version.lineage["shards"])
    if lines := [f"- {escaped(warning_text(entry))}" for entry in [*found, *asset.warnings(lake)]]:
        metadata["warnings"] = dg.MetadataValue.md("\n".join(lines))
    for key, finding in verdicts(lake, asset.assets, asset.upstream).items():
        metadata[f"drift/{key}"] = finding["figures"].get("verdict", finding["why"])
    return metadata


def _upstream(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return links to the assets that a version read, and the fingerprint of each of their files.

    Fingerprints are the data versions of those assets' own events. The table is cut to keep the event small.
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
