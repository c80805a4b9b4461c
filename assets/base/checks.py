"""Asset checks: what must hold of a file before it is written, and how the results reach Dagster.

Here: the checks of every asset of files, and which asset has which. Not here: what a subset must fulfil
(`assets.subsets.checks`), nor the drift of negatives, which is looked at when somebody asks (`assets.scores.drift`).

A check sees a table before it is a file. When a blocking check fails the file is not written, its shard counts as
failed, and the others go on. The results are kept in the file's summary, so that a run which finds the file fresh
tells them again without reading it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,  # not exported; tests/test_checks.py holds what it has to do
)

from assets.project import Project
from core.uids import UID_DTYPE
from resources.lake.files import column_to_vectors

SUMMARY_KEY = "checks"
NORM_TOLERANCE = 0.01  # float16 of a unit vector is nearer than 0.001; the pool readers reject beyond this too
COSINE_TOLERANCE = 1e-3
ZERO_TOLERANCE = 1e-6  # of a float32 difference that is zero by its equation
POOL_SCORE_TOLERANCE = 0.02  # twice what resized images make; stored embeddings come within 0.003
CHUNK_ROWS = 16_384
BOUNDS = {
    "clip_score": "|cosine| ≤ 1.",
    "neg_clip_loss": "negCLIPLoss ≤ 0.",
    "norm_sim_dynamic": "0 ≤ round of leaving ≤ rounds + 1, and 0 ≤ NormSim_2 ≤ √rows that the rounds began with.",
    "sieve": "|cosine| ≤ 1.",
    "near_duplicates": f"|cosine| ≤ {(1 + NORM_TOLERANCE) ** 2:.4f}: both norms may exceed 1 by {NORM_TOLERANCE}.",
    "norm_sim": "0 ≤ NormSim_∞ ≤ 1, 0 ≤ NormSim_2 ≤ √targets, and the nearest target is one of them.",
    "hype": "-π/2 ≤ specificity ≤ π, distance ≥ 0, |cosine| ≤ 1, and the cluster term is 0 or 1.",
}
OWN_SCORES = {"b32": "clip_b32_similarity_score", "l14": "clip_l14_similarity_score"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        passed: whether what it asks for holds.
        figures: numbers that the UI shows, JSON values.
        why: when it does not hold, what is wrong and where first.
    """

    passed: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


class Tables:
    """The tables of one shard: those about to be written, else those of the lake.

    Args:
        project: the project.
        shard: the shard, or None for an asset without shards.
        new: tables that are not in the lake yet, by asset key.
    """

    def __init__(self, project: Project, shard: str | None, new: Mapping[str, pa.Table] | None = None) -> None:
        self.project = project
        self.shard = shard
        self.new = new or {}

    def read(self, asset: str, columns: list[str] | None = None) -> pa.Table:
        """Give an asset's table of this shard."""
        if asset in self.new:
            table = self.new[asset]
            return table.select(columns) if columns else table
        return self.project.lake.read(asset, self.shard, columns)


@dataclass(frozen=True)
class Check:
    """A check of an asset.

    Attributes:
        name: its name in the UI.
        description: what must hold.
        look: finds out.
        blocking: when it fails, nothing is written; otherwise it warns.
        when_asked: it is not looked at when the asset is made, but when it is launched by itself.
    """

    name: str
    description: str
    look: Callable[[Tables], Finding]
    blocking: bool = True
    when_asked: bool = False


class CheckFailed(Exception):  # noqa: N818 - named as Dagster names it
    """A blocking check failed, so nothing was written.

    Attributes:
        findings: what all checks of the table found.
    """

    def __init__(self, asset: str, shard: str | None, findings: Mapping[str, Mapping[str, Any]]) -> None:
        failed = {name: f for name, f in findings.items() if not f["passed"] and f["blocking"]}
        of = f" of shard {shard}" if shard else ""
        reasons = "; ".join(f"{name}: {f['why']}" for name, f in failed.items())
        super().__init__(f"{asset}{of} was not written, because a check failed. {reasons}")
        self.findings = findings


def examine(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Look at every check; give the findings as JSON values, by the check's name."""
    findings = {}
    for check in checks:
        found = check.look(tables)
        findings[check.name] = {
            "passed": found.passed,
            "blocking": check.blocking,
            "figures": dict(found.figures),
            "why": found.why,
        }
    return findings


def examine_before_writing(
    checks: Sequence[Check], project: Project, asset: str, shard: str | None, new: Mapping[str, pa.Table]
) -> dict[str, dict[str, Any]]:
    """Look at the checks of tables that are about to be written.

    Raises:
        CheckFailed: a blocking one failed.
    """
    findings = examine([check for check in checks if not check.when_asked], Tables(project, shard, new))
    if any(f["blocking"] and not f["passed"] for f in findings.values()):
        raise CheckFailed(asset, shard, findings)
    return findings


def specs(
    checks: Sequence[Check], asset: str, partitions: dg.PartitionsDefinition | None = None
) -> list[dg.AssetCheckSpec]:
    """Declare checks to Dagster.

    Dagster holds nothing back by a blocking check whose result is logged (`tell`) and not returned. Nothing needs it
    to: the step fails, and the file was never written.
    """
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=asset_key(asset),
            description=check.description + (" A file that fails is not written." if check.blocking else ""),
            partitions_def=partitions,
            blocking=check.blocking,
        )
        for check in checks
    ]


def tell(
    context: dg.AssetExecutionContext, asset: str, shard: str | None, findings: Mapping[str, Mapping[str, Any]]
) -> None:
    """Record findings in Dagster; logged events keep their shard also in a run of many, returned results do not."""
    target = _latest_materialization(context.instance, asset, shard) if findings else None
    for name, found in findings.items():
        context.log_event(
            dg.AssetCheckEvaluation(
                asset_key=asset_key(asset),
                check_name=name,
                passed=found["passed"],
                partition=shard,
                severity=severity(found),
                blocking=found["blocking"],
                metadata=figures(found),
                target_materialization_data=target,
            )
        )


def results(context: dg.AssetExecutionContext, findings: Mapping[str, Mapping[str, Any]]) -> list[dg.AssetCheckResult]:
    """Give findings as an asset without shards returns them, less those that nobody has asked for."""
    asked = {key.name for key in context.selected_asset_check_keys}
    return [
        dg.AssetCheckResult(passed=f["passed"], check_name=name, severity=severity(f), metadata=figures(f))
        for name, f in findings.items()
        if name in asked
    ]


def _latest_materialization(
    instance: dg.DagsterInstance, asset: str, shard: str | None
) -> AssetCheckEvaluationTargetMaterializationData | None:
    """Point to what a result is about; without it Dagster counts the shard's result as missing."""
    wanted = dg.AssetRecordsFilter(asset_key=asset_key(asset), asset_partitions=None if shard is None else [shard])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        return AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
    return None


def severity(found: Mapping[str, Any]) -> dg.AssetCheckSeverity:
    """Give a finding's severity: what does not block warns."""
    return dg.AssetCheckSeverity.ERROR if found["blocking"] else dg.AssetCheckSeverity.WARN


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give what the UI shows of a finding."""
    return {**found["figures"], **({"why": found["why"]} if found["why"] else {})}


def tags(project: Project, asset: str) -> dict[str, str]:
    """Give an asset's tags, by which the UI filters: its encoder and its target set."""
    kind, encoder, target = [*asset.split("/"), "", ""][:3]
    if encoder not in project.settings.encoders or kind.startswith(("external_", "hype", "captions", "sieve")):
        return {}
    return {"encoder": encoder} | ({"target": target} if target else {})


def asset_key(asset: str) -> dg.AssetKey:
    """Give Dagster's key of an asset."""
    return dg.AssetKey(asset.split("/"))


def checks_of(project: Project, asset: str) -> tuple[Check, ...]:
    """Give the checks of an asset of files; none where nothing is computed."""
    kind, _, rest = asset.partition("/")
    encoder = rest.partition("/")[0]
    if kind == "raw_pool":
        return (ROWS_AND_REJECTS, UIDS_UNIQUE)
    if kind == "embeddings":
        return (_rows_aligned(asset, "raw_pool"), _unit_norm(asset, "image", "text"))
    if kind == "target_embeddings":
        return (_unit_norm(asset, "image"),)
    if kind == "negatives":
        from assets.scores.drift import drift

        return (_draws_complete(asset), _unit_norm(asset, "image", "text"), drift(encoder))
    if kind in ("external_files", "external_uids"):
        from assets.scores.coverage import of_pool

        return (of_pool("external_uids" if kind == "external_uids" else "external_scores", rest),)
    if kind == "external_scores":
        from assets.scores.coverage import of_shard

        return (_rows_aligned(asset, "raw_pool"), of_shard(rest))
    if kind == "hype":
        return (_rows_aligned(asset, "raw_pool"), _within_bounds(asset))
    if kind in ("captions", "clusters"):
        return (_rows_aligned(asset, "raw_pool"),)
    if kind == "sieve":
        return (_rows_aligned(asset, "raw_pool"), _within_bounds(asset))
    if kind not in BOUNDS:
        return ()
    checks = [_rows_aligned(asset, "raw_pool", f"embeddings/{encoder}"), _within_bounds(asset)]
    own = project.settings.encoders[encoder].precomputed
    if kind == "clip_score" and isinstance(own, str) and own in OWN_SCORES:
        checks.append(_near_the_pools_own(asset, OWN_SCORES[own]))
    return tuple(checks)


# raw_pool


def _look_at_rows_and_rejects(tables: Tables) -> Finding:
    rows = tables.read("raw_pool", ["source_row"])["source_row"].to_numpy()
    rejects = tables.read("rejects", ["source_row"])["source_row"].to_numpy()
    seen = np.sort(np.concatenate([rows, rejects]))
    figures = {"rows": len(rows), "rejects": len(rejects), "samples_seen": int(seen[-1]) + 1 if len(seen) else 0}
    wrong = np.flatnonzero(seen != np.arange(len(seen)))
    if not len(wrong):
        return Finding(True, figures)
    first, place = int(seen[wrong[0]]), int(wrong[0])
    what = f"sample {first} is there twice" if first < place else f"sample {place} is neither a row nor a reject"
    return Finding(False, figures, f"rows + rejects = samples seen does not hold: {what}")


def _look_at_uids(tables: Tables) -> Finding:
    table = tables.read("raw_pool", ["uid", "f0", "f1"])
    words = _uids(table)
    repeated = len(words) - len(np.unique(words))
    if repeated:
        return Finding(False, {"repeated": repeated}, f"{repeated} rows repeat the uid of another row in the shard")
    from core.uids import format_uids

    spelled = format_uids(words["f0"], words["f1"])
    for row, (uid, text) in enumerate(zip(table["uid"].to_pylist(), spelled, strict=True)):
        if uid != text:
            return Finding(False, {"repeated": 0}, f"row {row}: uid {uid} is not f0, f1 ({text})")
    return Finding(True, {"repeated": 0})


ROWS_AND_REJECTS = Check(
    "rows_and_rejects",
    "Rows + rejects = samples seen: every position in the source is in one of the two, once.",
    _look_at_rows_and_rejects,
)
UIDS_UNIQUE = Check("uids_unique", "No uid is there twice in the shard, and f0, f1 spell the uid.", _look_at_uids)


# Rows and vectors


def _rows_aligned(asset: str, *others: str) -> Check:
    def look(tables: Tables) -> Finding:
        own = _uids(tables.read(asset, ["f0", "f1"]))
        for other in others:
            theirs = _uids(tables.read(other, ["f0", "f1"]))
            if len(own) != len(theirs):
                return Finding(False, {"rows": len(own)}, f"{len(own)} rows, and {other} has {len(theirs)}")
            wrong = np.flatnonzero(own != theirs)
            if len(wrong):
                where = f"row {wrong[0]} is another sample than in {other}"
                return Finding(False, {"rows": len(own), "rows_out_of_step": len(wrong)}, where)
        return Finding(True, {"rows": len(own)})

    return Check("rows_aligned", f"Row for row the uids of {' and '.join(others)}.", look)


def _unit_norm(asset: str, *columns: str) -> Check:
    def look(tables: Tables) -> Finding:
        table = tables.read(asset)
        figures: dict[str, Any] = {}
        for column in columns:
            vectors = column_to_vectors(table[column])
            norms = np.empty(len(vectors), np.float32)
            for start in range(0, len(vectors), CHUNK_ROWS):
                wide = vectors[start : start + CHUNK_ROWS].astype(np.float32)
                norms[start : start + CHUNK_ROWS] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            off = np.abs(norms - 1)
            bad = np.flatnonzero(~(off <= NORM_TOLERANCE))
            if len(bad):
                why = f"{column}: {len(bad)} rows are not of unit norm, the first is row {bad[0]}: {norms[bad[0]]}"
                return Finding(False, {**figures, "bad_rows": len(bad)}, why)
            figures[f"{column}/largest_deviation"] = float(off.max(initial=0))
        return Finding(True, figures)

    what = f"Every {' and '.join(columns)} embedding is finite and its norm within {NORM_TOLERANCE} of 1."
    return Check("unit_norm", what, look)


def _draws_complete(asset: str) -> Check:
    def look(tables: Tables) -> Finding:
        table = tables.read(asset, ["draw", "rank", "f0", "f1"])
        draw, rank, uids = table["draw"].to_numpy(), table["rank"].to_numpy(), _uids(table)
        draws = int(draw.max(initial=-1)) + 1
        size = len(draw) // max(draws, 1)
        figures = {"draws": draws, "batch_size": size}
        complete = (
            size > 0
            and len(draw) == draws * size
            and (draw == np.repeat(np.arange(draws), size)).all()
            and (rank == np.tile(np.arange(size), draws)).all()
        )
        if not complete:
            return Finding(False, figures, f"{len(draw)} rows are not {draws} draws of equal size in order")
        for number in range(draws):
            if len(np.unique(uids[number * size : (number + 1) * size])) != size:
                return Finding(False, figures, f"draw {number} has a uid twice")
        return Finding(True, figures)

    return Check("draws_complete", "All draws are of one size, and none has a uid twice.", look)


# Scores


def _within_bounds(asset: str) -> Check:
    kind, _, rest = asset.partition("/")

    def look(tables: Tables) -> Finding:
        table = tables.read(asset)
        bounds: dict[str, tuple[float, float]] = {
            "clip_score": (-1 - COSINE_TOLERANCE, 1 + COSINE_TOLERANCE),
            "sieve": (-1 - COSINE_TOLERANCE, 1 + COSINE_TOLERANCE),
            "near_duplicate": (-((1 + NORM_TOLERANCE) ** 2), (1 + NORM_TOLERANCE) ** 2),
            "neg_clip_loss": (-np.inf, ZERO_TOLERANCE),
            "norm_sim_inf": (0, 1 + COSINE_TOLERANCE),
            "hype": (-np.inf, np.inf),
            "hype_specificity_image": (-np.pi / 2 - ZERO_TOLERANCE, np.pi + ZERO_TOLERANCE),
            "hype_specificity_text": (-np.pi / 2 - ZERO_TOLERANCE, np.pi + ZERO_TOLERANCE),
            "hype_distance": (0, np.inf),
            "hype_cosine": (-1 - COSINE_TOLERANCE, 1 + COSINE_TOLERANCE),
            "hype_cluster": (0, 1),
        }
        if kind == "norm_sim":
            stored = tables.project.lake.stored(f"target_embeddings/{rest}")
            targets = stored.rows if stored is not None else 0
            bounds["norm_sim_2"] = (0, targets**0.5 * (1 + COSINE_TOLERANCE))
            bounds["nearest_target"] = (0, targets - 1)
        if kind == "norm_sim_dynamic":
            rounds = tables.project.settings.norm_sim_dynamic[rest].rounds
            stored = tables.project.lake.stored(f"dynamic_rounds/{rest}")
            began = stored.summary["began_with"] if stored is not None else 0
            bounds["norm_sim_dynamic"] = (0, rounds + 1)
            bounds["norm_sim_2_last"] = (0, began**0.5 * (1 + COSINE_TOLERANCE))
        figures: dict[str, Any] = {}
        for column, (low, high) in bounds.items():
            if column not in table.column_names:
                continue
            values = table[column].drop_null().to_numpy()  # NULL, where a score has it, is no value
            bad = np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))
            if len(bad):
                why = f"{column}: {len(bad)} rows are not in [{low:g}, {high:g}], the first is row {bad[0]}: "
                return Finding(False, {"bad_rows": len(bad)}, why + f"{values[bad[0]]}")
            if len(values):
                figures[f"{column}/min"], figures[f"{column}/max"] = values.min().item(), values.max().item()
        return Finding(True, figures)

    return Check("within_bounds", BOUNDS[kind] + " Up to rounding; nothing is NaN or infinite.", look)


def _near_the_pools_own(asset: str, column: str) -> Check:
    def look(tables: Tables) -> Finding:
        ours = tables.read(asset, ["clip_score"])["clip_score"].to_numpy()
        theirs = tables.read("raw_pool", [column])[column].to_numpy().astype(np.float32)
        known = np.isfinite(theirs)
        off = np.abs(ours[known] - theirs[known])
        far = int((off > POOL_SCORE_TOLERANCE).sum())
        figures = {"rows_compared": len(off), "rows_far": far, "largest_difference": float(off.max(initial=0))}
        if not far:
            return Finding(True, figures)
        return Finding(False, figures, f"{far} of {len(off)} rows differ by more than {POOL_SCORE_TOLERANCE}")

    what = f"CLIPScore is within {POOL_SCORE_TOLERANCE} of the pool's own `{column}`, where the pool has one."
    return Check("near_the_pools_own", what, look, blocking=False)


def _uids(table: pa.Table) -> np.ndarray:
    """Give f0 and f1 as one array of records `[n]`, which compare as the uids do."""
    uids = np.empty(table.num_rows, dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = table["f0"].to_numpy(), table["f1"].to_numpy()
    return uids
