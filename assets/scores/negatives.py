"""`negatives/<encoder>`: the reference negatives, K draws of B pool rows that every row is scored against.

Drawn once and kept: a shard that arrives later is scored against the same draws, so no other score changes. They
are drawn again when a setting or the encoder changes, when the pool was too small for B rows and has grown, or
when somebody asks (the job `redraw_negatives`).
"""

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Result
from assets.base.unpartitioned import WholeAsset, whole_asset
from assets.pool.embeddings import CODE_VERSION as EMBEDDINGS_VERSION
from assets.pool.embeddings import parameters as encoder_parameters
from assets.project import Project
from core.uids import UID_DTYPE
from resources.lake.files import Provenance, column_to_vectors, vectors_to_column

CODE_VERSION = "1"
SCHEMA = pa.schema(
    [
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("f0", pa.uint64(), nullable=False),
        pa.field("f1", pa.uint64(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
        pa.field("text", pa.list_(pa.float16()), nullable=False),
    ]
)


def negatives(project: Project, encoder: str) -> WholeAsset:
    """Make the asset `negatives/<encoder>`."""
    key = f"negatives/{encoder}"
    source = f"embeddings/{encoder}"
    settings = project.settings.neg_clip_loss[encoder]

    def embedded() -> dict[str, str]:
        """Give the fingerprints of the pool's embedded shards."""
        found = {}
        for shard in sorted(project.listing()):
            stored = project.lake.stored(source, shard)
            if stored is not None:
                found[shard] = stored.fingerprint
        return found

    def provenance(redraw: bool) -> Provenance:
        parameters = {
            **encoder_parameters(project, encoder),
            "embeddings_version": EMBEDDINGS_VERSION,
            "batch_size": settings.batch_size,
            "draws": settings.draws,
            "seed": settings.seed,
        }
        stored = project.lake.stored(key)
        if stored is not None and not redraw and stored.summary["batch_size"] == settings.batch_size:
            kept = Provenance(key, None, CODE_VERSION, parameters, stored.provenance.inputs)
            if kept.digest() == stored.provenance.digest():
                return kept
        inputs = embedded()
        wanted = settings.coverage * len(project.listing())
        if not inputs or len(inputs) < wanted:
            raise NotReady(
                f"{len(inputs)} of the pool's {len(project.listing())} shards have {source}, and negatives drawn "
                f"now would stand for those alone. Remedy: materialize {source} for the others first, or lower "
                f"scores.neg_clip_loss.{encoder}.coverage (now {settings.coverage})"
            )
        return Provenance(key, None, CODE_VERSION, parameters, inputs)

    def compute() -> Result:
        from selection.scores.negatives import candidates, merge

        shards = list(embedded())
        chosen = merge(
            (
                candidates(
                    *_uids(project, source, shard),
                    draws=settings.draws,
                    size=settings.batch_size,
                    seed=settings.seed,
                    shard=number,
                )
                for number, shard in enumerate(shards)
            ),
            settings.batch_size,
        )
        draws, size = chosen.shape
        flat = chosen.ravel()
        image, text = _gather(project, source, shards, flat)
        table = pa.table(
            {
                "draw": np.repeat(np.arange(draws, dtype=np.int32), size),
                "rank": np.tile(np.arange(size, dtype=np.int32), draws),
                "f0": flat["f0"],
                "f1": flat["f1"],
                "image": vectors_to_column(image),
                "text": vectors_to_column(text),
            }
        )
        summary = {"draws": draws, "batch_size": size, "seed": settings.seed, "shards_drawn_from": len(shards)}
        if size < settings.batch_size:
            summary["notes"] = f"the pool has {size} rows, fewer than {settings.batch_size}: each draw is all of it"
        return Result(table, summary)

    return whole_asset(
        project,
        key=key,
        deps=(source,),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="negatives",
        kinds={"arrow"},
        description=f"Reference negatives for negCLIPLoss by encoder `{encoder}`: {settings.draws} draws of "
        f"{settings.batch_size} rows, chosen by a keyed hash of the uid. Kept while shards arrive; to draw again, "
        "launch the job `redraw_negatives`.",
        columns=SCHEMA,
        pool="gpu",
    )


def read_draws(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the stored draws.

    Returns:
        The uids as records with f0 and f1 `[K, B]`, and float16 image and text `[K, B, d]`.
    """
    draws = int(table["draw"][-1].as_py()) + 1
    uids = np.empty(table.num_rows, dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = table["f0"].to_numpy(), table["f1"].to_numpy()
    image, text = column_to_vectors(table["image"]), column_to_vectors(table["text"])
    size = table.num_rows // draws
    return uids.reshape(draws, size), image.reshape(draws, size, -1), text.reshape(draws, size, -1)


def with_content(uids: np.ndarray, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Mix a hash of the embeddings' bits into uids, so that two are equal only where both agree.

    A row whose content changed since the draw is not the row that was drawn: in the draw lies its old pair, and a
    batch that took it for the row itself would miss the row's own pair.

    Args:
        uids: records with f0 and f1, `[..., n]`.
        image: float16 `[..., n, d]`.
        text: likewise.
    """
    mixed = uids.copy()
    for vectors in (image, text):
        spare = -vectors.shape[-1] % 4
        padded = np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, spare)]) if spare else vectors
        words = np.ascontiguousarray(padded).view(np.uint64)
        odd = np.random.default_rng(0).integers(0, 2**63, words.shape[-1], dtype=np.uint64) * np.uint64(2) + np.uint64(
            1
        )
        mixed["f0"] = mixed["f0"] * np.uint64(0x9E3779B97F4A7C15) + words @ odd
    return mixed


def _uids(project: Project, source: str, shard: str) -> tuple[np.ndarray, np.ndarray]:
    table = project.lake.read(source, shard, ["f0", "f1"])
    return table["f0"].to_numpy(), table["f1"].to_numpy()


def _gather(project: Project, source: str, shards: list[str], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the chosen rows' embeddings, each shard once."""
    image: np.ndarray | None = None
    text: np.ndarray | None = None
    for number, shard in enumerate(shards):
        places = np.flatnonzero(chosen["shard"] == number)
        table = project.lake.read(source, shard)
        shard_image, shard_text = column_to_vectors(table["image"]), column_to_vectors(table["text"])
        if image is None or text is None:
            image = np.empty((len(chosen), shard_image.shape[1]), np.float16)
            text = np.empty_like(image)
        image[places] = shard_image[chosen["row"][places]]
        text[places] = shard_text[chosen["row"][places]]
    if image is None or text is None:
        raise ValueError("no shards to gather negatives from")
    return image, text
