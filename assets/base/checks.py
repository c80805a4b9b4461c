"""Asset checks: conditions on a table, tested before it becomes a file, and how the results reach Dagster.

Here: the checks of asset files as such. Not here: checks that several assets share (`assets.base.standard_checks`),
checks of one asset (in its module), and checks of subsets (`assets.subsets.checks`).

When a blocking check fails, the file is not written, its shard fails, and the other shards continue. The findings are
kept in the file's summary, so a run that finds the file up to date logs them again without reading it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,  # not exported; pinned in tests/assets/base/test_checks.py
)

from assets.base.keys import asset_key

if TYPE_CHECKING:
    from assets.base.context import Context, Snapshot

SUMMARY_KEY = "checks"
"""Name under which a file's summary holds the findings."""

Findings = Mapping[str, Mapping[str, Any]]
"""Findings as JSON values, by check name: `passed`, `blocking`, `figures` and `why`."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        passed: whether the condition holds.
        figures: numbers for the UI, JSON values.
        why: when it does not hold, the fault and its first place.
    """

    passed: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Tables:
    """The tables of one shard: those about to be written, else those of the lake.

    Attributes:
        snapshot: the project's inputs.
        asset: key of the asset that is checked.
        shard: the shard; None for an unpartitioned asset.
        new: tables that are not in the lake yet, by asset key.
    """

    snapshot: "Snapshot"
    asset: str
    shard: str | None
    new: Mapping[str, pa.Table] | None = None

    @property
    def context(self) -> "Context":
        """The project."""
        return self.snapshot.context

    def read(self, asset: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """Return the shard's table of an asset, by default of the asset that is checked."""
        asset = asset or self.asset
        if self.new and asset in self.new:
            table = self.new[asset]
            return table.select(columns) if columns else table
        return self.context.lake.read(asset, self.shard, columns)


@dataclass(frozen=True)
class Check:
    """A check of an asset.

    Attributes:
        name: its name in the UI.
        description: the condition.
        run: tests it.
        blocking: when it fails, nothing is written; otherwise it warns.
        on_demand: it runs when it is launched by itself, not when the asset is materialized.
    """

    name: str
    description: str
    run: Callable[[Tables], Finding]
    blocking: bool = True
    on_demand: bool = False


class CheckFailed(Exception):  # noqa: N818 - named as Dagster names it
    """A blocking check failed, so nothing was written.

    Attributes:
        findings: the findings of all checks of the table.
    """

    def __init__(self, asset: str, shard: str | None, findings: Findings) -> None:
        failed = {name: f for name, f in findings.items() if not f["passed"] and f["blocking"]}
        of = f" of shard {shard}" if shard else ""
        reasons = "; ".join(f"{name}: {f['why']}" for name, f in failed.items())
        super().__init__(f"{asset}{of} was not written, because a check failed. {reasons}")
        self.findings = findings


def run_checks(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Run checks and return their findings."""
    findings = {}
    for check in checks:
        found = check.run(tables)
        findings[check.name] = {
            "passed": found.passed,
            "blocking": check.blocking,
            "figures": dict(found.figures),
            "why": found.why,
        }
    return findings


def check_before_writing(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Run the checks of tables that are about to be written, and return their findings.

    Raises:
        CheckFailed: a blocking one failed.
    """
    findings = run_checks([check for check in checks if not check.on_demand], tables)
    if any(f["blocking"] and not f["passed"] for f in findings.values()):
        raise CheckFailed(tables.asset, tables.shard, findings)
    return findings


def check_specs(
    checks: Sequence[Check], asset: str, partitions: dg.PartitionsDefinition | None = None
) -> list[dg.AssetCheckSpec]:
    """Return checks as Dagster declares them.

    Dagster holds nothing back by a blocking check whose result is logged (`log_checks`) and not returned. It does not
    need to: the step fails, and the file was never written.
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


def log_checks(context: dg.AssetExecutionContext, asset: str, shard: str | None, findings: Findings) -> None:
    """Log findings as Dagster events, which keep their shard in a run of many; returned results do not."""
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
                metadata=check_metadata(found),
                target_materialization_data=target,
            )
        )


def check_results(context: dg.AssetExecutionContext, findings: Findings) -> list[dg.AssetCheckResult]:
    """Return findings as the results of an unpartitioned asset, less those that the run was not asked for."""
    requested = {key.name for key in context.selected_asset_check_keys}
    return [
        dg.AssetCheckResult(passed=f["passed"], check_name=name, severity=severity(f), metadata=check_metadata(f))
        for name, f in findings.items()
        if name in requested
    ]


def _latest_materialization(
    instance: dg.DagsterInstance, asset: str, shard: str | None
) -> AssetCheckEvaluationTargetMaterializationData | None:
    """Return a pointer to the materialization that was checked; without it Dagster counts the result as missing."""
    wanted = dg.AssetRecordsFilter(asset_key=asset_key(asset), asset_partitions=None if shard is None else [shard])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        return AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
    return None


def severity(found: Mapping[str, Any]) -> dg.AssetCheckSeverity:
    """Return a finding's severity: a check that does not block warns."""
    return dg.AssetCheckSeverity.ERROR if found["blocking"] else dg.AssetCheckSeverity.WARN


def check_metadata(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a finding."""
    return {**found["figures"], **({"why": found["why"]} if found["why"] else {})}
