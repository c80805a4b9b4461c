"""`clip_score/<encoder>`: the cosine of each image and its own caption. With a DFN encoder, the DFN score."""

import numpy as np
import pyarrow as pa

from assets.base.partitioned import Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import embedding_chunks, figures, score_schema, score_table
from assets.project import Project
from resources.lake.files import Provenance

CODE_VERSION = "1"


def clip_score(project: Project, encoder: str) -> ShardAsset:
    """Make the asset `clip_score/<encoder>`."""
    key = f"clip_score/{encoder}"
    source = f"embeddings/{encoder}"

    def provenance(shard: str) -> Provenance:
        return Provenance(key, shard, CODE_VERSION, {}, {source: input_fingerprint(project, source, shard)})

    def score(shard: str) -> Result:
        import selection

        embeddings = project.lake.read(source, shard)
        scores = np.empty(embeddings.num_rows, np.float32)
        for rows, (image, text) in embedding_chunks(project, key, embeddings, "image", "text"):
            scores[rows] = selection.clip_score(image, text).cpu().numpy()
        return Result(score_table(shard, embeddings, clip_score=scores), figures("clip_score", scores))

    return sharded_asset(
        project,
        key=key,
        deps=(source,),
        provenance=provenance,
        compute=each(score),
        code_version=CODE_VERSION,
        group="clip_score",
        kinds={"pytorch", "parquet"},
        description=f"CLIPScore by encoder `{encoder}`: cosine of image and caption, larger is better.",
        columns=score_schema(clip_score=pa.float32()),
        pool="gpu",
    )
