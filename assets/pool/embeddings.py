"""`embeddings/<encoder>`: unit-norm float16 embeddings of a shard's images and captions, in the order of `raw_pool`.

When a run computes several encoders, the first one's step decodes the images for all of them and writes the missing
files of the others too (`docs/decisions/0006-decode-once.md`). Their own steps then find those files up to date.

An encoder with `of: subset/<recipe>` embeds only the rows of that subset (`docs/decisions/0018-cascade.md`). Its files
have those rows alone, in the order of `raw_pool`; scores that are computed from them are NULL for the others.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Amount, Declared, Dep, FileAsset, Step
from assets.base.context import Context, Snapshot
from assets.base.partitioned import PartitionedAsset, partitioned
from assets.base.results import NotReady, Outcome, Result
from assets.base.standard_checks import rows_aligned, uid_records, unit_norm
from assets.base.subset_rows import SubsetRows, subset_rows_input
from core.uids import first_places
from resources.lake.files import LakeError, Provenance, vectors_to_column
from resources.lake.gather import read_rows
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


def embedding_parameters(context: Context, asset: Declared) -> dict[str, Any]:
    """Return `encoder_parameters`, and the subset whose rows are embedded if it is not the pool."""
    return encoder_parameters(context, asset) | ({"of": asset.of} if asset.of is not None else {})


def _deps(asset: Declared) -> Sequence[str | Dep]:
    return ["raw_pool", *([Dep(asset.of, recorded=False)] if asset.of is not None else [])]


def _inputs(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    if asset.declared.of is not None:
        return subset_rows_input(asset, snapshot, asset.declared.of, shard)
    encoder = snapshot.context.settings.encoders[asset.declared.names["encoder"]]
    return {"source": snapshot.listing[shard]} if encoder.precomputed is not None else {}


def _operations(asset: Declared, amount: Amount) -> float | None:
    if asset.settings.encoders[asset.names["encoder"]].precomputed is not None:
        return 0.0
    return None if amount.image is None or amount.text is None else amount.rows * (amount.image + amount.text)


def _description(asset: Declared) -> str:
    rows = f"only the rows of `{asset.of}`, " if asset.of is not None else ""
    return (
        f"Image and text embeddings by encoder `{asset.names['encoder']}`: {rows}float16, unit norm, in the row order "
        "of `raw_pool`. Memory-mapped Arrow."
    )


@partitioned(
    key="embeddings/{encoder}",
    deps=_deps,
    columns=SCHEMA,
    checks=[rows_aligned, unit_norm("image", "text")],
    code_version="1",
    group_name="embeddings",
    kinds={"pytorch", "arrow"},
    pool="gpu",
    description=_description,
    parameters=embedding_parameters,
    inputs=_inputs,
    streams=True,
    every_row=lambda asset: asset.of is None,
    operations=_operations,
    reads_pool=True,
)
def embeddings(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Embed shards in order."""
    models = step.context.models
    for due, some in _with_other_encoders(step, shards):
        others = {asset: models.encoder(asset.declared.names["encoder"]) for asset in due}
        rows = _Rows(step, some)
        found = embed_together(
            [models.encoder(step.names["encoder"]), *others.values()],
            rows,
            step.context.pool,
            on_rows=step.progress,
        )
        with contextlib.closing(found):
            for shard, (own, *theirs) in found:
                for asset, result in zip(others, theirs, strict=True):
                    _write_for(step, asset, due[asset][shard], result)
                yield shard, own if isinstance(own, EncoderError) else rows.result(shard, own)


def _result(uids: pa.Table, found: Embeddings) -> Result:
    """Return the table of a shard's embeddings."""
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
    """Yield the other embeddings that this run was asked for and that embed all of the pool's images, too."""
    of_all_images = [
        name
        for name, settings in step.context.settings.encoders.items()
        if settings.precomputed is None and settings.of is None
    ]
    if step.names["encoder"] not in of_all_images:
        return
    for name in of_all_images:
        key = f"embeddings/{name}"
        if name != step.names["encoder"] and key in step.requested:
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
    if isinstance(found, EncoderError):
        return  # its own step tries again, and reports why
    uids = step.read("raw_pool", provenance.shard, ["f0", "f1"])
    try:
        stored = asset.write(step.snapshot, provenance, _result(uids, found))
    except Exception:  # noqa: BLE001 - its own step tries again, and raises it if it persists
        return
    step.state.written_for_others.add(stored.fingerprint)
    step.state.written[asset.key] += 1


@dataclass(frozen=True)
class _Part:
    """The rows of a shard that an encoder with `of` covers.

    Attributes:
        uids: f0 and f1 of the rows.
        at: their places in the stored file, int64 `[n]`; -1 for a row that is to be embedded.
    """

    uids: pa.Table
    at: np.ndarray


class _Rows(Mapping[str, pa.Table]):
    """The rows to embed of many shards, each shard read when its turn comes.

    With `of`, these are the rows of the subset that the stored file does not have. Its other rows are taken over, so a
    version that selects a few other rows costs only those.
    """

    def __init__(self, step: Step, shards: Sequence[str]) -> None:
        self.step = step
        self.shards = shards
        self._subset = SubsetRows.newest(step, step.asset.declared.of)
        self._parts: dict[str, _Part] = {}

    def __getitem__(self, shard: str) -> pa.Table:
        if self._subset is None:
            return self.step.read("raw_pool", shard)
        try:
            pool = self.step.read("raw_pool", shard)
            places = first_places(uid_records(pool), uid_records(self._subset.uids(shard)))
            rows = pool.take(pa.array(places))
            part = _Part(rows.select(["f0", "f1"]), self._stored(shard, uid_records(rows)))
        except (LakeError, NotReady) as error:
            raise OSError(str(error)) from error  # which stays with its shard
        self._parts[shard] = part
        return rows.filter(pa.array(part.at < 0))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def _stored(self, shard: str, uids: np.ndarray) -> np.ndarray:
        """Return the places of rows in the stored file, -1 where it lacks them or another encoder made it."""
        at = np.full(len(uids), -1)
        asset = self.step.asset
        stored, wanted = self.step.stored(asset.key, shard), self.step.wanted[shard]
        if stored is None:
            return at
        old = stored.provenance
        if (
            old.code_version == wanted.code_version
            and old.parameters.get("encoder") == wanted.parameters["encoder"]
            and old.inputs.get("raw_pool") == wanted.inputs["raw_pool"]
        ):
            known = uid_records(self.step.read(asset.key, shard, ["f0", "f1"]))
            # Both have the order of `raw_pool`.
            at[first_places(uids, known)] = first_places(known, uids)
        return at

    def result(self, shard: str, found: Embeddings) -> Result:
        """Return the table of a shard's embeddings, given those of its rows to embed."""
        if self._subset is None:
            return _result(self.step.read("raw_pool", shard, ["f0", "f1"]), found)
        part = self._parts.pop(shard)
        is_stored = part.at >= 0
        sides = [found.image, found.text]
        if is_stored.any():
            lake, key = self.step.context.lake, self.step.asset.key
            for side, kept in enumerate(read_rows(lake, key, ["image", "text"], shard, part.at[is_stored])):
                both = np.empty((len(part.at), kept.shape[1]), np.float16)
                both[is_stored], both[~is_stored] = kept, sides[side]
                sides[side] = both
        result = _result(part.uids, replace(found, image=sides[0], text=sides[1]))
        counts = {"embedded": int((~is_stored).sum()), "taken_over": int(is_stored.sum())}
        return Result(result.table, {**result.summary, **counts})


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
