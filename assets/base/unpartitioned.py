"""Assets of one file: the decorator `unpartitioned`, and how Dagster runs such an asset.

Here: assets that are skipped when their file is up to date. Not here: any computation, and subsets, of
which every version stays.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import dagster as dg

from assets.base.asset import Declared, FileAsset, Step, Template, event_metadata
from assets.base.checks import (
    SUMMARY_KEY,
    CheckFailed,
    check_before_writing,
    check_results,
    check_specs,
    check_stored,
    findings_of,
    log_checks,
)
from assets.base.context import Context, Snapshot
from assets.base.engines import measured_with
from assets.base.keys import asset_key
from assets.base.results import NotReady, Result
from assets.base.runtime import REQUIRED_RESOURCES, begin_step
from resources.inputs.targets import TargetError
from resources.lake.files import Provenance, Stored
from resources.models.decoding import EncoderError


class Redraw(dg.Config):
    """Run configuration of an unpartitioned asset.

    Attributes:
        redraw: compute it again from the lake's current inputs, although its settings are unchanged.
    """

    redraw: bool = False


def unpartitioned(**arguments: Any) -> "Callable[[Callable[[Step], Result]], UnpartitionedTemplate]":
    """Declare an asset of one file. The decorated function computes a `Step` and returns a `Result`.

    Args:
        arguments: the fields of `UnpartitionedTemplate`.
    """
    return lambda function: UnpartitionedTemplate(function=function, **arguments)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpartitionedTemplate(Template):
    """A template of assets of one file.

    Attributes:
        keeps: whether a stored file stays although the files of shards that it was computed from have changed, as long
            as its parameters and its recorded `deps` are the same and no redraw is asked for. By default it does not.
        stays: whether a stored file that is up to date is certain to stay when only shards arrive or change. Sensors
            then compute what reads it in the same run as the shard's other assets.
        metadata: further metadata of the stored file for Dagster's UI, such as pictures.
    """

    keeps: Callable[[Declared, Stored, Snapshot], bool] = lambda declared, stored, snapshot: False
    stays: Callable[[Declared, Stored], bool] = lambda declared, stored: False
    metadata: Callable[[Context, Declared], Mapping[str, Any]] = lambda context, declared: {}

    def build(self, declared: Declared, project: Context, assets: Mapping[str, Any]) -> "UnpartitionedAsset":
        """Return a project's asset."""

        @dg.multi_asset(
            name=declared.key.replace("/", "__"),
            specs=[declared.spec()],
            check_specs=check_specs(declared.checks, declared.key),
            can_subset=True,
            pool=self.pool,
            required_resource_keys=REQUIRED_RESOURCES,
        )
        def body(context: dg.AssetExecutionContext, config: Redraw) -> Iterator[dg.MaterializeResult]:
            step = begin_step(context, asset)
            if context.selected_asset_keys:
                yield _run(context, asset, step, redraw=config.redraw)
            else:
                requested = {check.name for check in context.selected_asset_check_keys}
                checks = [check for check in asset.checks if check.name in requested]
                log_checks(context, asset.key, None, check_stored(checks, asset.tables(step.snapshot, None)))

        asset = UnpartitionedAsset(declared, project, assets, body)
        return asset


@dataclass(frozen=True, eq=False)
class UnpartitionedAsset(FileAsset):
    """An asset of a project of one file."""

    partitioned: ClassVar[bool] = False

    def provenance(self, snapshot: Snapshot, *, redraw: bool = False) -> Provenance:
        """Return the provenance of the file that a run would write now.

        Raises:
            NotReady: an input is missing or out of date.
        """
        if redraw:
            return self._wanted(snapshot, redraw=True)
        return snapshot.memoized(f"{self.key} provenance", lambda: self._wanted(snapshot, redraw=False))

    def _wanted(self, snapshot: Snapshot, *, redraw: bool) -> Provenance:
        template = self.declared.template
        assert isinstance(template, UnpartitionedTemplate)
        stored = snapshot.context.lake.stored(self.key)
        if stored is not None and not redraw and template.keeps(self.declared, stored, snapshot):
            inputs = {**stored.provenance.inputs, **self.recorded_deps(snapshot, None)}
            kept = Provenance(self.key, None, template.code_version, self.parameters(snapshot), inputs)
            if stored.is_from(kept):
                return kept
        return self._provenance(snapshot, None)

    def is_fresh(self, snapshot: Snapshot) -> bool:
        """Check whether the lake holds the file that a run would write; False also when inputs are missing."""
        try:
            wanted = self.provenance(snapshot)
        except NotReady:
            return False
        return self.written(snapshot, wanted) is not None

    def written(self, snapshot: Snapshot, wanted: Provenance) -> Stored | None:
        """Return the record of the asset's file if it has this provenance, else None."""
        stored = snapshot.context.lake.stored(self.key)
        return stored if stored is not None and stored.is_from(wanted) else None

    def stays(self, snapshot: Snapshot) -> bool:
        """Check whether the stored file, which is up to date, is certain to stay when only shards arrive or change."""
        template = self.declared.template
        assert isinstance(template, UnpartitionedTemplate)
        stored = snapshot.context.lake.stored(self.key)
        return stored is not None and template.stays(self.declared, stored)

    def fingerprint(self, snapshot: Snapshot) -> str:
        """Return the fingerprint of the file, for an asset that reads it.

        Raises:
            NotReady: the file is missing, can't be made, or is out of date: a score must not combine embeddings of one
                encoder with targets or negatives of another.
        """
        return snapshot.memoized(f"{self.key} fingerprint", lambda: self._fingerprint(snapshot))

    def _fingerprint(self, snapshot: Snapshot) -> str:
        try:
            wanted = self.provenance(snapshot)
        except (NotReady, TargetError, EncoderError) as error:
            raise NotReady(f"{self.key} can't be made: {error}") from error
        stored = snapshot.context.lake.stored(self.key)
        if stored is None or not stored.is_from(wanted):
            state = "not there yet" if stored is None else "out of date"
            raise NotReady(f"{self.key} is {state}. Remedy: materialize it")
        return stored.fingerprint

    def compute(self, step: Step) -> Result:
        """Compute it."""
        result: Result = self.declared.template.function(step)
        return result

    def write(self, snapshot: Snapshot, provenance: Provenance, result: Result) -> Stored:
        """Write the table.

        Raises:
            CheckFailed: a blocking check failed, and nothing was written.
        """
        findings = check_before_writing(self.checks, self.tables(snapshot, None, {self.key: result.table}))
        summary = {**result.summary, SUMMARY_KEY: findings}
        return snapshot.context.lake.write(result.table, provenance, content=result.content, summary=summary)


def _run(
    context: dg.AssetExecutionContext, asset: UnpartitionedAsset, step: Step, *, redraw: bool
) -> dg.MaterializeResult:
    try:
        wanted = asset.provenance(step.snapshot, redraw=redraw)
    except NotReady as error:
        raise dg.Failure(f"{asset.key}: {error}", allow_retries=False) from error
    stored = step.stored(asset.key)
    computed = stored is None or not stored.is_from(wanted)
    started = time.perf_counter()
    if stored is None or computed:
        result = asset.compute(replace(step, wanted={None: wanted}))
        try:
            stored = asset.write(step.snapshot, wanted, result)
            step.state.written[asset.key] += 1
        except CheckFailed as error:
            log_checks(context, asset.key, None, error.findings)
            raise dg.Failure(str(error), allow_retries=False) from error
    metadata = event_metadata(stored, computed, time.perf_counter() - started)
    metadata |= measured_with(context.resources.engine) if computed else {}
    metadata["dagster/row_count"] = metadata.pop("dagster/partition_row_count")
    template = asset.declared.template
    assert isinstance(template, UnpartitionedTemplate)
    metadata |= template.metadata(step.context, asset.declared)
    return dg.MaterializeResult(
        asset_key=asset_key(asset.key),
        metadata=metadata,
        check_results=check_results(context, findings_of(step.context.lake, stored)),
        data_version=dg.DataVersion(stored.fingerprint),
    )
