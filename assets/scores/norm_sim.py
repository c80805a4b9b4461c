"""`norm_sim/<encoder>/<target>`: how similar each image is to a target set (arXiv 2405.19547, section 3.2)."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import selection
from assets.base.asset import Amount, Declared, Step
from assets.base.checks import Tables
from assets.base.columns import Bounds, Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, recorded_targets, require_encoders, require_targets
from assets.base.score_tables import to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import COSINE_TOLERANCE, rows_aligned, within_bounds
from assets.pool.target_embeddings import target_embeddings
from resources.lake.files import column_to_vectors

if TYPE_CHECKING:
    import torch

TARGETS = "target_embeddings/{encoder}/{target}"


@dataclass(frozen=True)
class Targets:
    """A target set on the device: its embeddings `[m, d]`, and their second moment `[d, d]` in float64."""

    vectors: "torch.Tensor"
    moment: "torch.Tensor"


def _targets(step: Step) -> Targets:
    vectors = to_tensor(column_to_vectors(step.read(TARGETS)["image"]))
    return Targets(vectors, selection.second_moment(vectors))


def _number_of_targets(tables: Tables) -> int:
    stored = tables.context.lake.stored(f"target_embeddings/{tables.asset.partition('/')[2]}")
    return stored.rows if stored is not None else 0


def _norm_bounds(tables: Tables) -> Bounds:
    return 0, _number_of_targets(tables) ** 0.5 * (1 + COSINE_TOLERANCE)


def _index_bounds(tables: Tables) -> Bounds:
    return 0, _number_of_targets(tables) - 1


def _operations(asset: Declared, amount: Amount) -> float | None:
    """Return the operations of the similarities with all targets, and of the product with their second moment."""
    targets = amount.inputs.get("target_embeddings")
    return None if targets is None else 2.0 * amount.rows * amount.dimensions * (targets + amount.dimensions)


@partitioned(
    key="norm_sim/{encoder}/{target}",
    deps=["embeddings/{encoder}", TARGETS],
    columns=[
        Column(
            name="norm_sim_2",
            type=pa.float32(),
            description="NormSim_2: root of the sum of squared cosines of the image and all targets; ≤ √targets.",
            direction="larger",
            bounds=_norm_bounds,
        ),
        Column(
            name="norm_sim_inf",
            type=pa.float32(),
            description="NormSim_∞: largest absolute cosine of the image and a target.",
            direction="larger",
            bounds=(0, 1 + COSINE_TOLERANCE),
        ),
        Column(
            name="nearest_target",
            type=pa.int64(),
            description="Index of that target in `target_embeddings`.",
            direction=None,
            bounds=_index_bounds,
            explains="nearest_target",
        ),
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="norm_sim",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="NormSim of each image to target set `{target}` by encoder `{encoder}`: p = 2 (root of the sum of "
    "squared cosines), p = ∞ (largest absolute cosine), and the index of the nearest target.",
    prepare=_targets,
    operations=_operations,
)
def norm_sim(shard: Shard, targets: Targets) -> Result:
    """Compute NormSim of one shard, and count its rows that are images of the target set."""
    from selection.scores.norm_sim import same_images

    def score(image: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        largest, nearest = selection.nearest_target(image, targets.vectors)
        same = same_images(image, targets.vectors, nearest, largest)
        return selection.norm_sim_from_moment(image, targets.moment), largest, nearest, same

    euclidean, largest, nearest, same = shard.map(score, "image")
    overlap = {
        "rows_in_target": int(same.sum()),
        "targets_in_shard": len(np.unique(nearest[same])),
    }
    return shard.scores(overlap, norm_sim_2=euclidean, norm_sim_inf=largest, nearest_target=nearest.astype(np.int64))


def configured(settings: ProjectSettings) -> Mapping[str, tuple[str, ...]]:
    """Return the target sets that NormSim compares to, by encoder: by default all with all."""
    found: Mapping[str, tuple[str, ...]] | None = settings.scores.norm_sim
    if found is None:
        return {encoder: tuple(settings.targets) for encoder in settings.encoders if settings.targets}
    return found


def _instances(settings: ProjectSettings) -> Iterable[dict[str, str]]:
    for encoder, targets in configured(settings).items():
        for target in targets:
            yield {"encoder": encoder, "target": target}


def _validate(settings: ProjectSettings) -> None:
    require_encoders(settings, "scores.norm_sim", settings.scores.norm_sim or ())
    for encoder, targets in configured(settings).items():
        require_targets(settings, f"scores.norm_sim.{encoder}", encoder, targets)


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    kept = {
        encoder: found
        for encoder, targets in configured(settings).items()
        if (found := [target for target in targets if f"norm_sim/{encoder}/{target}" in wanted])
    }
    targets = [target for found in kept.values() for target in found]
    return {"scores": {"norm_sim": kept}} | recorded_targets(settings, targets)


NORM_SIM = ScoreKind(
    name="norm_sim",
    asset=norm_sim,
    settings=dict[Name, tuple[Name, ...]] | None,
    configured=configured,
    instances=_instances,
    upstream=lambda settings: (target_embeddings.declare(settings, **names) for names in _instances(settings)),
    validate=_validate,
    recorded=_recorded,
    partial=True,
)
