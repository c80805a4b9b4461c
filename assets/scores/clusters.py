"""DataComp's image-based filter (arXiv 2304.14108): `centroids/<encoder>`, and `clusters/<encoder>/<target>` from it.

A row is in a target's cluster when the centroid nearest to its image is also the nearest of some target image. Like
negatives, centroids that were computed from the pool are kept while shards arrive.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.columns import Column
from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Result
from assets.base.score_kind import ScoreKind, recorded_entries, recorded_targets, require_encoders, require_targets
from assets.base.score_tables import CHUNK_ROWS, to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned
from assets.base.unpartitioned import unpartitioned
from assets.pool.target_embeddings import target_embeddings
from assets.scores.draws import sample
from core.hashing import sha256
from resources.lake.files import LakeError, Stored, column_to_vectors
from resources.lake.scratch import WorkFolder, shared_file
from resources.settings import Location, Settings

if TYPE_CHECKING:
    import torch

GIVEN = "given centroids"  # name of a centroids file among the recorded inputs
ROWS = "rows"  # of the sample, in the work folder of k-means
TARGETS = "target_embeddings/{encoder}/{target}"
CENTROIDS = pa.schema(
    [pa.field("cluster", pa.int64(), nullable=False), pa.field("centroid", pa.list_(pa.float32()), nullable=False)]
)


class ClusterSettings(Settings):
    """How one encoder's images are clustered (`docs/methods/datacomp_baselines.md`).

    Attributes:
        targets: target sets whose clusters are marked.
        centroids: an .npy of centroids `[K, d]`; by default they are computed from the pool by k-means.
        clusters: K.
        sample: rows of the pool that k-means uses.
        iterations: of k-means, at most.
        seed: chooses the sample.
    """

    targets: tuple[Name, ...] = Field(min_length=1)
    centroids: Location | None = None
    clusters: int = Field(default=100_000, ge=1)
    sample: int = Field(default=1_000_000, ge=1)
    iterations: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


def _settings(asset: Declared) -> ClusterSettings:
    found: ClusterSettings = asset.settings.scores.clusters[asset.names["encoder"]]
    return found


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    if settings.centroids is not None:
        return {}
    return settings.model_dump(include={"clusters", "sample", "iterations", "seed"})


def _inputs(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    path = _settings(asset.declared).centroids
    if path is not None:
        if not Path(path).is_file():
            raise NotReady(f"{path}: no such file of centroids. Remedy: correct scores.clusters")
        return {GIVEN: sha256(Path(path))}
    source = f"embeddings/{asset.declared.names['encoder']}"
    found, total = embedded_shards(snapshot, source), len(snapshot.listing)
    if len(found) < total / 2:
        raise NotReady(
            f"{len(found)} of the pool's {total} shards have {source}, too few to represent it. "
            f"Remedy: materialize {source} for the others first"
        )
    return found


def _keeps(asset: Declared, stored: Stored, snapshot: Snapshot) -> bool:
    return _settings(asset).centroids is None


def _centroids_description(asset: Declared) -> str:
    path = _settings(asset).centroids
    origin = f"read from `{path}`." if path else "k-means of a sample of the pool, kept while shards arrive."
    return f"Centroids of images by encoder `{asset.names['encoder']}`: {origin}"


@unpartitioned(
    key="centroids/{encoder}",
    deps=lambda asset: [Dep("embeddings/{encoder}", recorded=False)] if _settings(asset).centroids is None else [],
    columns=CENTROIDS,
    checks=[],
    code_version="1",
    group_name="clusters",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description=_centroids_description,
    parameters=_parameters,
    inputs=_inputs,
    keeps=_keeps,
    stays=lambda asset, stored: _settings(asset).centroids is None,
)
def centroids(step: Step) -> Result:
    """Read the given centroids, or compute them by k-means of a sample of the pool."""
    settings = _settings(step.asset.declared)
    if settings.centroids is not None:
        found = _given(settings.centroids)
    else:
        source = f"embeddings/{step.names['encoder']}"
        shards = list(embedded_shards(step.snapshot, source))
        _, rows = sample(step.snapshot, source, shards, size=settings.sample, seed=settings.seed, spread=step.map)
        found = _k_means(step, rows, settings)
    flat = pa.array(np.ascontiguousarray(found).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, found.shape[1])
    table = pa.table({"cluster": np.arange(len(found)), "centroid": column})
    return Result(table, {"clusters": len(found), "dimensions": found.shape[1]})


def _k_means(step: Step, rows: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    """Compute centroids of rows, float16 `[n, d]`; workers read both from a work folder, and assign blocks of rows."""
    import torch

    from selection.scores.clustering import spherical_k_means

    work = WorkFolder(step.context.lake, step.asset.key)
    work.begin({}, {ROWS: (np.float16, rows.shape)})
    work.array(ROWS, np.float16, rows.shape, "r+")[:] = rows
    work.flush()
    all_rows, iteration = step.shared(work, ROWS), 0

    def nearest(centroid: torch.Tensor) -> torch.Tensor:
        nonlocal iteration
        work.remove(f"means-{iteration}.npy")
        iteration += 1
        np.save(work.path / f"means-{iteration}.npy", centroid.numpy())
        means = step.shared(work, f"means-{iteration}.npy")
        blocks = (
            (all_rows, rows.shape, means, start, min(start + CHUNK_ROWS, len(rows)))
            for start in range(0, len(rows), CHUNK_ROWS)
        )
        return torch.from_numpy(np.concatenate(list(step.map(_nearest, blocks))))

    try:
        means = spherical_k_means(
            torch.from_numpy(rows), clusters=settings.clusters, iterations=settings.iterations, nearest=nearest
        )
    finally:
        work.clear()
    return means.numpy()


def _nearest(
    snapshot: Snapshot, all_rows: str, shape: tuple[int, int], means: str, start: int, stop: int
) -> np.ndarray:
    """Assign a block of rows to centroids, int64 `[stop - start]`; `all_rows` and `means` are locations."""
    from selection.scores.clustering import nearest_centroid

    lake = snapshot.context.lake
    rows = np.memmap(shared_file(lake, all_rows), np.float16, "r", shape=shape)[start:stop]
    kept: dict[str, Any] = snapshot.memoized(f"centroids of {all_rows}", dict)
    if kept.get("at") != means:
        kept.update(at=means, means=to_tensor(np.load(shared_file(lake, means))))
    return nearest_centroid(to_tensor(rows), kept["means"]).cpu().numpy()


@dataclass(frozen=True)
class Means:
    """Centroids on the device, float32 `[K, d]`, and whether each is the nearest of a target image, `[K]` bool."""

    centroids: "torch.Tensor"
    hit: np.ndarray


def _means(step: Step) -> Means:
    from selection.scores.clustering import nearest_centroid

    means = to_tensor(column_to_vectors(step.read("centroids/{encoder}")["centroid"]))
    vectors = column_to_vectors(step.read(TARGETS)["image"])
    if vectors.shape[1] != means.shape[1]:
        raise LakeError(
            f"centroids/{step.names['encoder']} has {means.shape[1]} dimensions, {TARGETS.format(**step.names)} "
            f"{vectors.shape[1]}. Remedy: other centroids"
        )
    hit = np.zeros(len(means), dtype=bool)
    for start in range(0, len(vectors), CHUNK_ROWS):
        hit[nearest_centroid(to_tensor(vectors[start : start + CHUNK_ROWS]), means).cpu().numpy()] = True
    return Means(means, hit)


@partitioned(
    key="clusters/{encoder}/{target}",
    deps=["embeddings/{encoder}", "centroids/{encoder}", TARGETS],
    columns=[
        Column(
            name="cluster",
            type=pa.int64(),
            description="Index of the centroid nearest to the image.",
            direction=None,
            bounds=None,
        ),
        Column(
            name="in_target_cluster",
            type=pa.bool_(),
            description="Whether that centroid is also the nearest of an image of the target set.",
            direction=None,
            bounds=None,
        ),
    ],
    checks=[rows_aligned],
    code_version="1",
    group_name="clusters",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="The centroid nearest to each image by encoder `{encoder}`, and whether it is also the nearest of an "
    "image of target set `{target}`.",
    prepare=_means,
    operations=lambda asset, amount: (
        2.0 * amount.rows * amount.dimensions * amount.inputs["centroids"] if "centroids" in amount.inputs else None
    ),
)
def clusters(shard: Shard, means: Means) -> Result:
    """Assign the images of one shard to clusters."""
    from selection.scores.clustering import nearest_centroid

    (cluster,) = shard.map(lambda image: nearest_centroid(image, means.centroids), "image")
    inside = means.hit[cluster]
    summary = {"in_target_cluster": int(inside.sum()), "clusters_hit": int(means.hit.sum())}
    return shard.scores(summary, cluster=cluster.astype(np.int64), in_target_cluster=inside)


def _given(path: str) -> np.ndarray:
    """Read centroids from an .npy, float32 `[K, d]`.

    Raises:
        LakeError: the file has other content.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise LakeError(f"{path}: not an .npy of centroids ({error}). Remedy: save them as float32 [K, d]") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise LakeError(f"{path}: centroids are finite numbers of shape [K, d]. Remedy: save them so")
    return found.astype(np.float32)


def configured(settings: ProjectSettings) -> Mapping[str, ClusterSettings]:
    """Return the settings by encoder."""
    found: Mapping[str, ClusterSettings] = settings.scores.clusters
    return found


def _instances(settings: ProjectSettings) -> Iterable[dict[str, str]]:
    for encoder, chosen in configured(settings).items():
        for target in chosen.targets:
            yield {"encoder": encoder, "target": target}


def _upstream(settings: ProjectSettings) -> Iterable[Declared]:
    for encoder in configured(settings):
        yield centroids.declare(settings, encoder=encoder)
    for names in _instances(settings):
        yield target_embeddings.declare(settings, **names)


def _validate(settings: ProjectSettings) -> None:
    require_encoders(settings, "scores.clusters", configured(settings))
    for encoder, chosen in configured(settings).items():
        require_targets(settings, f"scores.clusters.{encoder}", encoder, chosen.targets)


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    chosen = configured(settings)
    entries = recorded_entries(
        "clusters", chosen, wanted, lambda encoder: [f"clusters/{encoder}/{t}" for t in chosen[encoder].targets]
    )
    targets = [target for encoder in entries["scores"]["clusters"] for target in chosen[encoder].targets]
    return entries | recorded_targets(settings, targets)


CLUSTERS = ScoreKind(
    name="clusters",
    asset=clusters,
    settings=dict[Name, ClusterSettings],
    default={},
    configured=configured,
    instances=_instances,
    upstream=_upstream,
    validate=_validate,
    recorded=_recorded,
)
