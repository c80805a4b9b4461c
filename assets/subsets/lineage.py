"""A subset's lineage record: everything that a version was made from, to understand it and to make it again.

Here: the content of `lineage.json`. Not here: selecting a subset (`assets.subsets.subset`) or reproducing it
(`assets.reproduction`).
"""

import contextlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from assets.base.checks import SUMMARY_KEY
from assets.base.context import Context
from assets.base.score_kind import Scores
from assets.base.settings import ProjectSettings, json_settings
from resources.lake.files import Stored
from resources.lake.versions import step_file
from resources.pools.base import TarPool
from resources.settings import EncoderSettings
from selection.recipes.execute import Selection
from selection.recipes.matching import CONCEPTS

FORMAT = 3
PACKAGES = (
    "clip-data-selection",
    "dagster",
    "duckdb",
    "numpy",
    "open_clip_torch",
    "pillow",
    "pyarrow",
    "safetensors",
    "sentence-transformers",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)


def lineage_record(
    context: Context,
    name: str,
    selection: Selection,
    *,
    assets: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, str]],
    missing: Mapping[str, str],
    source: Mapping[str, Any],
    sets: Mapping[str, Mapping[str, Any]],
    duplicates: int,
    fingerprint: str,
    code_version: str,
) -> dict[str, Any]:
    """Return the lineage record of a selection that was just made from the lake.

    Args:
        context: the project.
        name: the recipe's name.
        selection: the selection.
        assets: all assets of the project, by key.
        shards: for each shard that was read, the fingerprints of its files by asset.
        missing: for each other shard, why it was left out.
        source: the set that the recipe starts from; for another recipe's subset, with its own record.
        sets: the same of each recipe and uid list that a step reads, by name.
        duplicates: rows left out because an earlier row has their uid.
        fingerprint: the subset's.
        code_version: of the selecting code.
    """
    settings = context.settings
    scores = sorted(Scores(settings).of_recipe(name))
    any_shard = next(iter(shards))
    files = {asset: _stored(context, asset, any_shard) for asset in scores}
    # Files by shard that are no scores and that a score reads, such as generated captions.
    further = {dep for asset in scores for dep in assets[asset].deps if assets[dep].partitioned}
    for asset in sorted(further - files.keys()):
        if asset != "raw_pool" and not asset.startswith("embeddings/"):
            files[asset] = _stored(context, asset, any_shard)
    read = {name for stored in files.values() for name in stored.provenance.inputs}
    read = _with_inputs(context, assets, {*read, *settings.recipes[name].tables})
    encoders = sorted(name.removeprefix("embeddings/") for name in read if name.startswith("embeddings/"))
    # Subsets have records of their own, and uid lists stand among the sets.
    unpartitioned = [asset for asset in sorted(read) if _is_unpartitioned(assets, asset)]
    wholes = {asset: _stored(context, asset) for asset in unpartitioned}
    upstream = {
        asset: _stored(context, asset, any_shard) for asset in ("raw_pool", *(f"embeddings/{e}" for e in encoders))
    }
    overlap = _rows_in_targets(context, scores, shards)
    temperatures = {
        asset.partition("/")[2]: stored.provenance.parameters["temperature"]
        for asset, stored in files.items()
        if "temperature" in stored.provenance.parameters
    }
    return {
        "format": FORMAT,
        "recipe": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "fingerprint": fingerprint,
        "definition": settings.recipes[name].definition(),
        "source": {**source, "rows": selection.source_rows, "duplicates": duplicates},
        "sets": {other: dict(read) for other, read in sets.items()},
        "steps": recorded_steps(selection),
        "rows": selection.rows,
        "samples": selection.samples,
        "shards": {shard: dict(read) for shard, read in shards.items()},
        "shards_missing": dict(missing),
        **_shard_groups(context, [*shards, *missing]),
        **({"rows_in_targets": overlap} if overlap else {}),
        "encoders": {encoder: context.models.encoder(encoder).identity() for encoder in encoders},
        "temperatures": temperatures,
        "scores": {asset: dict(stored.provenance.parameters) for asset, stored in files.items()},
        "inputs": {
            asset: {
                "fingerprint": stored.fingerprint,
                "provenance": stored.provenance.as_dict(),
                **{name: value for name, value in stored.summary.items() if name != SUMMARY_KEY},
            }
            for asset, stored in wholes.items()
        },
        "project": project_document(settings, name),
        "code_version": code_version,
        "code_versions": {
            asset: stored.provenance.code_version for asset, stored in {**upstream, **wholes, **files}.items()
        },
        "packages": packages(),
    }


def _shard_groups(context: Context, shards: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the tars of the shards that are groups of tars, under `shard_groups`; nothing without such shards."""
    groups = context.pool.groups if isinstance(context.pool, TarPool) else None
    recorded = {} if groups is None else groups.recorded()
    found = {shard: recorded[shard] for shard in shards if recorded.get(shard, [shard]) != [shard]}
    return {"shard_groups": found} if found else {}


def _rows_in_targets(context: Context, scores: Sequence[str], shards: Collection[str]) -> dict[str, dict[str, int]]:
    """Count the pool's rows that are images of a target set, by the score that compares them to it.

    Files from before the count lack it. They are counted as `shards_not_counted`, and a score whose files all lack it
    is left out.
    """
    found = {}
    for asset in scores:
        counts = [_stored(context, asset, shard).summary.get("rows_in_target") for shard in shards]
        known = [count for count in counts if count is not None]
        if known:
            found[asset] = {"rows": sum(known), "shards_not_counted": len(counts) - len(known)}
    return found


def recorded_steps(selection: Selection) -> list[dict[str, Any]]:
    """Return each step as the record holds it: its report, and the file of the version that explains it, if any."""
    return [
        {
            **report.as_dict(),
            "file": step_file(report.step, report.kind) if report.step in selection.tables else None,
            **({"concepts": step_file(report.step, CONCEPTS)} if report.step in selection.concepts else {}),
        }
        for report in selection.steps
    ]


def packages() -> dict[str, str]:
    """Return the versions of Python and of every package that a subset's bytes may depend on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra
            found[package] = importlib.metadata.version(package)
    return {**found, "python": platform.python_version()}


def project_document(settings: ProjectSettings, name: str) -> dict[str, Any]:
    """Return the part of a project's YAML that a recipe needs, with absolute paths and without the lake.

    All encoders stay, because the pool's readers check the embeddings of every precomputed one. Those that no score of
    the recipe reads stay without the subset that they embed.
    """
    scores = Scores(settings)
    recipes, waiting = {}, [name]
    while waiting:
        recipe = waiting.pop()
        recipes[recipe] = settings.recipes[recipe]
        starts = {scores.starts_from(asset) for asset in scores.of_recipe(recipe)} - {None}
        waiting += [
            other for other in (*recipes[recipe].recipes, *starts) if other is not None and other not in recipes
        ]
    wanted = {asset for recipe in recipes for asset in scores.of_recipe(recipe)}
    uid_lists = {other for model in recipes.values() for other in model.sets}
    document: dict[str, Any] = {
        "name": settings.name,
        "pool": json_settings(settings.pool),
        "encoders": {encoder: _encoder(model, recipes) for encoder, model in settings.encoders.items()},
        "targets": {},
        "scores": {},
        "external_uids": {
            name: json_settings(model)
            for name, model in settings.external_uids.items()
            if f"external_uids/{name}" in uid_lists
        },
        "recipes": {recipe: model.definition() for recipe, model in recipes.items()},
    }
    for kind in settings.kinds:
        for field, value in kind.recorded(settings, wanted).items():
            document[field] = {**document.get(field, {}), **value}
    return document


def _encoder(model: EncoderSettings, recipes: Collection[str]) -> dict[str, Any]:
    found = json_settings(model)
    return found if model.recipe in recipes else {name: value for name, value in found.items() if name != "of"}


def _with_inputs(context: Context, assets: Mapping[str, Any], read: set[str]) -> set[str]:
    """Add the inputs of the unpartitioned files among some assets, and the inputs of those."""
    further = {
        name
        for asset in read
        if _is_unpartitioned(assets, asset)
        for name in _stored(context, asset).provenance.inputs
        if name in assets
    }
    return read if further <= read else _with_inputs(context, assets, read | further)


def _is_unpartitioned(assets: Mapping[str, Any], asset: str) -> bool:
    """Whether an asset is one file of the lake; subsets and uid lists are not."""
    return asset in assets and not assets[asset].partitioned and not asset.startswith(("subset/", "external_uids/"))


def _stored(context: Context, asset: str, shard: str | None = None) -> Stored:
    stored = context.lake.stored(asset, shard)
    if stored is None:
        raise ValueError(f"{context.lake.path(asset, shard)} was removed while the subset was being selected")
    return stored
