"""`norm_sim/<encoder>/<target>`: how near each image is to a target set (arXiv 2405.19547, section 3.2)."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from assets.base.partitioned import Outcome, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import embedding_chunks, figures, score_schema, score_table, to_tensor
from assets.base.unpartitioned import WholeAsset, up_to_date
from assets.project import Project
from resources.lake.files import Provenance, column_to_vectors

CODE_VERSION = "1"


def norm_sim(project: Project, encoder: str, target: str, targets: WholeAsset) -> ShardAsset:
    """Make the asset `norm_sim/<encoder>/<target>`; `targets` is the target set's embeddings by that encoder."""
    key = f"norm_sim/{encoder}/{target}"
    source = f"embeddings/{encoder}"

    def provenance(shard: str) -> Provenance:
        inputs = {
            source: input_fingerprint(project, source, shard),
            targets.key: up_to_date(project, targets),
        }
        return Provenance(key, shard, CODE_VERSION, {}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        import selection

        vectors = to_tensor(column_to_vectors(project.lake.read(targets.key)["image"]))
        moment = selection.second_moment(vectors)

        def score(shard: str) -> Result:
            embeddings = project.lake.read(source, shard)
            euclidean = np.empty(embeddings.num_rows, np.float32)
            nearest = np.empty(embeddings.num_rows, np.float32)
            index = np.empty(embeddings.num_rows, np.int64)
            for rows, (image,) in embedding_chunks(project, key, embeddings, "image"):
                euclidean[rows] = selection.norm_sim_from_moment(image, moment).cpu().numpy()
                value, where = selection.nearest_target(image, vectors)
                nearest[rows], index[rows] = value.cpu().numpy(), where.cpu().numpy()
            table = score_table(shard, embeddings, norm_sim_2=euclidean, norm_sim_inf=nearest, nearest_target=index)
            return Result(table, figures("norm_sim_2", euclidean) | figures("norm_sim_inf", nearest))

        yield from each(score)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=(source, targets.key),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="norm_sim",
        kinds={"pytorch", "parquet"},
        description=f"NormSim of each image to target set `{target}` by encoder `{encoder}`: p = 2 (root of the "
        "sum of squared cosines), p = ∞ (largest absolute cosine), and which target is the nearest.",
        columns=score_schema(norm_sim_2=pa.float32(), norm_sim_inf=pa.float32(), nearest_target=pa.int64()),
        pool="gpu",
    )
