"""`target_embeddings/<encoder>/<target>`: image embeddings of a downstream task's data, which NormSim compares to."""

import pyarrow as pa

from assets.base.partitioned import Result
from assets.base.unpartitioned import WholeAsset, whole_asset
from assets.pool.embeddings import check_vectors
from assets.pool.embeddings import parameters as encoder_parameters
from assets.project import Project
from resources.lake.files import Provenance, sample_digest, vectors_to_column

CODE_VERSION = "1"
SCHEMA = pa.schema(
    [
        pa.field("target_index", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
    ]
)


def target_embeddings(project: Project, encoder: str, target: str) -> WholeAsset:
    """Make the asset `target_embeddings/<encoder>/<target>`."""
    key = f"target_embeddings/{encoder}/{target}"

    def provenance(redraw: bool) -> Provenance:
        del redraw  # the same target gives the same embeddings
        fingerprint = project.target_fingerprint(target, encoder)
        return Provenance(
            key, None, CODE_VERSION, encoder_parameters(project, encoder), {f"target/{target}": fingerprint}
        )

    def compute() -> Result:
        found = project.target(target).embed(
            project.encoder(encoder), on_rows=lambda done: project.on_progress(key, "", done)
        )
        check_vectors(found.image, key)
        table = pa.table(
            {
                "target_index": pa.array(range(len(found.labels)), pa.int64()),
                "label": pa.array(found.labels, pa.string()),
                "name": pa.array(found.names, pa.string()),
                "image": vectors_to_column(found.image),
            }
        )
        summary: dict[str, object] = {"classes": len(set(found.labels)), "dimensions": int(found.image.shape[1])}
        if found.notes:
            summary["notes"] = "\n".join(found.notes)
        return Result(table, summary, content=sample_digest(table))

    return whole_asset(
        project,
        key=key,
        deps=(),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="target_embeddings",
        kinds={"pytorch", "arrow"},
        description=f"Image embeddings of target set `{target}` by encoder `{encoder}`, with class and file name.",
        columns=SCHEMA,
        pool="gpu",
    )
