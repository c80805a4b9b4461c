"""DataComp's image-based filter (arXiv 2304.14108): `centroids/<encoder>`, and `clusters/<encoder>/<target>` from it.

A row is in a target's cluster when the centroid nearest to its image is the nearest of some target image, too. Like
negatives, centroids that were computed from the pool stay while shards arrive.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import CHUNK_ROWS, IDENTITY, embedding_chunks, to_tensor
from assets.base.unpartitioned import WholeAsset, up_to_date, whole_asset
from assets.project import Project
from core.hashing import sha256
from resources.lake.files import LakeError, Provenance, column_to_vectors

CODE_VERSION = "1"
GIVEN = "given centroids"  # the name of a file among what centroids are made from
COLUMNS = {"cluster": pa.int64(), "in_target_cluster": pa.bool_()}
SCHEMA = pa.schema([*IDENTITY, *(pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items())])
CENTROIDS = pa.schema(
    [pa.field("cluster", pa.int64(), nullable=False), pa.field("centroid", pa.list_(pa.float32()), nullable=False)]
)


def centroids(project: Project, encoder: str) -> WholeAsset:
    """Make the asset `centroids/<encoder>`: given, or k-means of a sample of the pool."""
    key = f"centroids/{encoder}"
    source = f"embeddings/{encoder}"
    settings = project.settings.scores.clusters[encoder]

    def embedded() -> dict[str, str]:
        found = {shard: project.lake.stored(source, shard) for shard in sorted(project.listing())}
        return {shard: stored.fingerprint for shard, stored in found.items() if stored is not None}

    def provenance(redraw: bool) -> Provenance:
        if settings.centroids is not None:
            return Provenance(key, None, CODE_VERSION, {}, {GIVEN: _digest(settings.centroids)})
        parameters = settings.model_dump(include={"clusters", "sample", "iterations", "seed"})
        stored = project.lake.stored(key)
        if stored is not None and not redraw:
            kept = Provenance(key, None, CODE_VERSION, parameters, stored.provenance.inputs)
            if stored.is_from(kept):
                return kept
        inputs = embedded()
        if len(inputs) < len(project.listing()) / 2:
            raise NotReady(
                f"{len(inputs)} of the pool's {len(project.listing())} shards have {source}, too few to stand for it. "
                f"Remedy: materialize {source} for the others first"
            )
        return Provenance(key, None, CODE_VERSION, parameters, inputs)

    def compute() -> Result:
        from selection.scores.clustering import spherical_k_means

        if settings.centroids is not None:
            found = _given(settings.centroids)
        else:
            rows = to_tensor(_sample(project, source, list(embedded()), settings.sample, settings.seed))
            means = spherical_k_means(rows, clusters=settings.clusters, iterations=settings.iterations)
            found = means.cpu().numpy()
        flat = pa.array(np.ascontiguousarray(found).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, found.shape[1])
        table = pa.table({"cluster": np.arange(len(found)), "centroid": column})
        return Result(table, {"clusters": len(found), "dimensions": found.shape[1]})

    return whole_asset(
        project,
        key=key,
        deps=(source,) if settings.centroids is None else (),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="clusters",
        kinds={"pytorch", "parquet"},
        description=f"Centroids of images by encoder `{encoder}`: "
        + (f"those in `{settings.centroids}`." if settings.centroids else "k-means of a sample of the pool, kept."),
        columns=CENTROIDS,
        pool="gpu",
    )


def clusters(project: Project, encoder: str, target: str, found: WholeAsset, targets: WholeAsset) -> ShardAsset:
    """Make the asset `clusters/<encoder>/<target>`.

    Args:
        project: the project.
        encoder: the encoder's name.
        target: the target set's name.
        found: the encoder's centroids.
        targets: the target set's embeddings by that encoder.
    """
    key = f"clusters/{encoder}/{target}"
    source = f"embeddings/{encoder}"

    def provenance(shard: str) -> Provenance:
        inputs = {
            source: input_fingerprint(project, source, shard),
            found.key: up_to_date(project, found),
            targets.key: up_to_date(project, targets),
        }
        return Provenance(key, shard, CODE_VERSION, {}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        from selection.scores.clustering import nearest_centroid

        table = project.lake.read(found.key)
        means = to_tensor(column_to_vectors(table["centroid"]))
        vectors = column_to_vectors(project.lake.read(targets.key)["image"])
        if vectors.shape[1] != means.shape[1]:
            raise LakeError(
                f"{found.key} has {means.shape[1]} dimensions, {targets.key} {vectors.shape[1]}. "
                "Remedy: other centroids"
            )
        hit = np.zeros(len(means), dtype=bool)
        for start in range(0, len(vectors), CHUNK_ROWS):
            hit[nearest_centroid(to_tensor(vectors[start : start + CHUNK_ROWS]), means).cpu().numpy()] = True

        def assign(shard: str) -> Result:
            embeddings = project.lake.read(source, shard)
            cluster = np.empty(embeddings.num_rows, np.int64)
            for rows, (image,) in embedding_chunks(project, key, embeddings, "image"):
                cluster[rows] = nearest_centroid(image, means).cpu().numpy()
            inside = hit[cluster]
            columns = [pa.array([shard] * len(cluster), pa.string()), embeddings["f0"], embeddings["f1"]]
            assigned = pa.table([*columns, pa.array(cluster), pa.array(inside)], schema=SCHEMA)
            return Result(assigned, {"in_target_cluster": int(inside.sum()), "clusters_hit": int(hit.sum())})

        yield from each(assign)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=(source, found.key, targets.key),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="clusters",
        kinds={"pytorch", "parquet"},
        description=f"The centroid nearest to each image by encoder `{encoder}`, and whether an image of target set "
        f"`{target}` is nearest to it as well.",
        columns=SCHEMA,
        pool="gpu",
    )


def _digest(path: str) -> str:
    if not Path(path).is_file():
        raise NotReady(f"{path}: no such file of centroids. Remedy: correct scores.clusters")
    return sha256(Path(path))


def _given(path: str) -> np.ndarray:
    """Read centroids from an .npy: float32 [K, d].

    Raises:
        LakeError: the file is something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise LakeError(f"{path}: not an .npy of centroids ({error}). Remedy: save them as float32 [K, d]") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise LakeError(f"{path}: centroids are finite numbers of shape [K, d]. Remedy: save them so")
    return found.astype(np.float32)


def _sample(project: Project, source: str, shards: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Read the image embeddings of a sample of the pool, float16 [n, d], in an order that the uids alone decide."""
    from selection.scores.negatives import candidates, merge

    def drawn() -> Iterator[np.ndarray]:
        for number, shard in enumerate(shards):
            uids = project.lake.read(source, shard, ["f0", "f1"])
            f0, f1 = uids["f0"].to_numpy(), uids["f1"].to_numpy()
            yield candidates(f0, f1, draws=1, size=size, seed=seed, shard=number)

    (chosen,) = merge(drawn(), size)
    found: np.ndarray | None = None
    for number, shard in enumerate(shards):
        vectors = column_to_vectors(project.lake.read(source, shard)["image"])
        found = np.empty((len(chosen), vectors.shape[1]), np.float16) if found is None else found
        places = np.flatnonzero(chosen["shard"] == number)
        found[places] = vectors[chosen["row"][places]]
    assert found is not None
    return found
