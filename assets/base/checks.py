"""Asset checks: conditions on a table, tested before it becomes a file, and how the results reach Dagster.

Here: the checks of asset files as such. Not here: checks that several assets share (`assets.base.standard_checks`),
checks of one asset (in its module), and checks of subsets (`assets.subsets.checks`).

When a blocking check fails, the file is not written, its shard fails, and the other shards continue. The findings are
kept in the file's summary, so a run that finds the file up to date logs them again without reading it. Findings of
checks that run later, by themselves, are kept beside the files (`resources.lake.check_records`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import dagster as dg
import pyarrow as pa
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,  # not exported; pinned in tests/assets/base/test_checks.py
)

from assets.base.keys import asset_key
from core.links import asset_link
from resources.lake.check_records import read_checks, write_check
from resources.lake.files import Lake, Stored

if TYPE_CHECKING:
    from assets.base.context import Context, Snapshot

SUMMARY_KEY = "checks"
"""Name under which a file's summary holds the findings."""

Findings = Mapping[str, Mapping[str, Any]]
"""Findings as JSON values, by check name: `passed`, `blocking`, `figures` and `why`; `compared` is false, or absent."""

NOT_COMPARED = "not compared"


class EventContext(Protocol):
    """Where events go: a run's context, or the instance for events that belong to no run."""

    @property
    def instance(self) -> dg.DagsterInstance:
        """The Dagster instance."""
        ...

    def log_event(self, event: Any) -> None:
        """Log a materialization or the result of a check."""
        ...


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        passed: whether the condition holds.
        figures: numbers for the UI, JSON values.
        why: when it does not hold, the fault and its first place; when nothing was compared, why not.
        compared: whether there was anything to compare. If not, the check neither passes nor stops the file.
    """

    passed: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    compared: bool = True


def not_compared(why: str, figures: Mapping[str, Any] | None = None) -> Finding:
    """Return the result of a check that found nothing to compare."""
    return Finding(False, figures or {}, why, compared=False)


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
        due: for an on-demand check that also runs before a subset is selected: returns the figures that make it due
            now, or None.
    """

    name: str
    description: str
    run: Callable[[Tables], Finding]
    blocking: bool = True
    on_demand: bool = False
    due: Callable[[Tables], Mapping[str, Any] | None] | None = None


class CheckFailed(Exception):  # noqa: N818 - named as Dagster names it
    """A blocking check failed, so nothing was written.

    Attributes:
        findings: the findings of all checks of the table.
    """

    def __init__(self, asset: str, shard: str | None, findings: Findings) -> None:
        failed = {name: f for name, f in findings.items() if stops(f)}
        of = f" of shard {shard}" if shard else ""
        reasons = "; ".join(f"{name}: {f['why']}" for name, f in failed.items())
        super().__init__(f"{asset}{of} was not written, because a check failed. {reasons}")
        self.findings = findings


def run_checks(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Run checks and return their findings."""
    return {check.name: as_json(check, check.run(tables)) for check in checks}


def as_json(check: Check, found: Finding) -> dict[str, Any]:
    """Return a finding as JSON values."""
    return {
        "passed": found.passed,
        "blocking": check.blocking,
        "figures": dict(found.figures),
        "why": found.why,
        **({} if found.compared else {"compared": False}),
    }


def stops(found: Mapping[str, Any]) -> bool:
    """Check whether a finding keeps its file from being written."""
    return found["blocking"] and not found["passed"] and is_compared(found)


def is_compared(found: Mapping[str, Any]) -> bool:
    """Check whether a finding compared anything; those of older lakes always say so."""
    return bool(found.get("compared", True))


def check_before_writing(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Run the checks of tables that are about to be written, and return their findings.

    Raises:
        CheckFailed: a blocking one failed.
    """
    findings = run_checks([check for check in checks if not check.on_demand], tables)
    if any(map(stops, findings.values())):
        raise CheckFailed(tables.asset, tables.shard, findings)
    return findings


def check_stored(checks: Sequence[Check], tables: Tables) -> dict[str, dict[str, Any]]:
    """Run checks of a file that is in the lake, keep their findings beside it, and return them."""
    findings = run_checks(checks, tables)
    keep_findings(tables, findings)
    return findings


def keep_findings(tables: Tables, findings: Findings) -> None:
    """Keep findings about a file of the lake beside it, in the place of earlier ones of the same checks."""
    stored = tables.context.lake.stored(tables.asset, tables.shard)
    if stored is not None:
        for name, found in findings.items():
            write_check(tables.context.lake, stored, name, found)


def findings_of(lake: Lake, stored: Stored) -> dict[str, dict[str, Any]]:
    """Return the latest finding of each check of a stored file."""
    return {**stored.summary.get(SUMMARY_KEY, {}), **read_checks(lake, stored)}


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


def log_checks(context: EventContext, asset: str, shard: str | None, findings: Findings) -> None:
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
                description=check_text(found),
                metadata=check_metadata(found, asset_link(asset, shard)),
                target_materialization_data=target,
            )
        )


def check_results(context: dg.AssetExecutionContext, findings: Findings) -> list[dg.AssetCheckResult]:
    """Return findings as the results of an unpartitioned asset, less those that the run was not asked for."""
    requested = {key.name for key in context.selected_asset_check_keys}
    return [
        dg.AssetCheckResult(
            passed=f["passed"],
            check_name=name,
            severity=severity(f),
            description=check_text(f),
            metadata=check_metadata(f, asset_link("/".join(context.asset_key.path), None)),
        )
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
    """Return a finding's severity: it warns unless it stops the file. Dagster knows no result but passed and failed."""
    blocks = found["blocking"] and is_compared(found)
    return dg.AssetCheckSeverity.ERROR if blocks else dg.AssetCheckSeverity.WARN


def check_text(found: Mapping[str, Any]) -> str | None:
    """Return a finding in words; None if it passed."""
    if not is_compared(found):
        return f"{NOT_COMPARED}: {found['why']}"
    return found["why"] or None


def check_metadata(found: Mapping[str, Any], link: str) -> dict[str, Any]:
    """Return the metadata of a finding; one that does not hold has a link to the page of the rows in question."""
    text = check_text(found)
    return {**found["figures"], **({"why": text, "browse": dg.MetadataValue.url(link)} if text else {})}
