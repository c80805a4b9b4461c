"""`embeddings/<encoder>`: unit-norm float16 embeddings of a shard's images and captions, in `raw_pool`'s order.

When a run asks for several encoders, the first one's step decodes the images for all of them and writes what the
others are missing too (`docs/decisions/0006-decode-once.md`); their own steps then find their files fresh.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from assets.base.checks import checks_of
from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, input_fingerprint, sharded_asset, write
from assets.project import Project
from resources.lake.files import LakeError, Provenance, vectors_to_column
from resources.models.encoders import Embeddings, EncoderError, embed_together

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
    key = _key(encoder)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        for along, some in _with_others(project, encoder, shards):
            others = {name: project.encoder(name) for name in along}
            rows = _Rows(project, some)
            found = embed_together(
                [project.encoder(encoder), *others.values()],
                rows,
                project.pool,
                on_rows=lambda done: project.on_progress(key, "", done),
            )
            with contextlib.closing(found):
                for shard, (own, *theirs) in found:
                    for name, result in zip(others, theirs, strict=True):
                        _write_along(project, name, along[name][shard], result)
                    yield shard, _outcome(project, shard, own)

    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool",),
        provenance=lambda shard: _provenance(project, encoder, shard),
        compute=compute,
        code_version=CODE_VERSION,
        group="embeddings",
        kinds={"pytorch", "arrow"},
        description=f"Image and text embeddings by encoder `{encoder}`: float16, unit norm, row for row the order "
        "of `raw_pool`. Memory-mapped Arrow.",
        columns=SCHEMA,
        pool="gpu",
    )


def _key(encoder: str) -> str:
    return f"embeddings/{encoder}"


def _provenance(project: Project, encoder: str, shard: str) -> Provenance:
    inputs = {"raw_pool": input_fingerprint(project, "raw_pool", shard)}
    if project.settings.encoders[encoder].precomputed is not None:
        inputs["source"] = project.listing()[shard]
    return Provenance(_key(encoder), shard, CODE_VERSION, parameters(project, encoder), inputs)


def _outcome(project: Project, shard: str, found: Embeddings | EncoderError) -> Outcome:
    """Give the table of a shard's embeddings, or the error."""
    if isinstance(found, EncoderError):
        return found
    uids = project.lake.read("raw_pool", shard, ["f0", "f1"])
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


# What is written for the other encoders of the run


def _with_others(
    project: Project, encoder: str, shards: Sequence[str]
) -> Iterator[tuple[dict[str, dict[str, Provenance]], list[str]]]:
    """Part the shards by the other encoders that are to be embedded with them.

    Yields:
        By encoder and shard, the provenance of what is to be written; and the shards.
    """
    parts: dict[tuple[str, ...], list[str]] = {}
    wanted: dict[str, dict[str, Provenance]] = {}
    for name in _others(project, encoder):
        due = {shard: found for shard in shards if (found := _due(project, name, shard)) is not None}
        if due and _loads(project, name):
            wanted[name] = due
    for shard in shards:
        parts.setdefault(tuple(name for name, due in wanted.items() if shard in due), []).append(shard)
    for names, some in parts.items():
        yield {name: wanted[name] for name in names}, some


def _others(project: Project, encoder: str) -> Iterator[str]:
    """Name the other encoders that this run was asked for and that embed the pool's images, too."""
    encoders = project.settings.encoders
    if encoders[encoder].precomputed is not None:
        return
    for name, settings in encoders.items():
        if name != encoder and settings.precomputed is None and _key(name) in project.asked:
            yield name


def _loads(project: Project, encoder: str) -> bool:
    """Load an encoder's model, if it can be loaded; if not, its own step says why."""
    try:
        _ = project.encoder(encoder).loaded
    except EncoderError:
        return False
    return True


def _due(project: Project, encoder: str, shard: str) -> Provenance | None:
    """Give the provenance that the encoder's own step would write, or None if it would not write."""
    try:
        provenance = _provenance(project, encoder, shard)
        stored = project.lake.stored(_key(encoder), shard)
    except (NotReady, LakeError, EncoderError):
        return None  # its own step says why
    return None if stored is not None and stored.is_from(provenance) else provenance


def _write_along(project: Project, encoder: str, provenance: Provenance, found: Embeddings | EncoderError) -> None:
    """Write another encoder's embeddings of a shard, with its own provenance and checks."""
    assert provenance.shard is not None
    outcome = _outcome(project, provenance.shard, found)
    if isinstance(outcome, Exception):
        return  # its own step tries again, and says why
    key = _key(encoder)
    try:
        stored = write(project, key, checks_of(project, key), provenance, outcome)
    except Exception:  # noqa: BLE001 - its own step tries again, and raises it if it stays
        return
    project.made_along.add(stored.fingerprint)


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
