"""`clip_score/<encoder>`: CLIPScore, the cosine of an image and its caption. With a DFN encoder, the DFN score."""

import numpy as np
import pyarrow as pa

import selection
from assets.base.asset import Declared
from assets.base.checks import Check, Finding, Tables, not_compared
from assets.base.columns import Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, require_encoders
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import COSINE_BOUNDS, rows_aligned, within_bounds

POOL_SCORE_TOLERANCE = 0.02  # twice what resized images cause; stored embeddings come within 0.003
POOL_SCORES = {"b32": "clip_b32_similarity_score", "l14": "clip_l14_similarity_score"}


def near_the_pools_own(asset: Declared) -> Check | None:
    """Check the scores of DataComp's own embeddings against the scores that its metadata carries."""
    prefix = asset.settings.encoders[asset.names["encoder"]].precomputed
    if not isinstance(prefix, str) or prefix not in POOL_SCORES:
        return None
    column = POOL_SCORES[prefix]

    def run(tables: Tables) -> Finding:
        ours = tables.read(columns=["clip_score"])["clip_score"].to_numpy()
        theirs = tables.read("raw_pool", [column])[column].to_numpy().astype(np.float32)
        known = np.isfinite(theirs)
        if not known.any():
            return not_compared(f"no row of the pool has a {column}", {"rows_compared": 0})
        off = np.abs(ours[known] - theirs[known])
        far = int((off > POOL_SCORE_TOLERANCE).sum())
        figures = {"rows_compared": len(off), "rows_far": far, "largest_difference": float(off.max(initial=0))}
        why = f"{far} of {len(off)} rows differ by more than {POOL_SCORE_TOLERANCE}" if far else ""
        return Finding(not far, figures, why)

    text = f"CLIPScore is within {POOL_SCORE_TOLERANCE} of the pool's own `{column}`, where the pool has one."
    return Check("near_the_pools_own", text, run, blocking=False)


@partitioned(
    key="clip_score/{encoder}",
    deps=["embeddings/{encoder}"],
    columns=[
        Column(
            name="clip_score",
            type=pa.float32(),
            description="Cosine of the image and its caption.",
            direction="larger",
            bounds=COSINE_BOUNDS,
        )
    ],
    checks=[rows_aligned, within_bounds, near_the_pools_own],
    code_version="1",
    group_name="clip_score",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="CLIPScore by encoder `{encoder}`: cosine of image and caption, larger is better.",
    operations=lambda asset, amount: 2.0 * amount.rows * amount.dimensions,
)
def clip_score(shard: Shard) -> Result:
    """Compute CLIPScore of one shard."""
    (scores,) = shard.map(selection.clip_score, "image", "text")
    return shard.scores(clip_score=scores)


def encoders(settings: ProjectSettings) -> tuple[str, ...]:
    """Return the encoders that CLIPScore is computed with: by default all."""
    chosen: tuple[str, ...] | None = settings.scores.clip_score
    return tuple(settings.encoders) if chosen is None else chosen


CLIP_SCORE = ScoreKind(
    name="clip_score",
    asset=clip_score,
    settings=tuple[Name, ...] | None,
    configured=encoders,
    instances=lambda settings: [{"encoder": encoder} for encoder in encoders(settings)],
    upstream=lambda settings: (),
    validate=lambda settings: require_encoders(settings, "scores.clip_score", settings.scores.clip_score or ()),
    recorded=lambda settings, wanted: {
        "scores": {"clip_score": [encoder for encoder in encoders(settings) if f"clip_score/{encoder}" in wanted]}
    },
    partial=True,
)
