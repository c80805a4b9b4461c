"""One module per kind of score: its settings, columns, checks and asset. `KINDS` lists them."""

from typing import Any

from assets.base.score_kind import ScoreKind
from assets.scores.caption_facts import CAPTION_FACTS
from assets.scores.clip_score import CLIP_SCORE
from assets.scores.clusters import CLUSTERS
from assets.scores.external_scores import EXTERNAL_SCORES
from assets.scores.hype import HYPE
from assets.scores.learned_mix import LEARNED_MIX
from assets.scores.near_duplicates import NEAR_DUPLICATES
from assets.scores.neg_clip_loss import NEG_CLIP_LOSS
from assets.scores.norm_sim import NORM_SIM
from assets.scores.norm_sim_dynamic import NORM_SIM_DYNAMIC
from assets.scores.sieve import SIEVE
from assets.scores.sparse_features import SPARSE_FEATURES

KINDS: tuple[ScoreKind[Any], ...] = (
    CLIP_SCORE,
    NEG_CLIP_LOSS,
    NORM_SIM,
    NORM_SIM_DYNAMIC,
    NEAR_DUPLICATES,
    CLUSTERS,
    SPARSE_FEATURES,
    CAPTION_FACTS,
    SIEVE,
    HYPE,
    EXTERNAL_SCORES,
    LEARNED_MIX,
)
"""All kinds of scores, in the order of the catalog's columns."""
