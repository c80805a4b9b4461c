"""What the assets without partitions have in common: skip when the lake already holds what a run would write.

Here: `WholeAsset` and its body. Not here: any computation, and not subsets, of which every version stays.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
import pyarrow as pa

from assets.base.checks import (
    SUMMARY_KEY,
    CheckFailed,
    Tables,
    asset_key,
    checks_of,
    examine,
    examine_before_writing,
    results,
    specs,
    tell,
)
from assets.base.partitioned import NotReady, Result, asset_spec, event_metadata, once
from assets.project import Project
from resources.inputs.targets import TargetError
from resources.lake.files import Provenance
from resources.models.encoders import EncoderError


class Redraw(dg.Config):
    """Run configuration of an asset that is kept once made.

    Attributes:
        redraw: make it again from what the lake holds now, although its settings are unchanged.
    """

    redraw: bool = False


@dataclass(frozen=True)
class WholeAsset:
    """An asset of one file.

    Attributes:
        key: its key, such as `negatives/b32`.
        deps: keys of the assets it reads.
        provenance: gives the provenance of the file that a run would write now, told whether a redraw is asked
            for; raises NotReady.
        compute: makes it.
        definition: the Dagster asset.
    """

    key: str
    deps: tuple[str, ...]
    provenance: Callable[[bool], Provenance]
    compute: Callable[[], Result]
    definition: dg.AssetsDefinition

    def is_fresh(self, project: Project) -> bool:
        """Tell whether the lake holds what a run would write; False also when inputs are missing."""
        try:
            wanted = self.provenance(False)
        except NotReady:
            return False
        stored = project.lake.stored(self.key)
        return stored is not None and stored.is_from(wanted)


def up_to_date(project: Project, asset: WholeAsset) -> str:
    """Give the fingerprint of an asset that another one reads.

    Raises:
        NotReady: it is not there, can't be made, or is not what a run would write now: a score must not join
            embeddings of one encoder with targets or negatives of another.
    """
    return once(project, asset.key, lambda: _up_to_date(project, asset))


def _up_to_date(project: Project, asset: WholeAsset) -> str:
    try:
        wanted = asset.provenance(False)
    except (NotReady, TargetError, EncoderError) as error:
        raise NotReady(f"{asset.key} can't be made: {error}") from error
    stored = project.lake.stored(asset.key)
    if stored is None or not stored.is_from(wanted):
        raise NotReady(f"{asset.key} is {'not there yet' if stored is None else 'out of date'}. Remedy: materialize it")
    return stored.fingerprint


def whole_asset(
    project: Project,
    *,
    key: str,
    deps: Sequence[str],
    provenance: Callable[[bool], Provenance],
    compute: Callable[[], Result],
    code_version: str,
    group: str,
    kinds: set[str],
    description: str,
    columns: pa.Schema,
    pool: str | None = None,
) -> WholeAsset:
    """Make an unpartitioned asset from the provenance it would write and its computation."""
    checks = checks_of(project, key)

    @dg.multi_asset(
        name=key.replace("/", "__"),
        specs=[asset_spec(project, key, deps, code_version, group, kinds, description, columns)],
        check_specs=specs(checks, key),
        can_subset=True,
        pool=pool,
    )
    def body(context: dg.AssetExecutionContext, config: Redraw) -> Iterator[dg.MaterializeResult]:
        project.look_again()
        if not context.selected_asset_keys:
            asked = {check.name for check in context.selected_asset_check_keys}
            chosen = [check for check in checks if check.name in asked]
            tell(context, key, None, examine(chosen, Tables(project, None)))
            return
        try:
            wanted = provenance(config.redraw)
        except NotReady as error:
            raise dg.Failure(f"{key}: {error}", allow_retries=False) from error
        stored = project.lake.stored(key)
        computed = stored is None or not stored.is_from(wanted)
        started = time.perf_counter()
        if stored is None or computed:
            result = compute()
            try:
                findings = examine_before_writing(checks, project, key, None, {key: result.table})
            except CheckFailed as error:
                tell(context, key, None, error.findings)
                raise dg.Failure(str(error), allow_retries=False) from error
            summary = {**result.summary, SUMMARY_KEY: findings}
            stored = project.lake.write(result.table, wanted, content=result.content, summary=summary)
        metadata = event_metadata(stored, computed, time.perf_counter() - started)
        metadata["dagster/row_count"] = metadata.pop("dagster/partition_row_count")
        yield dg.MaterializeResult(
            asset_key=asset_key(key),
            metadata=metadata,
            check_results=results(context, stored.summary.get(SUMMARY_KEY, {})),
            data_version=dg.DataVersion(stored.fingerprint),
        )

    return WholeAsset(key, tuple(deps), provenance, compute, body)
