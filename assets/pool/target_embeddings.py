"""`target_embeddings/<encoder>/<target>`: image embeddings of a downstream task's data, which NormSim compares to."""

from collections.abc import Mapping

import pyarrow as pa

from assets.base.asset import Amount, Declared, FileAsset, Step
from assets.base.context import Snapshot
from assets.base.results import Result
from assets.base.standard_checks import unit_norm
from assets.base.unpartitioned import unpartitioned
from assets.pool.embeddings import check_vectors, encoder_parameters
from resources.lake.files import sample_digest, vectors_to_column

SCHEMA = pa.schema(
    [
        pa.field("target_index", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
    ]
)


def _files(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    encoder, target = asset.declared.names["encoder"], asset.declared.names["target"]
    return {f"target/{target}": snapshot.target_fingerprint(target, encoder)}


def _operations(asset: Declared, amount: Amount) -> float | None:
    if asset.names["encoder"] in asset.settings.targets[asset.names["target"]].features:
        return 0.0
    return None if amount.image is None else amount.rows * amount.image


@unpartitioned(
    key="target_embeddings/{encoder}/{target}",
    deps=[],
    columns=SCHEMA,
    checks=[unit_norm("image")],
    code_version="2",
    group_name="target_embeddings",
    kinds={"pytorch", "arrow"},
    pool="gpu",
    description="Image embeddings of target set `{target}` by encoder `{encoder}`, with class and file name.",
    parameters=encoder_parameters,
    inputs=_files,
    operations=_operations,
)
def target_embeddings(step: Step) -> Result:
    """Embed a target set, or read its ready-made features."""
    encoder = step.context.models.encoder(step.names["encoder"])
    target = step.context.target(step.names["target"])
    found = target.embed(encoder, on_rows=step.progress, on_listed=step.expect)
    check_vectors(found.image, step.asset.key)
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
