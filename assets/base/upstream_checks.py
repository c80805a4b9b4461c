"""Checks of everything that a subset depends on: results that people should see, and on-demand checks that are due.

Here: one place that collects them, for the terminal, the lineage record, the report and the UI. Everything is read from
the lake, so that it does not matter which run checked a file, and Dagster's records are not needed.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import dagster as dg

from assets.base.asset import FileAsset
from assets.base.checks import (
    NOT_COMPARED,
    SUMMARY_KEY,
    Check,
    as_json,
    check_stored,
    is_compared,
    keep_findings,
    log_checks,
    not_compared,
)
from assets.base.context import Snapshot
from assets.base.partitioned import PROCESSOR_KEY, PartitionedAsset
from assets.base.unpartitioned import UnpartitionedAsset
from core.ordering import dependencies_first
from resources.lake.check_records import has_checks, read_checks
from resources.lake.files import Lake, Stored

FAILED = "failed"
ONE_PROCESSOR = "one_kind_of_processor"
"""Warning about an asset whose files were computed on several kinds of processor."""


def upstream(key: str, assets: Mapping[str, Any]) -> list[str]:
    """List the keys of everything that an asset depends on, each after what it depends on itself."""

    def deps(other: str) -> list[str]:
        return [dep for dep in assets[other].deps if dep in assets]

    return dependencies_first(deps(key), deps)


def warnings_of(
    lake: Lake, assets: Mapping[str, Any], keys: Collection[str], shards: Collection[str]
) -> list[dict[str, Any]]:
    """Collect the checks that failed without holding their file back, or had nothing to compare.

    Args:
        lake: the lake.
        assets: all assets of the project, by key.
        keys: the assets to ask.
        shards: the shards to ask partitioned assets for.

    Returns:
        One entry for each asset, check and result: `asset`, `check`, `result` (`failed` or `not compared`), `shards`
        (none for an unpartitioned asset) and `why` of the first of them.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for key in keys:
        processors: Counter[str] = Counter()
        if not isinstance(assets[key], FileAsset):
            found |= {(key, entry["check"], entry["result"]): entry for entry in assets[key].warnings(lake)}
            continue
        for shard, stored, findings in _findings(lake, assets[key], shards):
            if PROCESSOR_KEY in stored.summary:
                processors[stored.summary[PROCESSOR_KEY]] += 1
            for check, finding in findings.items():
                result = FAILED if is_compared(finding) else NOT_COMPARED
                if finding["passed"] or (result == NOT_COMPARED and finding["blocking"]):
                    continue  # a blocking check has nothing to compare where a shard has no rows
                entry = found.setdefault((key, check, result), warning(key, check, finding["why"], result))
                entry["shards"] += [shard] if shard is not None else []
        if len(processors) > 1:
            found[key, ONE_PROCESSOR, FAILED] = warning(key, ONE_PROCESSOR, _several(processors))
    return list(found.values())


def _several(processors: Counter[str]) -> str:
    counted = ", ".join(f"{count} shards on {name}" for name, count in processors.most_common())
    return (
        f"{counted}. Values can differ in the last bits and exchange rows at a threshold. Remedy, where this matters: "
        "delete the files of the fewer shards and run again on the other machine"
    )


def warning(asset: str, check: str, why: str, result: str = FAILED) -> dict[str, Any]:
    """Return an entry of `warnings_of` without shards."""
    return {"asset": asset, "check": check, "result": result, "shards": [], "why": why}


def warning_text(entry: Mapping[str, Any]) -> str:
    """Return an entry of `warnings_of` in one line."""
    shards = entry["shards"]
    where = f" in {len(shards)} shards, the first is {shards[0]}" if len(shards) > 1 else ""
    where = f" in shard {shards[0]}" if len(shards) == 1 else where
    return f"{entry['asset']} {entry['check']}: {entry['result']}{where}: {entry['why']}"


def verdicts(lake: Lake, assets: Mapping[str, Any], keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the latest finding of each on-demand check of the given assets, by asset; assets without one are left out.

    The only such check is the drift of negatives.
    """
    found = {}
    for key in keys:
        for check in _on_demand(assets[key]):
            stored = lake.stored(key)
            finding = read_checks(lake, stored).get(check.name) if stored is not None else None
            if finding is not None:
                found[key] = finding
    return found


def is_any_due(snapshot: Snapshot, assets: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Check whether an on-demand check of one of the given assets is due."""
    return any(_occasion(snapshot, assets[key], check) is not None for key in keys for check in _on_demand(assets[key]))


def run_due_checks(
    context: dg.AssetExecutionContext, snapshot: Snapshot, assets: Mapping[str, Any], keys: Collection[str]
) -> None:
    """Run the on-demand checks that are due, keep their findings in the lake, and log them.

    A check that ends with an error counts as `not compared`, with the error as the reason, and does not stop the
    caller.
    """
    for key in keys:
        for check in _on_demand(assets[key]):
            occasion = _occasion(snapshot, assets[key], check)
            if occasion is None:
                continue
            context.log.info(f"{key}: the check {check.name} is due")
            try:
                findings = check_stored([check], assets[key].tables(snapshot, None))
            except Exception as error:  # noqa: BLE001 - kept and reported as the finding
                why = f"the check ended with an error: {error!r}. Remedy: launch it by itself, beside {key} in the UI"
                findings = {check.name: as_json(check, not_compared(why, occasion))}
                keep_findings(assets[key].tables(snapshot, None), findings)
            log_checks(context, key, None, findings)


def _occasion(snapshot: Snapshot, asset: Any, check: Check) -> Mapping[str, Any] | None:
    if check.due is None or not asset.is_fresh(snapshot):
        return None
    return snapshot.memoized(f"{asset.key} {check.name} due", lambda: check.due(asset.tables(snapshot, None)))  # type: ignore[misc]


def _on_demand(asset: Any) -> list[Check]:
    return [check for check in asset.checks if check.on_demand] if isinstance(asset, UnpartitionedAsset) else []


def _findings(
    lake: Lake, asset: FileAsset, shards: Collection[str]
) -> Iterator[tuple[str | None, Stored, Mapping[str, Mapping[str, Any]]]]:
    """Yield the record of each of an asset's files and the latest findings about it, with the shard."""
    recorded = has_checks(lake, asset.key)
    for shard in sorted(shards) if isinstance(asset, PartitionedAsset) else [None]:
        stored = lake.stored(asset.key, shard)
        if stored is not None:
            later = read_checks(lake, stored) if recorded else {}
            yield shard, stored, {**stored.summary.get(SUMMARY_KEY, {}), **later}
