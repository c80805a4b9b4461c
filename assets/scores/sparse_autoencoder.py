"""`sparse_autoencoder/<encoder>`: the concepts of a pool's images, which distribution matching selects by.

A k-sparse autoencoder of image embeddings (SDM, openreview cgmo3v18sx; `docs/methods/sdm.md`), trained on a sample of
the pool. Like negatives, it is kept while shards arrive.

A run works in `<lake>/sparse_autoencoder/<encoder>/`. It saves a checkpoint every minute, and an interrupted run
continues from there. The folder keeps the contact sheet of the largest concepts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.checks import Check, Finding, Tables
from assets.base.contact_sheets import Sheet, markdown, small_jpeg
from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.results import NotReady, Result
from assets.base.score_tables import to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.tiles import read_tiles
from assets.base.unpartitioned import unpartitioned
from assets.pool.embeddings import embeddings, encoder_parameters
from assets.scores.draws import sample
from resources.lake.files import Stored, column_to_vectors
from resources.lake.scratch import WorkFolder
from resources.settings import Settings

if TYPE_CHECKING:
    from selection.scores.sparse_autoencoder import Checkpoint, SparseAutoencoder

AUTOENCODER = "sparse_autoencoder/{encoder}"
_CHECKPOINT, SHEET_FILE = "checkpoint.npz", "sheet.md"
_CHECKPOINT_SECONDS = 60
_LABEL_ROWS = 16  # whose captions name a concept
_SHEETS, _TILES, _SIDE, _BYTES = 8, 6, 96, 2_000  # the sheet is part of an event, which has room for 256 KB
_BIAS = -1  # the concept whose decoder row is b

CONCEPTS = pa.schema(
    [
        pa.field("concept", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("mass", pa.float64(), nullable=False),
        pa.field("encoder", pa.list_(pa.float32()), nullable=False),
        pa.field("encoder_bias", pa.float32(), nullable=False),
        pa.field("decoder", pa.list_(pa.float32()), nullable=False),
    ]
)


class SparseFeatureSettings(Settings):
    """How one encoder's images are taken apart into concepts (`docs/methods/sdm.md`).

    Attributes:
        targets: target sets whose distribution over the concepts is computed.
        concepts: number of concepts, d.
        k: largest number of concepts of a row.
        sample: rows of the pool that the autoencoder is trained on.
        steps: batches of the training.
        batch: rows of a batch.
        learning_rate: Adam's.
        monotonicity: weight of the monotonicity loss; 0 leaves it out.
        seed: chooses the sample, the batches and the start.
    """

    targets: tuple[Name, ...] = Field(min_length=1)
    concepts: int = Field(default=8_192, ge=1)
    k: int = Field(default=32, ge=1)
    sample: int = Field(default=500_000, ge=1)
    steps: int = Field(default=2_000, ge=1)
    batch: int = Field(default=1_024, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    monotonicity: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _sparse(self) -> "SparseFeatureSettings":
        if self.k > self.concepts:
            raise ValueError(f"k: a row can't have {self.k} of {self.concepts} concepts. Remedy: a smaller k")
        return self


def configured(settings: ProjectSettings) -> Mapping[str, SparseFeatureSettings]:
    """Return the settings by encoder."""
    found: Mapping[str, SparseFeatureSettings] = settings.scores.sparse_features
    return found


def _settings(asset: Declared) -> SparseFeatureSettings:
    return configured(asset.settings)[asset.names["encoder"]]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    return {
        **encoder_parameters(context, asset),
        "embeddings_version": embeddings.code_version,
        **_settings(asset).model_dump(exclude={"targets"}),
    }


def _embedded(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    source = f"embeddings/{asset.declared.names['encoder']}"
    found, total = embedded_shards(snapshot, source), len(snapshot.listing)
    if not found or len(found) < total / 2:
        raise NotReady(
            f"{len(found)} of the pool's {total} shards have {source}, too few to represent it. "
            f"Remedy: materialize {source} for the others first"
        )
    return found


def _sound(tables: Tables) -> Finding:
    table = tables.read()
    figures = {"concepts": table.num_rows - 1}
    for column in ("encoder", "encoder_bias", "decoder"):
        values = table[column].to_numpy() if column == "encoder_bias" else column_to_vectors(table[column])
        if not np.isfinite(values).all():
            return Finding(False, figures, f"{column} is not finite. Remedy: a smaller learning_rate")
    return Finding(True, figures)


def _sheet(context: Context, asset: Declared) -> Mapping[str, Any]:
    """Return the contact sheet as metadata, if there is one."""
    place = f"{context.lake.root}/{AUTOENCODER.format(**asset.names)}/{SHEET_FILE}"
    if not context.lake.exists(place):
        return {}
    return {"largest_concepts": dg.MetadataValue.md(context.lake.store.read(place).decode())}


@unpartitioned(
    key=AUTOENCODER,
    deps=[Dep("raw_pool", recorded=False), Dep("embeddings/{encoder}", recorded=False)],
    columns=CONCEPTS,
    checks=[lambda _: Check("parameters_finite", "All parameters are finite.", _sound)],
    code_version="1",
    group_name="sparse_features",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="The concepts of the pool's images by encoder `{encoder}`: a k-sparse autoencoder, trained on a sample "
    "of the pool and kept while shards arrive. Interrupted runs resume from the last checkpoint.",
    parameters=_parameters,
    inputs=_embedded,
    keeps=lambda asset, stored, snapshot: True,
    stays=lambda asset, stored: True,
    metadata=_sheet,
)
def sparse_autoencoder(step: Step) -> Result:
    """Train on a sample of the pool, and name the concepts."""
    from selection.scores.concept_labels import concept_labels, strongest_rows
    from selection.scores.sparse_autoencoder import fit

    settings, source = _settings(step.asset.declared), f"embeddings/{step.names['encoder']}"
    lake, shards = step.context.lake, list(embedded_shards(step.snapshot, source))
    chosen, vectors = sample(step.snapshot, source, shards, size=settings.sample, seed=settings.seed, spread=step.map)
    if not len(chosen):
        raise NotReady(f"{source} has no rows to train on. Remedy: a pool with rows")
    image = to_tensor(vectors)
    work = WorkFolder(lake, step.asset.key)
    model = _train(step, settings, image, work)
    parts = [model.encode(part) for part in image.split(1 << 16)]
    index, value = (np.concatenate([part[n].cpu().numpy() for part in parts]) for n in range(2))
    strongest = strongest_rows(index, value, _LABEL_ROWS)
    labels = concept_labels(strongest, _captions(step, shards, chosen, strongest))
    table = _table(model, index, value, labels)
    _write_sheet(step, shards, chosen, strongest, table)
    measured = fit(model, image)
    work.remove_parts("checkpoint")
    return Result(
        table,
        {
            "rows_sampled": len(chosen),
            "concepts": settings.concepts,
            "reconstruction_error": measured.reconstruction_error,
            "dead_share": measured.dead_share,
            "concepts_named": sum(bool(label) for label in labels.values()),
        },
    )


def read_autoencoder(table: pa.Table, k: int) -> "SparseAutoencoder":
    """Return the autoencoder that a table of `sparse_autoencoder` holds, on the device."""
    from selection.scores.sparse_autoencoder import SparseAutoencoder

    encoder, decoder = (to_tensor(column_to_vectors(table[name])) for name in ("encoder", "decoder"))
    bias = to_tensor(table["encoder_bias"].to_numpy())
    return SparseAutoencoder(encoder[:-1], bias[:-1], decoder[:-1], decoder[-1], k)


def _train(step: Step, settings: SparseFeatureSettings, image: Any, work: WorkFolder) -> "SparseAutoencoder":
    """Train, from the last checkpoint if there is one of the same training."""
    from selection.scores.sparse_autoencoder import Training, train_sparse_autoencoder

    wanted = step.wanted[None].digest()
    training = Training(**settings.model_dump(exclude={"targets", "sample"}))
    checkpoint = _checkpoint(work) if work.is_of(wanted) else None
    if checkpoint is None:
        work.begin({"provenance": wanted}, {})
        work.remove_parts("checkpoint")
        work.save()
    step.expect((settings.steps - (0 if checkpoint is None else int(checkpoint["done"]))) * settings.batch)
    saved = time.monotonic()

    def on_step(done: int, state: "Callable[[], Checkpoint]") -> None:
        nonlocal saved
        step.progress(settings.batch)
        if done == settings.steps or time.monotonic() - saved > _CHECKPOINT_SECONDS:
            with work.writing(_CHECKPOINT) as path, open(path, "wb") as file:
                np.savez(file, **state())  # type: ignore[arg-type]
            saved = time.monotonic()

    return train_sparse_autoencoder(image, training, checkpoint=checkpoint, on_step=on_step)


def _checkpoint(work: WorkFolder) -> "Checkpoint | None":
    found = work.parts("checkpoint")
    if not found:
        return None
    with np.load(work.lake.store.local(found[0]), allow_pickle=False) as arrays:
        return dict(arrays)


def _captions(
    step: Step, shards: Sequence[str], chosen: np.ndarray, strongest: Mapping[int, np.ndarray]
) -> dict[int, str]:
    """Read the captions of the concepts' strongest rows, by row of the sample."""
    rows = np.unique(np.concatenate([*strongest.values(), np.empty(0, np.int64)])).astype(np.int64)
    captions: dict[int, str] = {}
    for number in np.unique(chosen["shard"][rows]):
        of_shard = rows[chosen["shard"][rows] == number]
        column = step.read("raw_pool", shards[number], ["caption"])["caption"]
        found = column.take(chosen["row"][of_shard]).to_pylist()
        captions.update(zip(of_shard.tolist(), (caption or "" for caption in found), strict=True))
    return captions


def _table(model: "SparseAutoencoder", index: np.ndarray, value: np.ndarray, labels: Mapping[int, str]) -> pa.Table:
    """Return the parameters and figures of each concept; the last row, concept −1, has b as its decoder row."""
    concepts = len(model.encoder)
    active = value > 0

    def vectors(rows: Any, last: np.ndarray) -> pa.Array:
        whole = np.concatenate([rows.cpu().numpy(), last[None]]).astype(np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(whole.reshape(-1)), whole.shape[1])

    def column(values: Sequence[Any] | np.ndarray, last: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([*values, last], kind)

    bias = model.bias.cpu().numpy()
    mass = np.bincount(index[active], value[active].astype(np.float64), minlength=concepts)
    return pa.table(
        {
            "concept": column(range(concepts), _BIAS, pa.int32()),
            "label": column([labels.get(concept, "") for concept in range(concepts)], "", pa.string()),
            "rows": column(np.bincount(index[active], minlength=concepts), 0, pa.int64()),
            "mass": column(mass, 0.0, pa.float64()),
            "encoder": vectors(model.encoder, np.zeros_like(bias)),
            "encoder_bias": column(model.encoder_bias.cpu().numpy(), 0.0, pa.float32()),
            "decoder": vectors(model.decoder, bias),
        }
    )


def _write_sheet(
    step: Step, shards: Sequence[str], chosen: np.ndarray, strongest: Mapping[int, np.ndarray], table: pa.Table
) -> None:
    """Write the images that activate each of the largest concepts most."""
    figures = pl.DataFrame(table.select(["concept", "label", "rows", "mass"])).filter(pl.col("rows") > 0)
    largest = figures.sort(["mass", "concept"], descending=[True, False]).head(_SHEETS)
    rows = {concept: strongest[concept][:_TILES] for concept in largest["concept"]}
    wanted = np.unique(np.concatenate([*rows.values(), np.empty(0, np.int64)])).astype(np.int64)
    uids = pl.DataFrame(
        {
            "f0": chosen["f0"][wanted],
            "f1": chosen["f1"][wanted],
            "shard": [shards[number] for number in chosen["shard"][wanted]],
        }
    )
    tiles = read_tiles(step.context, uids)
    sheets = []
    for concept, label, count, _ in largest.iter_rows():
        shown = [tiles[int(chosen["f0"][row]), int(chosen["f1"][row])] for row in rows[concept]]
        small = [
            tile if tile.image is None else replace(tile, image=small_jpeg(tile.image, _SIDE, most_bytes=_BYTES))
            for tile in shown
        ]
        title = f"Concept {concept}" + (f": {label}" if label else "")
        sheets.append(markdown(Sheet(title, f"{count:,} rows of the sample; the strongest first.", small), _TILES, 40))
    place = f"{step.context.lake.root}/{step.asset.key}/{SHEET_FILE}"
    step.context.lake.put(place, "\n\n".join(sheets).encode())


def autoencoder_k(stored: Stored) -> int:
    """Return k of a stored autoencoder."""
    return int(stored.provenance.parameters["k"])
