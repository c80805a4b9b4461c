"""`hype/<name>`: specificity and agreement of image and caption from hyperbolic embeddings (arXiv 2404.17507)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.columns import Bounds, Column
from assets.base.context import Context, Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Result
from assets.base.score_kind import ScoreKind, recorded_entries
from assets.base.score_tables import CHUNK_ROWS, score_stats, score_table, to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import COSINE_BOUNDS, ZERO_TOLERANCE, rows_aligned, within_bounds
from resources.inputs.external import ExternalError
from resources.inputs.hyperbolic import read_reference, read_shard, reference_file, shard_file
from resources.settings import HypeSettings
from resources.storage import files

if TYPE_CHECKING:
    import torch

ANGLES = (-np.pi / 2 - ZERO_TOLERANCE, np.pi + ZERO_TOLERANCE)


def _column(name: str, description: str, direction: Any, bounds: Bounds) -> Column:
    return Column(name=name, type=pa.float32(), description=description, direction=direction, bounds=bounds)


COLUMNS = (
    _column(
        "hype",
        "Sum of the specificities, minus the distance, plus cosine and cluster term.",
        "larger",
        (-np.inf, np.inf),
    ),
    _column(
        "hype_specificity_image",
        "ε of the image: mean angle outside of the reference captions' cones.",
        "larger",
        ANGLES,
    ),
    _column(
        "hype_specificity_text",
        "ε of the caption: mean angle of the reference images outside of its cone.",
        "larger",
        ANGLES,
    ),
    _column("hype_distance", "Lorentz distance of image and caption.", "smaller", (0, np.inf)),
    _column("hype_cosine", "Cosine of image and caption.", "larger", COSINE_BOUNDS),
)
CLUSTER = _column("hype_cluster", "1 where the image is in a cluster of the target set, else 0.", "larger", (0, 1))


def configured(settings: ProjectSettings) -> Mapping[str, HypeSettings]:
    """Return the settings by name."""
    found: Mapping[str, HypeSettings] = settings.scores.hype
    return found


def _settings(asset: Declared) -> HypeSettings:
    return configured(asset.settings)[asset.names["name"]]


def _clusters(asset: Declared) -> str | None:
    chosen = _settings(asset).clusters
    return None if chosen is None else f"clusters/{chosen}"


def _deps(asset: Declared) -> Sequence[str | Dep]:
    clusters = _clusters(asset)
    return ["raw_pool", *([Dep(clusters, fresh=True)] if clusters is not None else [])]


def _columns(asset: Declared) -> Sequence[Column]:
    return COLUMNS if _clusters(asset) is None else (*COLUMNS, CLUSTER)


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    return {
        "image": settings.image,
        "text": settings.text,
        "curvature": settings.curvature,
        "apex_radius": settings.apex_radius,
    }


def _files(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    settings = _settings(asset.declared)
    try:
        read = {"hyperbolic": shard_file(settings, shard), "reference": reference_file(settings)}
    except ExternalError as error:
        raise NotReady(str(error)) from error
    return {f"file/{name}": files.fingerprint([file]) for name, file in read.items()}


@dataclass(frozen=True)
class Reference:
    """The reference set on the device: spatial parts of images `[m, d]` and captions `[k, d]`."""

    images: "torch.Tensor"
    texts: "torch.Tensor"


def _reference(step: Step) -> Reference:
    return Reference(*(to_tensor(side) for side in read_reference(_settings(step.asset.declared))))


@partitioned(
    key="hype/{name}",
    deps=_deps,
    columns=_columns,
    checks=[rows_aligned, within_bounds],
    code_version="2",
    group_name="hype",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="HYPE from given hyperbolic embeddings: specificity of image and caption, minus their Lorentz "
    "distance, plus their cosine and, where clusters are given, the cluster term. Larger is better; each part has a "
    "column.",
    parameters=_parameters,
    inputs=_files,
    prepare=_reference,
)
def hype(shard: Shard, reference: Reference) -> Result:
    """Compute HYPE of one shard."""
    from selection.scores import hyperbolic

    asset = shard.step.asset.declared
    settings, clusters = _settings(asset), _clusters(asset)
    pool = shard.read("raw_pool", ["f0", "f1", "source_row"])
    stored = shard.step.stored("raw_pool", shard.name)
    assert stored is not None
    places = {column: pool[column].to_numpy() for column in pool.column_names}
    sides = read_shard(settings, shard.name, places, stored.summary["samples_seen"])
    if sides[0].shape[1] != reference.images.shape[1]:
        raise ExternalError(
            f"{settings.reference}: {reference.images.shape[1]} dimensions, and the embeddings of shard {shard.name} "
            f"have {sides[0].shape[1]}. Remedy: a reference set by the same encoder"
        )
    c, k = settings.curvature, settings.apex_radius
    parts = {column.name: np.empty(pool.num_rows) for column in asset.columns}
    for start in range(0, pool.num_rows, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, pool.num_rows))
        image, text = (to_tensor(side[rows]) for side in sides)
        found = {
            "hype_specificity_image": hyperbolic.image_specificity(image, reference.texts, c, k),
            "hype_specificity_text": hyperbolic.text_specificity(text, reference.images, c, k),
            "hype_distance": hyperbolic.lorentz_distance(image, text, c),
            "hype_cosine": hyperbolic.cosine(image, text),
        }
        for column, values in found.items():
            parts[column][rows] = values.cpu().numpy()
        shard.step.progress(rows.stop - rows.start, shard.name)
    parts["hype"] = (
        parts["hype_specificity_image"] + parts["hype_specificity_text"] - parts["hype_distance"] + parts["hype_cosine"]
    )
    if clusters is not None:
        inside = shard.read(clusters, ["in_target_cluster"])["in_target_cluster"]
        parts["hype_cluster"] = inside.to_numpy().astype(np.float64)
        parts["hype"] += parts["hype_cluster"]
    singles = {column.name: parts[column.name].astype(np.float32) for column in asset.columns}
    summary: dict[str, Any] = {}
    for column, numbers in singles.items():
        summary |= score_stats(column, numbers)
    return Result(score_table(shard.name, pool, **singles), summary)


def _validate(settings: ProjectSettings) -> None:
    known = [f"{encoder}/{t}" for encoder, chosen in settings.scores.clusters.items() for t in chosen.targets]
    for name, chosen in configured(settings).items():
        if chosen.clusters is not None and chosen.clusters not in known:
            raise ValueError(
                f"scores.hype.{name}.clusters: scores.clusters has no {chosen.clusters!r}. Remedy: "
                f"{f'one of {known}' if known else 'give that pair there, or leave it out here'}"
            )


HYPE = ScoreKind(
    name="hype",
    asset=hype,
    settings=dict[Name, HypeSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"name": name} for name in configured(settings)],
    upstream=lambda settings: (),
    validate=_validate,
    recorded=lambda settings, wanted: recorded_entries(
        "hype", configured(settings), wanted, lambda name: [f"hype/{name}"]
    ),
)
