"""What every asset with one file a shard has in common: what is fresh, what is skipped, what is recorded.

Here: `ShardAsset` and the body that all sharded assets run. Not here: any computation.

One run may cover many shards, so that a model is loaded once. Each shard still gets its own event, with its own
data version, input versions and figures, because Dagster would copy one data version to every partition of a
range (measured; pinned in `tests/test_dagster_pins.py`). A shard that fails is left out and named at the end;
the others are done.
"""

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import dagster as dg
import pyarrow as pa

from assets.base.checks import (
    SUMMARY_KEY,
    Check,
    CheckFailed,
    Tables,
    asset_key,
    checks_of,
    examine,
    examine_before_writing,
    specs,
    tags,
    tell,
)
from assets.project import Project
from resources.lake.files import LakeError, Provenance, Stored

T = TypeVar("T")

SHARDS_NAME = "shards"
SHARDS = dg.DynamicPartitionsDefinition(name=SHARDS_NAME)

# Tags by which Dagster tells what is stale; it exports no names for them.
DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"
INPUT_DATA_VERSION_TAG = "dagster/input_data_version/{}"
INPUT_EVENT_POINTER_TAG = "dagster/input_event_pointer/{}"


class NotReady(Exception):  # noqa: N818 - a state that passes, not an error
    """What the asset reads is not there yet; the message names it and the remedy."""


@dataclass(frozen=True)
class Result:
    """What an asset computed for one shard.

    Attributes:
        table: the rows.
        summary: figures about them; the same inputs give the same summary.
        content: a digest of the content, where that is the file's fingerprint.
        beside: further tables of the same shard, by asset key; they are written before `table`.
    """

    table: pa.Table
    summary: Mapping[str, Any] = field(default_factory=dict)
    content: str | None = None
    beside: Mapping[str, pa.Table] = field(default_factory=dict)


Outcome = Result | Exception
Compute = Callable[[Sequence[str]], Iterator[tuple[str, Outcome]]]


@dataclass(frozen=True)
class ShardAsset:
    """An asset with one file a shard.

    Attributes:
        key: its key, such as `clip_score/b32`.
        deps: keys of the assets it reads.
        provenance: gives, for a shard, the provenance of the file that a run would write now; raises NotReady.
        compute: works through shards in order and yields each with its result or the error that befell it.
        checks: what must hold of a shard's file before it is written.
        definition: the Dagster asset.
    """

    key: str
    deps: tuple[str, ...]
    provenance: Callable[[str], Provenance]
    compute: Compute
    checks: tuple[Check, ...]
    definition: dg.AssetsDefinition

    def is_fresh(self, project: Project, shard: str) -> bool:
        """Tell whether the lake holds what a run would write.

        Raises:
            NotReady: what the asset reads of this shard is not there.
        """
        wanted = self.provenance(shard)
        stored = project.lake.stored(self.key, shard)
        return stored is not None and stored.is_from(wanted)

    def is_due(self, project: Project, shard: str) -> bool:
        """Tell whether a run would compute the shard: its inputs are there, and its file is not up to date."""
        try:
            return not self.is_fresh(project, shard)
        except NotReady:
            return False


def each(function: Callable[[str], Result]) -> Compute:
    """Turn a function of one shard into a `Compute`; an error stays with its shard."""

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        for shard in shards:
            try:
                yield shard, function(shard)
            except Exception as error:  # noqa: BLE001 - raised with all others when the shards are through
                yield shard, error

    return compute


def once(project: Project, what: str, look: Callable[[], T]) -> T:
    """Look; within `Project.at_rest` the first look's answer is given again, also that something is not ready.

    Args:
        project: the project.
        what: names the answer.
        look: gives it, or raises NotReady.
    """
    answers = project.answers
    if answers is None:
        return look()
    if what not in answers:
        try:
            answers[what] = look()
        except NotReady as error:
            answers[what] = error
    answer: T | NotReady = answers[what]
    if isinstance(answer, NotReady):
        raise answer.with_traceback(None)
    return answer


def input_fingerprint(project: Project, asset: str, shard: str | None = None) -> str:
    """Give the fingerprint of a file that an asset reads.

    Raises:
        NotReady: there is no such file.
    """
    stored = project.lake.stored(asset, shard)
    if stored is None:
        of = f" of shard {shard}" if shard else ""
        raise NotReady(f"{asset}{of} is not there yet. Remedy: materialize it first")
    return stored.fingerprint


def sharded_asset(
    project: Project,
    *,
    key: str,
    deps: Sequence[str],
    provenance: Callable[[str], Provenance],
    compute: Compute,
    code_version: str,
    group: str,
    kinds: set[str],
    description: str,
    columns: pa.Schema,
    pool: str | None = None,
) -> ShardAsset:
    """Make a sharded asset from the provenance it would write and the computation of its shards."""
    # Beta and preview in Dagster 1.13; what they have to do is held in tests/test_dagster_pins.py and test_checks.py.
    warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)
    warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")
    checks = checks_of(project, key)

    @dg.multi_asset(
        name=key.replace("/", "__"),
        specs=[asset_spec(project, key, deps, code_version, group, kinds, description, columns)],
        check_specs=specs(checks, key, SHARDS),
        # A check of a subsettable asset may stay without a result, and may be launched by itself.
        can_subset=True,
        partitions_def=SHARDS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=pool,
    )
    def body(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        project.look_again()
        layer = context.op_execution_context.job_def.asset_layer
        project.asked = frozenset("/".join(key.path) for key in layer.selected_asset_keys)
        if context.selected_asset_keys:
            yield from _run(context, project, asset)
        else:
            _check_again(context, project, asset)

    asset = ShardAsset(key, tuple(deps), provenance, compute, checks, body)
    return asset


def asset_spec(
    project: Project,
    key: str,
    deps: Sequence[str],
    code_version: str,
    group: str,
    kinds: set[str],
    description: str,
    columns: pa.Schema,
) -> dg.AssetSpec:
    """Say what Dagster shows of an asset of files; skippable, because events may be logged in place of an output."""
    return dg.AssetSpec(
        asset_key(key),
        deps=[asset_key(dep) for dep in deps],
        skippable=True,
        code_version=code_version,
        group_name=group,
        kinds=kinds,
        tags=tags(project, key),
        description=description,
        metadata={"dagster/column_schema": column_schema(columns)},
    )


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """Give an Arrow schema as Dagster shows it."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(f.name, str(f.type), constraints=dg.TableColumnConstraints(nullable=f.nullable))
            for f in schema
        ]
    )


@dataclass(frozen=True)
class _Record:
    """What is told of one shard in the event log."""

    shard: str
    stored: Stored
    computed: bool
    seconds: float = 0.0


def _run(context: dg.AssetExecutionContext, project: Project, asset: ShardAsset) -> Iterator[dg.MaterializeResult]:
    records: list[_Record] = []
    errors: dict[str, Exception] = {}
    wanted: dict[str, Provenance] = {}
    with project.at_rest():
        for shard in context.partition_keys:
            try:
                provenance = asset.provenance(shard)
                stored = project.lake.stored(asset.key, shard)
            except Exception as error:  # noqa: BLE001 - raised with all others below
                errors[shard] = error
                continue
            if stored is not None and stored.is_from(provenance):
                along = stored.fingerprint in project.made_along
                project.made_along.discard(stored.fingerprint)
                records.append(_Record(shard, stored, computed=along))
                project.on_progress(asset.key, shard, stored.rows)
            else:
                wanted[shard] = provenance

    followed = _is_followed(context, asset)
    log = _EventLog(context, asset)
    if not followed:
        log.write(records)
    for record in _compute(project, asset, wanted, errors):
        records.append(record)
        if not followed:
            log.write([record])
    if errors:
        log.write(records if followed else [])
        for shard, found in errors.items():
            if isinstance(found, CheckFailed):
                tell(context, asset.key, shard, found.findings)
            context.log.error(f"{asset.key}, shard {shard}:\n{''.join(traceback.format_exception(found))}")
        listed = "\n".join(f"{shard}: {found}" for shard, found in errors.items())
        raise dg.Failure(
            description=f"{asset.key}: {len(errors)} of {len(context.partition_keys)} shards failed; the others "
            f"are done.\n{listed}",
            metadata={"failed_shards": sorted(errors)},
            allow_retries=any(not isinstance(e, NotReady | LakeError | CheckFailed) for e in errors.values()),
        )
    if followed:
        # Steps behind this one in the same run start only when the output is yielded. Dagster then writes one
        # event a partition with one data version for all; the exact events follow and are the latest.
        yield dg.MaterializeResult()
        log.write(records)


def _compute(
    project: Project, asset: ShardAsset, wanted: Mapping[str, Provenance], errors: dict[str, Exception]
) -> Iterator[_Record]:
    if not wanted:
        return
    started = time.perf_counter()
    for shard, outcome in asset.compute(list(wanted)):
        if isinstance(outcome, Exception):
            errors[shard] = outcome
            continue
        try:
            stored = write(project, asset.key, asset.checks, wanted[shard], outcome)
        except Exception as error:  # noqa: BLE001 - raised with all others by the caller
            errors[shard] = error
            continue
        now = time.perf_counter()
        yield _Record(shard, stored, computed=True, seconds=now - started)
        started = now


def _check_again(context: dg.AssetExecutionContext, project: Project, asset: ShardAsset) -> None:
    """Look at the checks of files that are there: somebody launched the checks without the asset."""
    asked = {key.name for key in context.selected_asset_check_keys}
    for shard in context.partition_keys:
        found = examine([check for check in asset.checks if check.name in asked], Tables(project, shard))
        tell(context, asset.key, shard, found)


def write(project: Project, key: str, checks: Sequence[Check], provenance: Provenance, result: Result) -> Stored:
    """Write one shard's tables if the asset's checks let them.

    Raises:
        CheckFailed: a blocking check failed, and nothing was written.
    """
    new = {key: result.table, **result.beside}
    findings = examine_before_writing(checks, project, key, provenance.shard, new)
    for beside, table in result.beside.items():
        project.lake.write(
            table,
            Provenance(beside, provenance.shard, provenance.code_version, provenance.parameters, provenance.inputs),
        )
    summary = {**result.summary, SUMMARY_KEY: findings}
    return project.lake.write(result.table, provenance, content=result.content, summary=summary)


def _is_followed(context: dg.AssetExecutionContext, asset: ShardAsset) -> bool:
    """Tell whether an asset that reads this one is computed in the same run."""
    layer = context.op_execution_context.job_def.asset_layer
    children = layer.asset_graph.get(asset_key(asset.key)).child_keys
    return bool(children & layer.selected_asset_keys)


class _EventLog:
    """Writes one materialization event a shard, exact in its data version and input versions."""

    def __init__(self, context: dg.AssetExecutionContext, asset: ShardAsset) -> None:
        self.context = context
        self.asset = asset
        self.code_version = asset.definition.code_versions_by_key[asset.definition.key]
        self._pointers: dict[str, Mapping[str, int]] = {}

    def write(self, records: Iterable[_Record]) -> None:
        for record in records:
            self.context.log_event(
                dg.AssetMaterialization(
                    asset_key=self.asset.definition.key,
                    partition=record.shard,
                    metadata=event_metadata(record.stored, record.computed, record.seconds),
                    tags=self._tags(record),
                )
            )
            tell(self.context, self.asset.key, record.shard, record.stored.summary.get(SUMMARY_KEY, {}))

    def _tags(self, record: _Record) -> dict[str, str]:
        tags = {DATA_VERSION_TAG: record.stored.fingerprint}
        if self.code_version is not None:
            tags[CODE_VERSION_TAG] = self.code_version
        for dep in self.asset.deps:
            version = record.stored.provenance.inputs.get(dep)
            pointer = self._pointer(dep, record.shard)
            if version is not None and pointer is not None:
                tags[INPUT_DATA_VERSION_TAG.format(dep)] = version
                tags[INPUT_EVENT_POINTER_TAG.format(dep)] = str(pointer)
        return tags

    def _pointer(self, dep: str, shard: str) -> int | None:
        """Give the id of the latest event of what was read: the shard's, or the unpartitioned asset's."""
        if dep not in self._pointers:
            key = asset_key(dep)
            latest = self.context.instance.event_log_storage.get_latest_storage_id_by_partition(
                key, dg.DagsterEventType.ASSET_MATERIALIZATION
            )
            if not latest:
                event = self.context.instance.get_latest_materialization_event(key)
                records = self.context.instance.fetch_materializations(key, limit=1).records if event else []
                latest = {"": records[0].storage_id} if records else {}
            self._pointers[dep] = latest
        return self._pointers[dep].get(shard, self._pointers[dep].get(""))


def event_metadata(stored: Stored, computed: bool, seconds: float) -> dict[str, Any]:
    """Give what the UI shows of a file: numbers as numbers, so that Dagster plots them over shards."""
    metadata: dict[str, Any] = {
        "dagster/partition_row_count": stored.rows,
        "fingerprint": stored.fingerprint,
        "computed": computed,
    }
    if computed and seconds > 0:
        metadata["seconds"] = round(seconds, 3)
        metadata["rows_per_second"] = round(stored.rows / seconds, 1)
    metadata.update({name: value for name, value in stored.summary.items() if name != SUMMARY_KEY})
    return metadata
