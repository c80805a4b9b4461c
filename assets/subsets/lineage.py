"""A subset's lineage record: everything that a version was made from, so that it can be understood and made again.

Here: what stands in `lineage.json`. Not here: making a subset (`assets.subsets.subset`) or making it again
(`assets.subsets.reproduction`).
"""

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from assets.base.checks import SUMMARY_KEY
from assets.project import Project, ProjectSettings, json_settings
from resources.lake.files import Stored
from resources.lake.versions import step_file
from selection.recipes.execute import Selection

FORMAT = 3
FROM_SHARDS = ("negatives", "dynamic_rounds", "duplicate_search", "centroids")
"""Assets without partitions that are made from embeddings of shards, which their provenance names."""
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
    project: Project,
    name: str,
    selection: Selection,
    *,
    shards: Mapping[str, Mapping[str, str]],
    missing: Mapping[str, str],
    source: Mapping[str, Any],
    sets: Mapping[str, Mapping[str, Any]],
    duplicates: int,
    fingerprint: str,
    code_version: str,
) -> dict[str, Any]:
    """Give the lineage record of a selection that was just made from the lake.

    Args:
        project: the project.
        name: the recipe's name.
        selection: what was chosen.
        shards: for each shard that was read, the fingerprints of its files by asset.
        missing: for each other shard, why it was left out.
        source: what the recipe began with; for another recipe's subset, with its own record.
        sets: the same of each recipe and uid list that a step names, by name.
        duplicates: rows left out because their uid came before.
        fingerprint: the subset's.
        code_version: of the selecting code.
    """
    settings = project.settings
    recipe = settings.recipes[name]
    scores = sorted(settings.assets_of(name))
    any_shard = next(iter(shards))
    files = {asset: _stored(project, asset, any_shard) for asset in scores}
    for captions in {f"captions/{asset.split('/')[1]}" for asset in scores if asset.startswith("sieve/")}:
        files[captions] = _stored(project, captions, any_shard)
    read = {name for stored in files.values() for name in stored.provenance.inputs}
    encoders = sorted(name.removeprefix("embeddings/") for name in read if name.startswith("embeddings/"))
    wholes = {
        asset: _stored(project, asset)
        for asset in sorted(read)
        if asset.split("/")[0] in ("target_embeddings", "external_files", *FROM_SHARDS)
    }
    upstream = {asset: _stored(project, asset, any_shard) for asset in ("raw_pool", *_embeddings(encoders))}
    return {
        "format": FORMAT,
        "recipe": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "fingerprint": fingerprint,
        "definition": recipe.definition(),
        "source": {**source, "rows": selection.source_rows, "duplicates": duplicates},
        "sets": {other: dict(read) for other, read in sets.items()},
        "steps": told_steps(selection),
        "rows": selection.rows,
        "samples": selection.samples,
        "shards": {shard: dict(read) for shard, read in shards.items()},
        "shards_missing": dict(missing),
        "encoders": {encoder: project.encoder(encoder).identity() for encoder in encoders},
        "temperatures": {e: project.temperature(e) for e in encoders if f"neg_clip_loss/{e}" in scores},
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


def told_steps(selection: Selection) -> list[dict[str, Any]]:
    """Give what a record says of each step: its report, and the file of the version that explains it, if one does."""
    return [
        {**report.as_dict(), "file": step_file(report.step, report.kind) if report.step in selection.tables else None}
        for report in selection.steps
    ]


def packages() -> dict[str, str]:
    """Give the versions of Python and of every package that a subset's bytes may depend on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra
            found[package] = importlib.metadata.version(package)
    return {**found, "python": platform.python_version()}


def project_document(settings: ProjectSettings, name: str) -> dict[str, Any]:
    """Give the part of a project's YAML that a recipe needs, with absolute paths and without the lake.

    All encoders stay, because the pool's readers check the embeddings of every one that is precomputed.
    """
    recipes, waiting = {}, [name]
    while waiting:
        recipe = waiting.pop()
        recipes[recipe] = settings.recipes[recipe]
        begins = [begin for asset, begin in settings.begins.items() if asset in settings.assets_of(recipe)]
        waiting += [other for other in (*recipes[recipe].recipes, *begins) if other not in recipes]
    wanted = {asset for recipe in recipes for asset in settings.assets_of(recipe)}
    norm_sim = {
        encoder: kept
        for encoder, targets in settings.norm_sim.items()
        if (kept := [target for target in targets if f"norm_sim/{encoder}/{target}" in wanted])
    }
    clusters = {
        encoder: model
        for encoder, model in settings.scores.clusters.items()
        if any(f"clusters/{encoder}/{target}" in wanted for target in model.targets)
    }
    sieve = {
        captioner: [name for name in names if f"sieve/{captioner}/{name}" in wanted]
        for captioner, names in settings.sieve.items()
        if any(f"sieve/{captioner}/{name}" in wanted for name in names)
    }
    return {
        "name": settings.name,
        "pool": json_settings(settings.pool),
        "encoders": {encoder: json_settings(model) for encoder, model in settings.encoders.items()},
        "targets": {
            target: json_settings(model)
            for target, model in settings.targets.items()
            if any(target in targets for targets in norm_sim.values())
            or any(target in model.targets for model in clusters.values())
        },
        "scores": {
            "clip_score": [encoder for encoder in settings.clip_score if f"clip_score/{encoder}" in wanted],
            "neg_clip_loss": {
                encoder: json_settings(model)
                for encoder, model in settings.neg_clip_loss.items()
                if f"neg_clip_loss/{encoder}" in wanted
            },
            "norm_sim": norm_sim,
            "sieve": sieve,
            "hype": {name: json_settings(model) for name, model in settings.hype.items() if f"hype/{name}" in wanted},
            "captions": json_settings(settings.scores.captions)
            if settings.scores.captions is not None and "captions/facts" in wanted
            else None,
            "clusters": {encoder: json_settings(model) for encoder, model in clusters.items()},
            "norm_sim_dynamic": {
                encoder: json_settings(model)
                for encoder, model in settings.norm_sim_dynamic.items()
                if f"norm_sim_dynamic/{encoder}" in wanted
            },
            "near_duplicates": {
                encoder: json_settings(model)
                for encoder, model in settings.near_duplicates.items()
                if f"near_duplicates/{encoder}" in wanted
            },
        },
        "captioners": {captioner: json_settings(settings.captioners[captioner]) for captioner in sieve},
        "text_encoders": {
            name: json_settings(model)
            for name, model in settings.text_encoders.items()
            if any(name in names for names in sieve.values())
        },
        "external_scores": {
            external: json_settings(model)
            for external, model in settings.external_scores.items()
            if f"external_scores/{external}" in wanted
        },
        "external_uids": {
            external: json_settings(model)
            for external, model in settings.external_uids.items()
            if any(f"external_uids/{external}" in model.sets for model in recipes.values())
        },
        "recipes": {recipe: model.definition() for recipe, model in recipes.items()},
    }


def _embeddings(encoders: list[str]) -> list[str]:
    return [f"embeddings/{encoder}" for encoder in encoders]


def _stored(project: Project, asset: str, shard: str | None = None) -> Stored:
    stored = project.lake.stored(asset, shard)
    if stored is None:
        raise ValueError(f"{project.lake.path(asset, shard)} went away while the subset was being made")
    return stored
