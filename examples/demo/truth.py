"""The demo's truth table: how the scores rank the planted faults, and how many of them the recipes keep.

Frames in, frames and `rich` tables out; no files, and no computation of scores.
"""

from collections.abc import Collection, Mapping

import numpy as np
import polars as pl
from rich.table import Table

from selection import statistics

SCORES = {"clip_score": "CLIPScore", "neg_clip_loss": "negCLIPLoss", "norm_sim_inf": "NormSim_∞"}
TARGET_LIKE = "target-like pictures"


def auc(better: np.ndarray, worse: np.ndarray) -> float:
    """Return the probability that a random row of `better` scores higher than one of `worse`; ties count half.

    Args:
        better: Scores [n] of the rows that should be kept, any real dtype.
        worse: Scores [m] of the rows that should not.

    Raises:
        ValueError: One of the two is empty or has a NaN.
    """
    for name, values in (("better", better), ("worse", worse)):
        if len(values) == 0 or np.isnan(values).any():
            raise ValueError(f"{name} has no rows or has NaN: an AUC needs scores on both sides")
    return float(statistics.auc(better[:, None], worse[:, None])[0])


def separation(truth: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Compute how well each score separates clean rows from each kind of fault.

    Args:
        truth: Columns uid, kind, variant, target_like, as `pool.make_truth` writes them.
        scores: Columns uid, clip_score, neg_clip_loss, norm_sim_inf; the current rows of the pool.

    Returns:
        One row for each kind but clean, for each variant where a kind has several, for all faults
        together, and for target-like pictures against all others: kind, variant, rows, and the
        AUC under each score.

    Raises:
        ValueError: A scored uid is not in the truth, or the pool has no clean row.
    """
    rows = _pool(truth, scores)
    clean, faulty = rows.filter(pl.col("kind") == "clean"), rows.filter(pl.col("kind") != "clean")
    lines = []
    for kind in faulty["kind"].unique().sort():
        of_kind = faulty.filter(pl.col("kind") == kind)
        lines.append(_line(kind, "", clean, of_kind))
        variants = of_kind["variant"].unique().sort()
        if len(variants) > 1:
            lines += [_line(kind, variant, clean, of_kind.filter(pl.col("variant") == variant)) for variant in variants]
    if len(faulty):
        lines.append(_line("all faults", "", clean, faulty))
    like, other = rows.filter("target_like"), rows.filter(~pl.col("target_like"))
    if len(like) and len(other):
        lines.append(_line(TARGET_LIKE, "", like, other) | {"rows": len(like)})
    return pl.DataFrame(lines)


def kept(truth: pl.DataFrame, scores: pl.DataFrame, subsets: Mapping[str, Collection[str]]) -> pl.DataFrame:
    """Count the rows of each kind, and the target-like pictures, that each recipe kept.

    Args:
        truth: As for `separation`.
        scores: As for `separation`; only its uids are used, as the pool.
        subsets: Uids by recipe.

    Returns:
        recipe, kind, pool (rows), kept (rows), share (kept of the pool's rows of that kind), lift
        (the kind's share of the subset over its share of the pool; NaN for an empty subset).

    Raises:
        ValueError: A selected uid is not in the pool, or a scored one is not in the truth.
    """
    rows = _pool(truth, scores)
    groups = {kind: rows.filter(pl.col("kind") == kind) for kind in rows["kind"].unique().sort()}
    groups[TARGET_LIKE] = rows.filter("target_like")
    lines = []
    for recipe, uids in subsets.items():
        chosen = set(uids)
        if strangers := chosen - set(rows["uid"]):
            raise ValueError(f"recipe {recipe}: {len(strangers)} selected uids are not in the pool")
        for kind, group in groups.items():
            n = len(chosen.intersection(group["uid"]))
            share = n / len(group) if len(group) else float("nan")
            lines.append(
                {
                    "recipe": recipe,
                    "kind": kind,
                    "pool": len(group),
                    "kept": n,
                    "share": share,
                    "lift": share / (len(chosen) / len(rows)) if chosen else float("nan"),
                }
            )
    return pl.DataFrame(lines)


def truth_table(truth: pl.DataFrame, scores: pl.DataFrame, subsets: Mapping[str, Collection[str]]) -> list[Table]:
    """Return `separation` and `kept` as two tables for a terminal.

    Args and errors as in `separation` and `kept`.
    """
    return [_separation_table(separation(truth, scores)), _kept_table(kept(truth, scores, subsets))]


def _pool(truth: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    rows = scores.join(truth, on="uid", how="inner")
    if len(rows) != len(scores):
        raise ValueError(
            f"{len(scores):,} rows have scores and {len(rows):,} of them agree with the truth "
            "table: it belongs to another pool. Remedy: draw the demo's pool and truth.parquet again"
        )
    if not (rows["kind"] == "clean").any():
        raise ValueError("no clean row has a score to compare faults with")
    return rows


def _line(kind: str, variant: str, better: pl.DataFrame, worse: pl.DataFrame) -> dict[str, object]:
    values = {name: auc(better[name].to_numpy(), worse[name].to_numpy()) for name in SCORES}
    return {"kind": kind, "variant": variant, "rows": len(worse), **values}


def _separation_table(lines: pl.DataFrame) -> Table:
    table = Table(
        title="How well the scores separate clean rows from each fault",
        caption="AUC: probability that a clean row scores above a faulty one; 0.5 is chance. Last line: "
        "that a target-like picture scores above another.",
    )
    table.add_column("fault")
    table.add_column("rows", justify="right")
    for name in SCORES.values():
        table.add_column(name, justify="right")
    for line in lines.iter_rows(named=True):
        name = f"  {line['variant']}" if line["variant"] else line["kind"]
        if line["kind"] in ("all faults", TARGET_LIKE):
            table.add_section()
        style = "dim" if line["variant"] else None
        values = [f"{line[score]:.3f}" for score in SCORES]
        table.add_row(name.replace("_", " "), f"{line['rows']:,}", *values, style=style)
    return table


def _kept_table(lines: pl.DataFrame) -> Table:
    table = Table(
        title="Share of each kind that each recipe kept",
        caption="Share of the pool's rows of that kind; in brackets the kind's share of the subset "
        "over its share of the pool.",
    )
    table.add_column("kind")
    table.add_column("pool", justify="right")
    recipes = lines["recipe"].unique(maintain_order=True).to_list() if len(lines) else []
    for recipe in recipes:
        table.add_column(recipe, justify="right")
    for kind in lines["kind"].unique(maintain_order=True) if len(lines) else []:
        of_kind = lines.filter(pl.col("kind") == kind).rows(named=True)
        if kind == TARGET_LIKE:
            table.add_section()
        cells = [f"{line['share']:.1%} (×{line['lift']:.2f})" for line in of_kind]
        table.add_row(kind.replace("_", " "), f"{of_kind[0]['pool']:,}", *cells)
    return table
