"""`embeddings/<encoder>`: unit-norm float16 embeddings of a shard's images and captions, in the order of `raw_pool`.

When a run computes several encoders, the first one's step decodes the images for all of them and writes the missing
files of the others too (`docs/decisions/0006-decode-once.md`). Their own steps then find those files up to date.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Amount, Declared, FileAsset, Step
from assets.base.context import Context, Snapshot
from assets.base.partitioned import PartitionedAsset, partitioned
from assets.base.results import NotReady, Outcome, Result
from assets.base.standard_checks import rows_aligned, unit_norm
from resources.lake.files import LakeError, Provenance, vectors_to_column
from resources.models.encoders import Embeddings, EncoderError, embed_together

SCHEMA = pa.schema(
    [
        pa.field("f0", pa.uint64(), nullable=False),
        pa.field("f1", pa.uint64(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
        pa.field("text", pa.list_(pa.float16()), nullable=False),
    ]
)


def encoder_parameters(context: Context, asset: Declared) -> dict[str, Any]:
    """Return the settings that embeddings depend on: the encoder's identity."""
    return {"encoder": context.models.encoder(asset.names["encoder"]).identity()}


def _source(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    encoder = snapshot.context.settings.encoders[asset.declared.names["encoder"]]
    return {"source": snapshot.listing[shard]} if encoder.precomputed is not None else {}


def _operations(asset: Declared, amount: Amount) -> float | None:
    if asset.settings.encoders[asset.names["encoder"]].precomputed is not None:
        return 0.0
    return None if amount.image is None or amount.text is None else amount.rows * (amount.image + amount.text)


@partitioned(
    key="embeddings/{encoder}",
    deps=["raw_pool"],
    columns=SCHEMA,
    checks=[rows_aligned, unit_norm("image", "text")],
    code_version="1",
    group_name="embeddings",
    kinds={"pytorch", "arrow"},
    pool="gpu",
    description="Image and text embeddings by encoder `{encoder}`: float16, unit norm, in the row order of `raw_pool`. "
    "Memory-mapped Arrow.",
    parameters=encoder_parameters,
    inputs=_source,
    streams=True,
    operations=_operations,
    reads_pool=True,
)
def embeddings(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Embed shards in order."""
    models = step.context.models
    for due, some in _with_other_encoders(step, shards):
        others = {asset: models.encoder(asset.declared.names["encoder"]) for asset in due}
        found = embed_together(
            [models.encoder(step.names["encoder"]), *others.values()],
            _Rows(step, some),
            step.context.pool,
            on_rows=step.progress,
        )
        with contextlib.closing(found):
            for shard, (own, *theirs) in found:
                for asset, result in zip(others, theirs, strict=True):
                    _write_for(step, asset, due[asset][shard], result)
                yield shard, _outcome(step, shard, own)


def _outcome(step: Step, shard: str, found: Embeddings | EncoderError) -> Outcome:
    """Return the table of a shard's embeddings, or the error."""
    if isinstance(found, EncoderError):
        return found
    uids = step.read("raw_pool", shard, ["f0", "f1"])
    table = pa.table(
        {
            "f0": uids["f0"],
            "f1": uids["f1"],
            "image": vectors_to_column(found.image),
            "text": vectors_to_column(found.text),
        }
    )
    notes = {"notes": "\n".join(found.notes)} if found.notes else {}
    return Result(table, {"dimensions": int(found.image.shape[1]), **notes})


# Files that are written for the other encoders of the run

_Due = dict[PartitionedAsset, dict[str, Provenance]]


def _with_other_encoders(step: Step, shards: Sequence[str]) -> Iterator[tuple[_Due, list[str]]]:
    """Group the shards by the other encoders that are to be embedded with them.

    Yields:
        By encoder's asset and shard, the provenance of the file to be written; and the shards.
    """
    wanted: _Due = {}
    for asset in _others(step):
        due = {shard: found for shard in shards if (found := _due(step, asset, shard)) is not None}
        if due and _loads(step, asset):
            wanted[asset] = due
    groups: dict[tuple[PartitionedAsset, ...], list[str]] = {}
    for shard in shards:
        groups.setdefault(tuple(asset for asset, due in wanted.items() if shard in due), []).append(shard)
    for assets, some in groups.items():
        yield {asset: wanted[asset] for asset in assets}, some


def _others(step: Step) -> Iterator[PartitionedAsset]:
    """Yield the other embeddings that this run was asked for and that are computed from the pool's images, too."""
    encoders = step.context.settings.encoders
    if encoders[step.names["encoder"]].precomputed is not None:
        return
    for name, settings in encoders.items():
        key = f"embeddings/{name}"
        if name != step.names["encoder"] and settings.precomputed is None and key in step.requested:
            yield step.asset.assets[key]


def _loads(step: Step, asset: PartitionedAsset) -> bool:
    """Load an encoder's model; return False if that fails, since its own step will report why."""
    try:
        _ = step.context.models.encoder(asset.declared.names["encoder"]).loaded
    except EncoderError:
        return False
    return True


def _due(step: Step, asset: PartitionedAsset, shard: str) -> Provenance | None:
    """Return the provenance that the encoder's own step would write, or None if it would not write."""
    try:
        provenance = asset.provenance(step.snapshot, shard)
        return None if asset.written(step.snapshot, provenance) is not None else provenance
    except (NotReady, LakeError, EncoderError):
        return None  # its own step reports why


def _write_for(step: Step, asset: PartitionedAsset, provenance: Provenance, found: Embeddings | EncoderError) -> None:
    """Write another encoder's embeddings of a shard, with its own provenance and checks."""
    assert provenance.shard is not None
    outcome = _outcome(step, provenance.shard, found)
    if isinstance(outcome, Exception):
        return  # its own step tries again, and reports why
    try:
        stored = asset.write(step.snapshot, provenance, outcome)
    except Exception:  # noqa: BLE001 - its own step tries again, and raises it if it persists
        return
    step.state.written_for_others.add(stored.fingerprint)
    step.state.written[asset.key] += 1


class _Rows(Mapping[str, pa.Table]):
    """The rows of many shards, each read when its turn comes."""

    def __init__(self, step: Step, shards: Sequence[str]) -> None:
        self.step = step
        self.shards = shards

    def __getitem__(self, shard: str) -> pa.Table:
        return self.step.read("raw_pool", shard)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def check_vectors(vectors: np.ndarray, source: str) -> None:
    """Check that embeddings are finite and of unit norm.

    Args:
        vectors: float16 `[n, d]`.
        source: the file or asset they come from, for the message.

    Raises:
        ValueError: some are not; the message has the first bad row.
    """
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))
    if len(bad):
        raise ValueError(
            f"{source}: {len(bad)} rows are not of unit norm, the first is row {bad[0]} with norm {norms[bad[0]]}. "
            "Remedy: look at the encoder's output there"
        )
