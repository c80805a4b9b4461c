"""The settings of negCLIPLoss, of its reference negatives and of their drift check."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from assets.base.context import Context
from assets.base.settings import ProjectSettings
from resources.settings import Settings

REFERENCE_NEGATIVES = "reference_negatives"


class NegClipLossSettings(Settings):
    """How one encoder's negCLIPLoss is computed (arXiv 2405.19547; `docs/methods.md`).

    The defaults are the paper's. `temperature` is the encoder's own unless it is given. The estimator
    `reference_negatives` scores every row against the same draws; `random_partitions` is the paper's, and completes
    shards of fewer than B rows from the draws. The arithmetic `bfloat16` is faster on CPUs with such instructions;
    `docs/performance.md` has its error.
    """

    temperature: float | None = Field(default=None, ge=0.001, le=10.0)
    batch_size: int = Field(default=32_768, ge=1)
    draws: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    estimator: Literal["reference_negatives", "random_partitions"] = "reference_negatives"
    arithmetic: Literal["float32", "bfloat16"] = "float32"
    coverage: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the pool's shards that must have embeddings before negatives are drawn.",
    )
    redraw_at_growth: float | None = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="Negatives are drawn again when the pool has this many times the rows of the last draw's shards: 2 "
        "draws at twice, four and eight times the first size. Default: only on demand.",
    )


class DriftLimits(Settings):
    """When the drift check of negatives warns.

    Attributes:
        probe: rows that are scored against both sets of draws.
        rank_correlation: smallest Spearman correlation of the two scores that does not warn.
        changed: largest share of the probe rows that may change sides at a recipe's threshold without a warning.
    """

    probe: int = Field(default=1000, ge=2)
    rank_correlation: float = Field(default=0.98, ge=-1, le=1)
    changed: float = Field(default=0.02, ge=0, le=1)


def configured(settings: ProjectSettings) -> Mapping[str, NegClipLossSettings]:
    """Return the settings by encoder: by default the paper's for all encoders."""
    found: Mapping[str, NegClipLossSettings] | None = settings.scores.neg_clip_loss
    return {encoder: NegClipLossSettings() for encoder in settings.encoders} if found is None else found


def temperature(context: Context, encoder: str) -> float:
    """Return τ of an encoder's negCLIPLoss: the score's setting, else the encoder's own."""
    given = configured(context.settings)[encoder].temperature
    return context.models.encoder(encoder).temperature() if given is None else given
