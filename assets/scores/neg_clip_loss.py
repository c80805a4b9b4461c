"""`neg_clip_loss/<encoder>`: each pair's score against a batch of other pairs (arXiv 2405.19547)."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import selection
from assets.base.asset import Amount, Declared, Step
from assets.base.columns import Column
from assets.base.context import Context
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, recorded_entries, require_encoders
from assets.base.score_tables import to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import ZERO_TOLERANCE, rows_aligned, uid_records, within_bounds
from assets.scores.draws import read_draws, with_content
from assets.scores.neg_clip_loss_settings import (
    REFERENCE_NEGATIVES,
    DriftLimits,
    NegClipLossSettings,
    configured,
    temperature,
)
from assets.scores.negatives import negatives

if TYPE_CHECKING:
    import torch


def _settings(asset: Declared) -> NegClipLossSettings:
    return configured(asset.settings)[asset.names["encoder"]]


def _uses_reference_negatives(asset: Declared) -> bool:
    return _settings(asset).estimator == REFERENCE_NEGATIVES


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    parameters: dict[str, Any] = {
        "temperature": temperature(context, asset.names["encoder"]),
        "estimator": settings.estimator,
        "arithmetic": settings.arithmetic,
    }
    if not _uses_reference_negatives(asset):
        parameters |= {name: getattr(settings, name) for name in ("batch_size", "draws", "seed")}
    return parameters


def _operations(asset: Declared, amount: Amount) -> float:
    """Return the operations of the similarities of each row with the images and with the captions of all draws."""
    settings = _settings(asset)
    negatives = settings.draws * min(settings.batch_size, amount.pool)
    return 2.0 * 2 * amount.rows * negatives * amount.dimensions


Estimator = Callable[[Shard], Result]


def _estimator(step: Step) -> Estimator:
    """Return the function that scores a shard, with the draws on the device."""
    settings = _settings(step.asset.declared)
    tau = temperature(step.context, step.names["encoder"])
    uids, *vectors = read_draws(step.read("negatives/{encoder}"))
    negative_image, negative_text = (to_tensor(v) for v in vectors)
    if not _uses_reference_negatives(step.asset.declared):
        return lambda shard: _by_random_partitions(shard, settings, tau, uids, negative_image, negative_text)
    drawn = with_content(uids, *vectors)

    def score(shard: Shard) -> Result:
        import torch

        member = _members(drawn, shard)
        scores = np.empty(shard.embeddings.num_rows, np.float32)
        stderr = np.empty_like(scores)
        for rows, (image, text) in shard.chunks("image", "text"):
            found = selection.neg_clip_loss(
                image,
                text,
                negative_image,
                negative_text,
                temperature=tau,
                arithmetic=settings.arithmetic,
                member=torch.from_numpy(member[:, rows]).to(image.device),
            )
            scores[rows], stderr[rows] = (f.cpu().numpy() for f in found)
        return _result(shard, scores, stderr, uids.shape, tau)

    return score


def _members(drawn: np.ndarray, shard: Shard) -> np.ndarray:
    """Return which rows of a shard are in which draw, `[K, n]` bool."""
    from selection.scores.negatives import membership

    rows = with_content(uid_records(shard.embeddings), shard.vectors("image"), shard.vectors("text"))
    return membership(drawn, rows["f0"].copy(), rows["f1"].copy())


def _by_random_partitions(
    shard: Shard,
    settings: NegClipLossSettings,
    tau: float,
    drawn: np.ndarray,
    negative_image: "torch.Tensor",
    negative_text: "torch.Tensor",
) -> Result:
    """Score a shard by the paper's estimator, with the draws as the rows that complete a shard of fewer than B rows."""
    import torch

    from selection.scores.negatives import keyed_hash, outside

    f0, f1 = shard.embeddings["f0"].to_numpy(), shard.embeddings["f1"].to_numpy()
    if not len(f0):
        return _result(shard, np.empty(0, np.float32), np.empty(0, np.float32), drawn.shape, tau)
    # The rows of a batch depend on the seed and the uids, not on the order in the shard.
    order = np.lexsort((f1, f0, keyed_hash(settings.seed, 0, f0, f1)))
    image, text = (to_tensor(shard.vectors(side)[order]) for side in ("image", "text"))
    found = selection.neg_clip_loss_in_batches(
        image,
        text,
        temperature=tau,
        batch_size=drawn.shape[1],
        draws=settings.draws,
        seed=settings.seed,
        fill_image=negative_image,
        fill_text=negative_text,
        fill_allowed=torch.from_numpy(outside(drawn, f0, f1)).to(image.device),
        arithmetic=settings.arithmetic,
    )
    scores = np.empty(len(order), np.float32)
    scores[order] = found.cpu().numpy()
    shard.step.progress(len(order), shard.name)
    return _result(shard, scores, np.full_like(scores, np.nan), drawn.shape, tau)


def _result(shard: Shard, scores: np.ndarray, stderr: np.ndarray, shape: tuple[int, ...], tau: float) -> Result:
    summary = {"temperature": tau, "draws": shape[0], "batch_size": shape[1]}
    return shard.scores(summary, neg_clip_loss=scores, neg_clip_loss_stderr=stderr)


@partitioned(
    key="neg_clip_loss/{encoder}",
    deps=["embeddings/{encoder}", "negatives/{encoder}"],
    columns=[
        Column(
            name="neg_clip_loss",
            type=pa.float32(),
            description="CLIPScore minus the normalization by other captions and images, mean over the draws; ≤ 0.",
            direction="larger",
            bounds=(-np.inf, ZERO_TOLERANCE),
        ),
        Column(
            name="neg_clip_loss_stderr",
            type=pa.float32(),
            description="Standard error over the draws; NaN with one draw and with random partitions.",
            direction=None,
            bounds=None,
        ),
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="neg_clip_loss",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="negCLIPLoss by encoder `{encoder}`: CLIPScore minus the score that the pair's image and caption get "
    "with others, mean over the draws; at most 0, larger is better; with its standard error.",
    parameters=_parameters,
    prepare=_estimator,
    operations=_operations,
)
def neg_clip_loss(shard: Shard, score: Estimator) -> Result:
    """Compute negCLIPLoss of one shard."""
    return score(shard)


def _upstream(settings: ProjectSettings) -> Iterable[Declared]:
    for encoder in configured(settings):
        yield negatives.declare(settings, encoder=encoder)


NEG_CLIP_LOSS = ScoreKind(
    name="neg_clip_loss",
    asset=neg_clip_loss,
    settings=dict[Name, NegClipLossSettings] | None,
    extra_settings={"drift": (DriftLimits, DriftLimits())},
    configured=configured,
    instances=lambda settings: [{"encoder": encoder} for encoder in configured(settings)],
    upstream=_upstream,
    validate=lambda settings: require_encoders(settings, "scores.neg_clip_loss", settings.scores.neg_clip_loss or ()),
    recorded=lambda settings, wanted: recorded_entries(
        "neg_clip_loss", configured(settings), wanted, lambda encoder: [f"neg_clip_loss/{encoder}"]
    ),
    partial=True,
)
