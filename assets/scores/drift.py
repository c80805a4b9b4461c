"""The drift check of `negatives/<encoder>`: how far drawing again would change the scores, now that the pool has grown.

The check runs on demand, because it draws and scores. Its limits are `scores.drift` of the YAML. Drawing again is a
separate decision (the job `redraw_negatives`).
"""

from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared
from assets.base.checks import Check, Finding, Tables
from assets.base.context import Context
from assets.base.freshness import embedded_shards
from assets.base.score_tables import to_tensor
from assets.scores.draws import draw, read_draws, with_content
from assets.scores.neg_clip_loss_settings import DriftLimits, configured, temperature
from resources.lake.versions import Versions
from selection.statistics import spearman


def drift(asset: Declared) -> Check:
    """Check the stored negatives against a fresh draw.

    The probe is the first rows of the fresh first draw: the rows of the current pool with the smallest keyed hash. It
    is a uniform sample, and changes only by rows that arrived or left.
    """
    encoder = asset.names["encoder"]

    def run(tables: Tables) -> Finding:
        context = tables.context
        limits: DriftLimits = context.settings.scores.drift
        settings, key = configured(context.settings)[encoder], f"embeddings/{encoder}"
        kept = tables.read()
        shards = embedded_shards(tables.snapshot, key)
        fresh = draw(
            context.lake, key, shards, draws=settings.draws, batch_size=settings.batch_size, seed=settings.seed
        ).table
        tau = temperature(context, encoder)
        before = probe_scores(kept, fresh, limits.probe, tau)
        after = probe_scores(fresh, fresh, limits.probe, tau)
        figures: dict[str, Any] = {
            "probe_rows": len(before),
            "rank_correlation": rank_correlation(before, after),
            "mean_shift": float((after - before).mean(dtype=np.float64)),
            "largest_change": float(np.abs(after - before).max()),
            "draws_replaced": 1 - _share_kept(kept, fresh),
        }
        worst = 0.0
        for name, threshold, ranked in _thresholds(context, encoder):
            changed = sides_changed(before, after, threshold, ranked=ranked)
            figures[f"changed_sides/{name}"] = changed
            worst = max(worst, changed / len(before))
        reasons = []
        if figures["rank_correlation"] < limits.rank_correlation:
            reasons.append(f"the rank correlation is under {limits.rank_correlation}")
        if worst > limits.changed:
            reasons.append(f"{worst:.1%} of the probe rows change sides at a threshold, more than {limits.changed:.1%}")
        remedy = ". Remedy: draw again (job redraw_negatives); every negCLIPLoss is then computed again"
        return Finding(not reasons, figures, " and ".join(reasons) + remedy if reasons else "")

    return Check(
        "drift",
        "Launch it by itself: it scores a probe against the stored negatives and against a fresh draw from the "
        "current pool, and reports how far the scores differ.",
        run,
        blocking=False,
        on_demand=True,
    )


def probe_scores(negatives: pa.Table, fresh: pa.Table, probe: int, temperature: float) -> np.ndarray:
    """Score the probe, the first rows of the fresh first draw, against negatives.

    Args:
        negatives: a table of `negatives/<encoder>`.
        fresh: a fresh one, from which the probe is taken.
        probe: its number of rows, at most; a draw may be smaller.
        temperature: τ.

    Returns:
        negCLIPLoss, float32 `[probe]`.
    """
    import torch

    import selection
    from selection.scores.negatives import membership

    probe_uids, probe_image, probe_text = (part[0, :probe] for part in read_draws(fresh))
    uids, *vectors = read_draws(negatives)
    rows = with_content(probe_uids, probe_image, probe_text)
    member = membership(with_content(uids, *vectors), rows["f0"].copy(), rows["f1"].copy())
    image, text, negative_image, negative_text = (to_tensor(v) for v in (probe_image, probe_text, *vectors))
    found, _ = selection.neg_clip_loss(
        image,
        text,
        negative_image,
        negative_text,
        temperature=temperature,
        member=torch.from_numpy(member).to(image.device),
    )
    return np.asarray(found.cpu().numpy())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of two scores `[n]`; 1 where one is constant."""
    found = float(spearman(np.column_stack([a, b]))[0, 1])
    return 1.0 if np.isnan(found) else found


def sides_changed(before: np.ndarray, after: np.ndarray, threshold: float, *, ranked: bool) -> int:
    """Count the rows that are on one side of a threshold before and on the other after.

    Args:
        before: scores `[n]`.
        after: the same rows' other scores `[n]`.
        threshold: smallest value that is kept.
        ranked: the step keeps a share or a number, so that its threshold follows the scores: after, as many rows
            are kept as before.
    """
    kept = before >= threshold
    if ranked:
        again = np.zeros(len(after), bool)
        again[np.argsort(-after, kind="stable")[: int(kept.sum())]] = True
    else:
        again = after >= threshold
    return int((kept != again).sum())


def _thresholds(context: Context, encoder: str) -> list[tuple[str, float, bool]]:
    """List the thresholds of current subsets at this encoder's negCLIPLoss: name, value, whether it follows a rank."""
    found = []
    for recipe in context.settings.recipes:
        version = Versions(context.lake, recipe).current()
        for step in version.lineage["steps"] if version is not None else ():
            if step["score"] == f"neg_clip_loss/{encoder}":
                found.append((f"{recipe}/step{step['step']}", step["threshold"], step["wanted"] is not None))
    return found


def _share_kept(kept: pa.Table, fresh: pa.Table) -> float:
    """Return the share of the fresh draws that the kept ones already hold."""
    import polars as pl

    columns = ["draw", "f0", "f1"]
    both = [pl.DataFrame(t.select(columns)) for t in (fresh, kept)]
    return both[0].join(both[1], on=columns, how="semi").height / both[0].height
