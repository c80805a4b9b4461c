"""`hype/<name>`: how specific image and caption are, and how near, from hyperbolic embeddings (arXiv 2404.17507)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import CHUNK_ROWS, figures, score_schema, score_table, to_tensor
from assets.project import Project
from resources.inputs.external import ExternalError
from resources.inputs.hyperbolic import read_reference, read_shard, reference_file, shard_file
from resources.lake.files import Provenance
from resources.storage import files
from resources.storage.arrays import ArrayError

CODE_VERSION = "1"


def hype(project: Project, name: str, clusters: ShardAsset | None) -> ShardAsset:
    """Make the asset `hype/<name>`; `clusters` is `clusters/<encoder>/<target>`, where it has a cluster term."""
    key = f"hype/{name}"
    settings = project.settings.hype[name]
    deps = ("raw_pool",) if clusters is None else ("raw_pool", clusters.key)
    columns = project.settings.score_assets[key]

    def provenance(shard: str) -> Provenance:
        inputs = {source: input_fingerprint(project, source, shard) for source in deps}
        if clusters is not None and not clusters.is_fresh(project, shard):
            raise NotReady(f"{clusters.key} of shard {shard} is out of date. Remedy: materialize it first")
        try:
            read = {"hyperbolic": shard_file(settings, shard), "reference": reference_file(settings)}
        except ExternalError as error:
            raise NotReady(str(error)) from error
        inputs |= {f"file/{what}": files.fingerprint([file]) for what, file in read.items()}
        parameters = {
            "image": settings.image,
            "text": settings.text,
            "curvature": settings.curvature,
            "apex_radius": settings.apex_radius,
        }
        return Provenance(key, shard, CODE_VERSION, parameters, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        from selection.scores import hyperbolic

        try:
            references = [to_tensor(side) for side in read_reference(settings)]
        except (ExternalError, ArrayError) as error:
            yield from ((shard, error) for shard in shards)
            return
        of_images, of_texts = references
        c, k = settings.curvature, settings.apex_radius

        def score(shard: str) -> Result:
            pool = project.lake.read("raw_pool", shard, ["f0", "f1", "source_row"])
            stored = project.lake.stored("raw_pool", shard)
            assert stored is not None
            places = {column: pool[column].to_numpy() for column in pool.column_names}
            sides = read_shard(settings, shard, places, stored.summary["samples_seen"])
            if sides[0].shape[1] != of_images.shape[1]:
                raise ExternalError(
                    f"{settings.reference}: {of_images.shape[1]} dimensions, and the embeddings of shard {shard} have "
                    f"{sides[0].shape[1]}. Remedy: a reference set by the same encoder"
                )
            parts = {column: np.empty(pool.num_rows) for column in columns}
            for start in range(0, pool.num_rows, CHUNK_ROWS):
                rows = slice(start, min(start + CHUNK_ROWS, pool.num_rows))
                image, text = (to_tensor(side[rows]) for side in sides)
                found: dict[str, Any] = {
                    "hype_specificity_image": hyperbolic.specificity(image, of_texts, c, k),
                    "hype_specificity_text": hyperbolic.specificity(text, of_images, c, k),
                    "hype_distance": hyperbolic.lorentz_distance(image, text, c),
                    "hype_cosine": hyperbolic.cosine(image, text),
                }
                for column, values in found.items():
                    parts[column][rows] = values.cpu().numpy()
                project.on_progress(key, shard, rows.stop - rows.start)
            parts["hype"] = (
                parts["hype_specificity_image"]
                + parts["hype_specificity_text"]
                - parts["hype_distance"]
                + parts["hype_cosine"]
            )
            if clusters is not None:
                inside = project.lake.read(clusters.key, shard, ["in_target_cluster"])["in_target_cluster"]
                parts["hype_cluster"] = inside.to_numpy().astype(np.float64)
                parts["hype"] += parts["hype_cluster"]
            singles = {column: parts[column].astype(np.float32) for column in columns}
            summary: dict[str, Any] = {}
            for column, numbers in singles.items():
                summary |= figures(column, numbers)
            return Result(score_table(shard, pool, **singles), summary)

        yield from each(score)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=deps,
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="hype",
        kinds={"pytorch", "parquet"},
        description="HYPE from given hyperbolic embeddings: specificity of image and caption, less their Lorentz "
        "distance, plus their cosine and, where clusters are given, the cluster term. Larger is better; each part has "
        "a column.",
        columns=score_schema(**dict.fromkeys(columns, pa.float32())),
        pool="gpu",
    )
