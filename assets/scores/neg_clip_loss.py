"""`neg_clip_loss/<encoder>`: each pair's score against a batch of other pairs (arXiv 2405.19547)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.partitioned import Compute, Outcome, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import embedding_chunks, figures, score_schema, score_table, to_tensor
from assets.base.unpartitioned import WholeAsset, up_to_date
from assets.project import NegClipLossSettings, Project
from assets.scores.negatives import read_draws, with_content
from resources.lake.files import Provenance, column_to_vectors

CODE_VERSION = "1"


def neg_clip_loss(project: Project, encoder: str, negatives: WholeAsset | None) -> ShardAsset:
    """Make the asset `neg_clip_loss/<encoder>`: against `negatives`, or without them by the paper's estimator."""
    key = f"neg_clip_loss/{encoder}"
    source = f"embeddings/{encoder}"
    settings = project.settings.neg_clip_loss[encoder]
    deps = (source,) if negatives is None else (source, negatives.key)
    compute = _by_random_partitions if negatives is None else _by_reference_negatives

    def provenance(shard: str) -> Provenance:
        parameters: dict[str, Any] = {
            "temperature": project.temperature(encoder),
            "estimator": settings.estimator,
            "arithmetic": settings.arithmetic,
        }
        inputs = {source: input_fingerprint(project, source, shard)}
        if negatives is None:
            parameters |= {name: getattr(settings, name) for name in ("batch_size", "draws", "seed")}
        else:
            inputs[negatives.key] = up_to_date(project, negatives)
        return Provenance(key, shard, CODE_VERSION, parameters, inputs)

    return sharded_asset(
        project,
        key=key,
        deps=deps,
        provenance=provenance,
        compute=compute(project, encoder, settings),
        code_version=CODE_VERSION,
        group="neg_clip_loss",
        kinds={"pytorch", "parquet"},
        description=f"negCLIPLoss by encoder `{encoder}`: CLIPScore less what the pair would get beside other "
        "captions and other images, mean over the draws; at most 0, larger is better; with its standard error.",
        columns=score_schema(neg_clip_loss=pa.float32(), neg_clip_loss_stderr=pa.float32()),
        pool="gpu",
    )


def _by_reference_negatives(project: Project, encoder: str, settings: NegClipLossSettings) -> Compute:
    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        import torch

        import selection

        uids, *vectors = read_draws(project.lake.read(f"negatives/{encoder}"))
        drawn = with_content(uids, *vectors)
        negative_image, negative_text = (to_tensor(v) for v in vectors)
        temperature = project.temperature(encoder)

        def score(shard: str) -> Result:
            embeddings = project.lake.read(f"embeddings/{encoder}", shard)
            member = _members(drawn, embeddings)
            scores = np.empty(embeddings.num_rows, np.float32)
            stderr = np.empty_like(scores)
            chunks = embedding_chunks(project, f"neg_clip_loss/{encoder}", embeddings, "image", "text")
            for rows, (image, text) in chunks:
                found = selection.neg_clip_loss(
                    image,
                    text,
                    negative_image,
                    negative_text,
                    temperature=temperature,
                    arithmetic=settings.arithmetic,
                    member=torch.from_numpy(member[:, rows]).to(image.device),
                )
                scores[rows], stderr[rows] = (f.cpu().numpy() for f in found)
            return _result(shard, embeddings, scores, stderr, uids.shape, temperature)

        yield from each(score)(shards)

    return compute


def _members(drawn: np.ndarray, embeddings: pa.Table) -> np.ndarray:
    """Tell which rows of a shard are in which draw, `[K, n]` bool."""
    from selection.scores.negatives import membership

    uids = np.empty(embeddings.num_rows, dtype=drawn.dtype)
    uids["f0"], uids["f1"] = embeddings["f0"].to_numpy(), embeddings["f1"].to_numpy()
    rows = with_content(uids, *(column_to_vectors(embeddings[side]) for side in ("image", "text")))
    return membership(drawn, rows["f0"].copy(), rows["f1"].copy())


def _by_random_partitions(project: Project, encoder: str, settings: NegClipLossSettings) -> Compute:
    def score(shard: str) -> Result:
        import selection
        from selection.scores.negatives import keyed_hash

        embeddings = project.lake.read(f"embeddings/{encoder}", shard)
        f0, f1 = embeddings["f0"].to_numpy(), embeddings["f1"].to_numpy()
        # Which rows share a batch shall depend on the seed and the uids, not on the order in the shard.
        order = np.lexsort((f1, f0, keyed_hash(settings.seed, 0, f0, f1)))
        image, text = (to_tensor(column_to_vectors(embeddings[side])[order]) for side in ("image", "text"))
        temperature = project.temperature(encoder)
        scores = np.empty(len(order), np.float32)
        scores[order] = (
            selection.neg_clip_loss_in_batches(
                image,
                text,
                temperature=temperature,
                batch_size=settings.batch_size,
                draws=settings.draws,
                seed=settings.seed,
                arithmetic=settings.arithmetic,
            )
            .cpu()
            .numpy()
        )
        project.on_progress(f"neg_clip_loss/{encoder}", shard, len(order))
        shape = (settings.draws, min(settings.batch_size, len(order)))
        return _result(shard, embeddings, scores, np.full_like(scores, np.nan), shape, temperature)

    return each(score)


def _result(
    shard: str,
    embeddings: pa.Table,
    scores: np.ndarray,
    stderr: np.ndarray,
    shape: tuple[int, ...],
    temperature: float,
) -> Result:
    summary = {"temperature": temperature, "draws": shape[0], "batch_size": shape[1]}
    return Result(
        score_table(shard, embeddings, neg_clip_loss=scores, neg_clip_loss_stderr=stderr),
        summary | figures("neg_clip_loss", scores),
    )
