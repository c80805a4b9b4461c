"""`embeddings/<encoder>`: unit-norm float16 embeddings of a shard's images and captions, in `raw_pool`'s order."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from assets.project import Project
from assets.sharded import Outcome, Result, ShardAsset, input_fingerprint, sharded_asset
from resources.lake import Provenance, vectors_to_column

CODE_VERSION = "1"
SCHEMA = pa.schema(
    [
        pa.field("f0", pa.uint64(), nullable=False),
        pa.field("f1", pa.uint64(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
        pa.field("text", pa.list_(pa.float16()), nullable=False),
    ]
)


def embeddings(project: Project, encoder: str) -> ShardAsset:
    """Make the asset `embeddings/<encoder>`."""
    key = f"embeddings/{encoder}"

    def provenance(shard: str) -> Provenance:
        inputs = {"raw_pool": input_fingerprint(project, "raw_pool", shard)}
        if project.settings.encoders[encoder].precomputed is not None:
            inputs["source"] = project.listing()[shard]
        return Provenance(key, shard, CODE_VERSION, parameters(project, encoder), inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        rows = _Rows(project, shards)
        for shard, found in project.encoder(encoder).embed_pool(
            rows, project.pool, on_rows=lambda done: project.on_progress(key, "", done)
        ):
            if isinstance(found, Exception):
                yield shard, found
                continue
            uids = project.lake.read("raw_pool", shard, ["f0", "f1"])
            table = pa.table(
                {
                    "f0": uids["f0"],
                    "f1": uids["f1"],
                    "image": vectors_to_column(found.image),
                    "text": vectors_to_column(found.text),
                }
            )
            yield shard, Result(table, {"dimensions": int(found.image.shape[1])})

    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool",),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="embeddings",
        kinds={"pytorch", "arrow"},
        description=f"Image and text embeddings by encoder `{encoder}`: float16, unit norm, row for row the order "
        "of `raw_pool`. Memory-mapped Arrow.",
        columns=SCHEMA,
        pool="gpu",
    )


class _Rows(Mapping[str, pa.Table]):
    """The rows of many shards, each read when its turn comes."""

    def __init__(self, project: Project, shards: Sequence[str]) -> None:
        self.project = project
        self.shards = shards

    def __getitem__(self, shard: str) -> pa.Table:
        return self.project.lake.read("raw_pool", shard)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def parameters(project: Project, encoder: str) -> dict[str, object]:
    """Give what embeddings depend on besides the pixels and captions: the encoder's identity."""
    return {"encoder": project.encoder(encoder).identity()}


def check_vectors(vectors: np.ndarray, what: str) -> None:
    """Refuse embeddings that are not finite or not of unit norm.

    Args:
        vectors: float16 `[n, d]`.
        what: file or asset they come from, for the message.

    Raises:
        ValueError: names the first bad row.
    """
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))
    if len(bad):
        raise ValueError(
            f"{what}: {len(bad)} rows are not of unit norm, the first is row {bad[0]} with norm {norms[bad[0]]}. "
            "Remedy: look at the encoder's output there"
        )
