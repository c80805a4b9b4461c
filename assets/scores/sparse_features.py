"""`sparse_features/<encoder>`: the concepts of each image; `target_concepts/<encoder>/<target>`: those of a target set.

Distribution matching (SDM, openreview cgmo3v18sx; `docs/methods/sdm.md`) selects rows by both.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, Step
from assets.base.checks import Check, Finding, Tables
from assets.base.columns import Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, recorded_entries, recorded_targets, require_encoders, require_targets
from assets.base.score_tables import to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned
from assets.base.unpartitioned import unpartitioned
from assets.pool.target_embeddings import target_embeddings
from assets.scores.sparse_autoencoder import (
    AUTOENCODER,
    SparseFeatureSettings,
    autoencoder_k,
    configured,
    read_autoencoder,
    sparse_autoencoder,
)
from resources.lake.files import LakeError, column_to_vectors

if TYPE_CHECKING:
    from selection.scores.sparse_autoencoder import SparseAutoencoder

TARGETS = "target_embeddings/{encoder}/{target}"
SHARES = pa.schema(
    [
        pa.field("concept", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
    ]
)


def _autoencoder(step: Step) -> "SparseAutoencoder":
    stored = step.stored(AUTOENCODER)
    assert stored is not None
    return read_autoencoder(step.read(AUTOENCODER), autoencoder_k(stored))


def _features_sound(asset: Declared) -> Check:
    concepts = configured(asset.settings)[asset.names["encoder"]].concepts

    def run(tables: Tables) -> Finding:
        table = tables.read()
        index, value = (column_to_vectors(table[name]) for name in ("concepts", "concept_values"))
        figures = {"rows": len(index), "rows_without_concepts": int((~(value > 0).any(axis=1)).sum())}
        if index.shape != value.shape:
            return Finding(False, figures, f"concepts are {index.shape} and concept_values {value.shape}")
        if index.size and not 0 <= index.min() <= index.max() < concepts:
            return Finding(False, figures, f"concepts are from {index.min()} to {index.max()}, not below {concepts}")
        if not (np.isfinite(value).all() and (value >= 0).all()):
            return Finding(False, figures, "a value is negative or not finite")
        return Finding(True, figures)

    return Check("features_sound", "k concepts a row, each with a finite value that is not negative.", run)


@partitioned(
    key="sparse_features/{encoder}",
    deps=["embeddings/{encoder}", AUTOENCODER],
    columns=[
        Column(
            name="concepts",
            type=pa.list_(pa.int32()),
            sql_type="INTEGER[]",
            description="The k concepts that the image activates most, rising; filled up with 0 in front.",
            direction=None,
            bounds=None,
        ),
        Column(
            name="concept_values",
            type=pa.list_(pa.float16()),
            sql_type="FLOAT[]",
            description="How strongly the image activates each of them, above 0; 0 where `concepts` is filled up.",
            direction=None,
            bounds=None,
        ),
    ],
    checks=[rows_aligned, _features_sound],
    code_version="1",
    group_name="sparse_features",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="The concepts of each image by encoder `{encoder}`: k concepts of `sparse_autoencoder/{encoder}` with "
    "their values.",
    prepare=_autoencoder,
)
def sparse_features(shard: Shard, model: "SparseAutoencoder") -> Result:
    """Compute the concepts of the images of one shard."""
    identity = shard.embeddings
    parts = [[part.cpu().numpy() for part in model.encode(image)] for _, (image,) in shard.chunks("image")]
    empty = [np.empty((0, model.k), np.int32), np.empty((0, model.k), np.float16)]
    index, value = (np.concatenate([empty[n], *(part[n] for part in parts)]) for n in range(2))
    table = pa.table(
        {
            "shard": pa.array([shard.name] * identity.num_rows, pa.string()),
            "f0": identity["f0"],
            "f1": identity["f1"],
            "concepts": _lists(index),
            "concept_values": _lists(value),
        }
    )
    active = int((value > 0).sum())
    summary = {"concepts_found": len(np.unique(index[value > 0]))}
    return Result(table, summary | ({"concepts_per_row": active / len(index)} if len(index) else {}))


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


@unpartitioned(
    key="target_concepts/{encoder}/{target}",
    deps=[AUTOENCODER, TARGETS],
    columns=SHARES,
    checks=[],
    code_version="1",
    group_name="sparse_features",
    kinds={"pytorch", "parquet"},
    description="How the images of target set `{target}` are distributed over the concepts of "
    "`sparse_autoencoder/{encoder}`.",
)
def target_concepts(step: Step) -> Result:
    """Compute each concept's share of the target's features."""
    from selection.recipes.distribution import Features, concept_distribution, effective_concepts

    concepts = step.read(AUTOENCODER, columns=["concept", "label"]).slice(0, _concepts(step))
    image = to_tensor(column_to_vectors(step.read(TARGETS)["image"]))
    index, value = (part.cpu().numpy() for part in _autoencoder(step).encode(image))
    try:
        share = concept_distribution(Features(index, value), concepts.num_rows)
    except ValueError as error:
        raise LakeError(f"{step.asset.key}: {error}") from error
    active = value > 0
    rows = np.bincount(index[active], minlength=concepts.num_rows)
    table = pa.table({**{name: concepts[name] for name in concepts.column_names}, "rows": rows, "share": share})
    return Result(table, {"concepts_found": int((share > 0).sum()), "effective_concepts": effective_concepts(share)})


def _concepts(step: Step) -> int:
    return configured(step.context.settings)[step.names["encoder"]].concepts


def _targets(settings: ProjectSettings) -> Iterable[dict[str, str]]:
    for encoder, chosen in configured(settings).items():
        for target in chosen.targets:
            yield {"encoder": encoder, "target": target}


def _upstream(settings: ProjectSettings) -> Iterable[Declared]:
    for encoder in configured(settings):
        yield sparse_autoencoder.declare(settings, encoder=encoder)
    for names in _targets(settings):
        yield target_embeddings.declare(settings, **names)
        yield target_concepts.declare(settings, **names)


def _validate(settings: ProjectSettings) -> None:
    require_encoders(settings, "scores.sparse_features", configured(settings))
    for encoder, chosen in configured(settings).items():
        require_targets(settings, f"scores.sparse_features.{encoder}", encoder, chosen.targets)


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    chosen = configured(settings)
    entries = recorded_entries("sparse_features", chosen, wanted, lambda encoder: [f"sparse_features/{encoder}"])
    targets = [target for encoder in entries["scores"]["sparse_features"] for target in chosen[encoder].targets]
    return entries | recorded_targets(settings, targets)


SPARSE_FEATURES: ScoreKind[Mapping[str, SparseFeatureSettings]] = ScoreKind(
    name="sparse_features",
    asset=sparse_features,
    settings=dict[Name, SparseFeatureSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"encoder": encoder} for encoder in configured(settings)],
    upstream=_upstream,
    validate=_validate,
    recorded=_recorded,
)
