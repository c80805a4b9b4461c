"""The drift check of `negatives/<encoder>`: how far drawing again would change the scores, now that the pool has grown.

The check draws and scores, so it runs when it is launched, and by itself when the pool has twice, four times, eight
times … the rows that the stored negatives were drawn from. Its limits are `scores.drift` of the YAML. Drawing again is
a separate decision (the job `redraw_negatives`, or `redraw_at_growth`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared
from assets.base.checks import Check, Finding, Tables
from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.score_tables import to_tensor
from assets.scores.draws import draw, read_draws, with_content
from assets.scores.neg_clip_loss_settings import DriftLimits, configured, temperature
from resources.lake.check_records import read_checks
from resources.lake.files import Stored
from resources.lake.versions import Versions
from selection.statistics import spearman

NAME = "drift"
LIMITS = ("limit/rank_correlation", "limit/changed")


def drift(asset: Declared) -> Check:
    """Check the stored negatives against a fresh draw.

    The probe is the first rows of the fresh first draw: the rows of the current pool with the smallest keyed hash. It
    is a uniform sample, and changes only by rows that arrived or left.
    """
    return Check(
        NAME,
        "Scores a probe against the stored negatives and against a fresh draw from the current pool, and reports how "
        "far the scores differ. Runs by itself when the pool has doubled since the draw; launch it to measure now.",
        lambda tables: _measure(asset, tables),
        blocking=False,
        on_demand=True,
        due=lambda tables: _due(asset, tables),
    )


def growth(asset: Declared, stored: Stored, snapshot: Snapshot) -> float:
    """Return the number of rows that a draw would choose from now, divided by that of the stored draw's shards.

    A shard that changed since counts with its present rows. While too few shards have embeddings for a draw, it is 1.
    """
    encoder = asset.names["encoder"]
    key = f"embeddings/{encoder}"
    found = embedded_shards(snapshot, key)
    if len(found) < configured(asset.settings)[encoder].coverage * len(snapshot.listing):
        return 1.0
    rows = snapshot.context.lake.rows(key, found)
    drawn_from = sum(count for shard, count in rows.items() if shard in stored.provenance.inputs)
    return sum(rows.values()) / max(drawn_from, 1)


def _due(asset: Declared, tables: Tables) -> Mapping[str, Any] | None:
    """Return growth and limits if the pool has doubled since the last measurement, or the limits have changed since."""
    stored = tables.context.lake.stored(tables.asset)
    if stored is None:
        return None
    now = _occasion(asset, tables, stored)
    doublings = _doublings(now["growth"])
    last = read_checks(tables.context.lake, stored).get(NAME, {}).get("figures", {})
    measured = doublings <= _doublings(last.get("growth", 1)) and all(last.get(key) == now[key] for key in LIMITS)
    return None if doublings < 1 or measured else now


def _occasion(asset: Declared, tables: Tables, stored: Stored) -> dict[str, Any]:
    limits: DriftLimits = tables.context.settings.scores.drift
    return {
        "growth": growth(asset, stored, tables.snapshot),
        "limit/rank_correlation": limits.rank_correlation,
        "limit/changed": limits.changed,
    }


def _doublings(growth: float) -> int:
    return math.floor(math.log2(growth)) if growth >= 1 else 0


def _measure(asset: Declared, tables: Tables) -> Finding:
    context, encoder = tables.context, asset.names["encoder"]
    limits: DriftLimits = context.settings.scores.drift
    settings, key = configured(context.settings)[encoder], f"embeddings/{encoder}"
    stored = context.lake.stored(tables.asset)
    assert stored is not None
    kept = tables.read()
    fresh = draw(
        tables.snapshot,
        key,
        embedded_shards(tables.snapshot, key),
        draws=settings.draws,
        batch_size=settings.batch_size,
        seed=settings.seed,
    ).table
    tau = temperature(context, encoder)
    before = probe_scores(kept, fresh, limits.probe, tau)
    after = probe_scores(fresh, fresh, limits.probe, tau)
    figures: dict[str, Any] = {
        **_occasion(asset, tables, stored),
        "probe_rows": len(before),
        "rank_correlation": rank_correlation(before, after),
        "mean_shift": float((after - before).mean(dtype=np.float64)),
        "largest_change": float(np.abs(after - before).max()),
        "draws_replaced": 1 - _share_kept(kept, fresh),
    }
    worst = 0.0
    for name, threshold, ranked in _thresholds(context, encoder):
        was, becomes = sides(before, after, threshold, ranked=ranked)
        changed = int((was != becomes).sum())
        figures[f"changed_sides/{name}"] = changed
        if was.any():
            figures[f"overlap/{name}"] = float((was & becomes).sum() / was.sum())
        worst = max(worst, changed / len(before))
    passed = figures["rank_correlation"] >= limits.rank_correlation and worst <= limits.changed
    figures["verdict"] = _verdict(encoder, figures, worst, passed=passed)
    return Finding(passed, figures, "" if passed else figures["verdict"])


def _verdict(encoder: str, figures: Mapping[str, Any], worst: float, *, passed: bool) -> str:
    """Return what was measured, the limits that it is judged against, and what to do."""
    measured = f"rank correlation {figures['rank_correlation']:.3f} (limit {figures['limit/rank_correlation']})"
    if overlaps := [value for name, value in figures.items() if name.startswith("overlap/")]:
        measured += (
            f", {worst:.1%} of the probe rows change sides at a threshold (limit {figures['limit/changed']:.1%})"
        )
        measured += f", selection overlap {min(overlaps):.1%}"
    grown = f"The pool has {figures['growth']:.2f} times the rows that the negatives were drawn from. "
    if passed:
        return f"{grown}A fresh draw would score almost the same: {measured}. Nothing to do."
    return (
        f"{grown}A fresh draw would score otherwise: {measured}. Remedy: draw again (clip-select run "
        "--redraw-negatives, or the job redraw_negatives), or set "
        f"scores.neg_clip_loss.{encoder}.redraw_at_growth: 2; every negCLIPLoss is then computed again"
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


def sides(before: np.ndarray, after: np.ndarray, threshold: float, *, ranked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows a threshold keeps before, and which after.

    Args:
        before: scores `[n]`.
        after: the same rows' other scores `[n]`.
        threshold: smallest value that is kept.
        ranked: the step keeps a share or a number, so that its threshold follows the scores: after, as many rows
            are kept as before.

    Returns:
        Two bool arrays `[n]`.
    """
    kept = before >= threshold
    if not ranked:
        return kept, after >= threshold
    again = np.zeros(len(after), bool)
    again[np.argsort(-after, kind="stable")[: int(kept.sum())]] = True
    return kept, again


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
