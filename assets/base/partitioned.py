"""Assets with one file a shard: the decorator `partitioned`, and how Dagster runs such an asset.

A run may cover many shards, so that a model is loaded once. Each shard gets its own event with its own data version,
input versions and metadata, because Dagster would copy one data version to every partition of a range (pinned in
`tests/pins/test_dagster_pins.py`). Every shard of a run is computed, fails with a reason, or was not attempted because
the asset's function ended early; the run lists the last two at its end.

Not here: any computation.
"""

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import dagster as dg

from assets.base.asset import Declared, FileAsset, Step, Template
from assets.base.checks import (
    SUMMARY_KEY,
    CheckFailed,
    check_before_writing,
    check_specs,
    check_stored,
    log_checks,
)
from assets.base.context import Context, Snapshot
from assets.base.engines import Computed, Engine
from assets.base.events import EventLog, Record
from assets.base.keys import SHARDS, asset_key
from assets.base.results import NotAttempted, NotReady, Outcome, Result
from assets.base.runtime import REQUIRED_RESOURCES, begin_step
from assets.base.score_tables import processor
from assets.base.shard import Shard
from core.errors import UserError
from resources.lake.ahead import read_ahead
from resources.lake.files import Lake, LakeError, Provenance, Stored

Outcomes = Generator[tuple[str, Outcome], None, None]
"""Shards in order, each with its result or its error."""

PROCESSOR_KEY = "processor"
"""Name under which a file's summary holds the kind of processor that it was computed on."""

FAILED_SHARDS = "failed_shards"
"""Metadata of a step's failure: the shards that failed on their own."""
NOT_ATTEMPTED = "shards_not_attempted"
"""Metadata of a step's failure: the shards that it did not come to."""


def partitioned(**arguments: Any) -> "Callable[[Callable[..., Any]], PartitionedTemplate]":
    """Declare an asset with one file a shard.

    The decorated function computes one `Shard` and returns a `Result`. With `prepare`, a function of the `Step`, it
    takes the prepared value as its second argument; it is prepared once for all shards of a step. With `streams=True`
    it is a generator instead: it takes the `Step` and its shards, and yields each shard once with its `Result` or
    error. Shards that it does not yield, because it raises or returns before, are reported as not attempted.

    Args:
        arguments: the fields of `PartitionedTemplate`.
    """
    return lambda function: PartitionedTemplate(function=function, **arguments)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartitionedTemplate(Template):
    """A template of assets with one file a shard.

    Attributes:
        prepare: computes a value that all shards of a step share, such as tensors of the targets.
        streams: the function computes many shards together.
        every_row: it reports each row of `raw_pool` as done. Otherwise shards are counted: the rows are not known
            before, or only some are computed. May be a function of the `Declared` asset.
        spread: shards may be computed by several workers, each by itself. Otherwise the step's process computes them.
        beside: keys of the assets whose files the function's `Result` has beside its own, such as `rejects`.
    """

    prepare: Callable[[Step], Any] | None = None
    streams: bool = False
    every_row: "bool | Callable[[Declared], bool]" = True
    spread: bool = True
    beside: Sequence[str] = ()

    def compute(self, step: Step, shards: Sequence[str]) -> Outcomes:
        """Compute shards in order; an error stays with its shard, and one of `prepare` that a user can fix with all."""
        if self.streams:
            yield from self.function(step, shards)
            return
        try:
            prepared = () if self.prepare is None else (self._prepared(step, self.prepare),)
        except UserError as error:
            yield from ((name, error) for name in shards)
            return
        read = [key for key in step.asset.deps if step.asset.assets[key].partitioned]
        ahead = read_ahead(step.context.lake, [[(key, name) for key in read] for name in shards])
        for name, _ in zip(shards, ahead, strict=True):
            try:
                yield name, self.function(Shard(step, name), *prepared)
            except Exception as error:  # noqa: BLE001 - raised with all others when the shards are through
                yield name, error

    def _prepared(self, step: Step, prepare: Callable[[Step], Any]) -> Any:
        """Return the value that the step's shards share; a worker gets them one by one, and prepares it once."""
        return step.snapshot.memoized(f"{step.asset.key}: prepared", lambda: prepare(step))

    def build(self, declared: Declared, project: Context, assets: Mapping[str, Any]) -> "PartitionedAsset":
        """Return a project's asset."""
        # Beta and preview in Dagster 1.13, pinned in tests/pins/test_dagster_pins.py and test_checks.py
        warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)
        warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")

        @dg.multi_asset(
            name=declared.key.replace("/", "__"),
            specs=[declared.spec()],
            check_specs=check_specs(declared.checks, declared.key, SHARDS),
            # A check of a subsettable asset may stay without a result, and may be launched by itself.
            can_subset=True,
            partitions_def=SHARDS,
            backfill_policy=dg.BackfillPolicy.single_run(),
            pool=self.pool,
            required_resource_keys=REQUIRED_RESOURCES,
        )
        def body(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            step = begin_step(context, asset)
            if context.selected_asset_keys:
                yield from _run(context, asset, step)
            else:
                _check_again(context, asset, step)

        asset = PartitionedAsset(declared, project, assets, body)
        return asset


@dataclass(frozen=True, eq=False)
class PartitionedAsset(FileAsset):
    """An asset of a project with one file a shard."""

    partitioned: ClassVar[bool] = True

    def provenance(self, snapshot: Snapshot, shard: str) -> Provenance:
        """Return the provenance of the file that a run would write now.

        Raises:
            NotReady: an input is missing or out of date.
        """
        return self._provenance(snapshot, shard)

    def is_fresh(self, snapshot: Snapshot, shard: str) -> bool:
        """Check whether the lake holds the file that a run would write.

        Raises:
            NotReady: an input of this shard is missing or out of date.
        """
        return self.written(snapshot, self.provenance(snapshot, shard)) is not None

    def written(self, snapshot: Snapshot, wanted: Provenance) -> Stored | None:
        """Return the record of a shard's file if it and the files beside it have this provenance, else None."""
        template, lake = self.declared.template, snapshot.context.lake
        assert isinstance(template, PartitionedTemplate)
        for key in (*template.beside, self.key):
            stored = lake.stored(key, wanted.shard)
            if stored is None or not stored.is_from(wanted if key == self.key else replace(wanted, asset=key)):
                return None
        return stored

    def is_due(self, snapshot: Snapshot, shard: str) -> bool:
        """Check whether a run would compute the shard: its inputs are there, and its file is not up to date."""
        try:
            return not self.is_fresh(snapshot, shard)
        except NotReady:
            return False

    def rows_due(self, snapshot: Snapshot, shards: Sequence[str]) -> int | None:
        """Return the number of rows that computing shards reports as done; None where it is not known beforehand."""
        template = self.declared.template
        assert isinstance(template, PartitionedTemplate)
        every_row = template.every_row
        if not (every_row(self.declared) if callable(every_row) else every_row):
            return None
        return sum(snapshot.context.lake.rows("raw_pool", shards).values())

    def compute(self, step: Step, shards: Sequence[str]) -> Outcomes:
        """Compute shards in order and yield each with its result or its error."""
        template = self.declared.template
        assert isinstance(template, PartitionedTemplate)
        return template.compute(step, shards)

    def computed(self, step: Step, shards: Sequence[str]) -> Computed:
        """Compute and write shards in order, and yield each with its record or its error."""
        # Closed here, so that decoding processes end with the step, also when it is interrupted.
        with contextlib.closing(self.compute(step, shards)) as outcomes:
            for shard, outcome in outcomes:
                yield shard, _write(self, step, shard, outcome)

    def write(self, snapshot: Snapshot, provenance: Provenance, result: Result) -> Stored:
        """Write one shard's tables.

        Raises:
            CheckFailed: a blocking check failed, and nothing was written.
        """
        new = {self.key: result.table, **result.beside}
        findings = check_before_writing(self.checks, self.tables(snapshot, provenance.shard, new))
        computed_on = {PROCESSOR_KEY: processor()} if "pytorch" in self.declared.template.kinds else {}
        summary = {**result.summary, **computed_on, SUMMARY_KEY: findings}
        return write_unchecked(snapshot.context.lake, provenance, replace(result, summary=summary))


def write_unchecked(lake: Lake, provenance: Provenance, result: Result) -> Stored:
    """Write one shard's tables without running the checks: those beside first, so that they are there once it is."""
    for beside, table in result.beside.items():
        lake.write(table, replace(provenance, asset=beside))
    return lake.write(result.table, provenance, content=result.content, summary=result.summary)


def _run(context: dg.AssetExecutionContext, asset: PartitionedAsset, step: Step) -> Iterator[dg.MaterializeResult]:
    records: list[Record] = []
    errors: dict[str, Exception] = {}
    wanted: dict[str | None, Provenance] = {}
    written_for_others = step.state.written_for_others
    for shard in context.partition_keys:
        try:
            provenance = asset.provenance(step.snapshot, shard)
            stored = asset.written(step.snapshot, provenance)
        except Exception as error:  # noqa: BLE001 - raised with all others below
            errors[shard] = error
            continue
        if stored is not None:
            records.append(Record(shard, stored, computed=stored.fingerprint in written_for_others))
            written_for_others.discard(stored.fingerprint)
        else:
            wanted[shard] = provenance

    is_followed = _is_followed(context, asset)
    engine = context.resources.engine
    log = EventLog(context, asset, step.context.lake, engine)
    if not is_followed:
        log.write(records)
    for record in _compute(asset, replace(step, wanted=wanted), errors, engine):
        records.append(record)
        if not is_followed:
            log.write([record])
    if errors:
        log.write(records if is_followed else [])
        raise _failure(context, asset, errors)
    if is_followed:
        # Later steps of the run start only when the output is yielded. Dagster then writes one event a partition with
        # one data version for all; the exact events follow and are the latest.
        yield dg.MaterializeResult()
        log.write(records)


def _compute(asset: PartitionedAsset, step: Step, errors: dict[str, Exception], engine: Engine) -> Iterator[Record]:
    """Let the engine compute and write shards; `errors` gets an error for every other shard."""
    left = dict.fromkeys(shard for shard in step.wanted if shard is not None)
    if not left:
        return
    reason: str | Exception = "the asset's function returned before"
    started = time.perf_counter()
    step.meter.expect(asset.rows_due(step.snapshot, list(left)), len(left))
    try:
        # Closed here, so that worker processes end with the step, also when it is interrupted.
        with contextlib.closing(engine.compute(asset, step, list(left))) as outcomes:
            for shard, written in outcomes:
                if shard not in left:
                    raise ValueError(f"yielded shard {shard}, which was not to be computed, or a second time")
                del left[shard]
                if isinstance(written, Exception):
                    errors[shard] = written
                    continue
                now = time.perf_counter()
                yield Record(shard, written, computed=True, seconds=now - started)
                started = now
    except Exception as error:  # noqa: BLE001 - raised by the caller for the shards that are left
        reason = error
    for shard in left:
        errors[shard] = NotAttempted(f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason)
        errors[shard].__cause__ = reason if isinstance(reason, Exception) else None


def _write(asset: PartitionedAsset, step: Step, shard: str, outcome: Outcome) -> Stored | Exception:
    """Write a shard's result; return its record, or the error that the shard ended with."""
    if isinstance(outcome, Exception):
        return outcome
    try:
        stored = asset.write(step.snapshot, step.wanted[shard], outcome)
    except Exception as error:  # noqa: BLE001 - raised with all others by the caller
        return error
    step.state.written[asset.key] += 1
    return stored


def _failure(context: dg.AssetExecutionContext, asset: PartitionedAsset, errors: Mapping[str, Exception]) -> dg.Failure:
    """Log the errors of shards, and return the failure that lists them."""
    failed = {shard: error for shard, error in errors.items() if not isinstance(error, NotAttempted)}
    for shard, found in failed.items():
        if isinstance(found, CheckFailed):
            log_checks(context, asset.key, shard, found.findings)
        context.log.error(f"{asset.key}, shard {shard}:\n{''.join(traceback.format_exception(found))}")
    left = {shard: error for shard, error in errors.items() if shard not in failed}
    total = len(context.partition_keys)
    counts = [f"{len(failed)} of {total} shards failed"] if failed else []
    lines = [f"{shard}: {error}" for shard, error in failed.items()]
    if left:
        error = next(iter(left.values()))
        context.log.error(f"{asset.key}:\n{''.join(traceback.format_exception(error))}")
        counts.append(f"{len(left)} of {total} shards were not attempted")
        lines.append(f"not attempted ({error}): {', '.join(left)}")
    return dg.Failure(
        description=f"{asset.key}: {' and '.join(counts)}; the others are computed.\n" + "\n".join(lines),
        metadata={FAILED_SHARDS: sorted(failed), **({NOT_ATTEMPTED: sorted(left)} if left else {})},
        allow_retries=any(not isinstance(e, NotReady | LakeError | CheckFailed) for e in errors.values()),
    )


def _check_again(context: dg.AssetExecutionContext, asset: PartitionedAsset, step: Step) -> None:
    """Run the checks of files that are there: the checks were launched without the asset."""
    requested = {key.name for key in context.selected_asset_check_keys}
    checks = [check for check in asset.checks if check.name in requested]
    for shard in context.partition_keys:
        log_checks(context, asset.key, shard, check_stored(checks, asset.tables(step.snapshot, shard)))


def _is_followed(context: dg.AssetExecutionContext, asset: PartitionedAsset) -> bool:
    """Check whether an asset that reads this one is computed in the same run."""
    layer = context.op_execution_context.job_def.asset_layer
    children = layer.asset_graph.get(asset_key(asset.key)).child_keys
    return bool(children & layer.selected_asset_keys)
