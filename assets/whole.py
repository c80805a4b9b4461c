"""What the assets without partitions have in common: skip when the lake already holds what a run would write.

Here: `WholeAsset` and its body. Not here: any computation, and not subsets, of which every version stays.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dagster as dg
import pyarrow as pa

from assets.project import Project
from assets.sharded import NotReady, Result, column_schema, event_metadata
from resources.lake import Provenance


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
        return stored is not None and stored.provenance.digest() == wanted.digest()


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

    @dg.asset(
        key=dg.AssetKey(key.split("/")),
        deps=[dg.AssetKey(dep.split("/")) for dep in deps],
        code_version=code_version,
        group_name=group,
        kinds=kinds,
        description=description,
        metadata={"dagster/column_schema": column_schema(columns)},
        pool=pool,
    )
    def body(config: Redraw) -> dg.MaterializeResult:
        project.look_again()
        try:
            wanted = provenance(config.redraw)
        except NotReady as error:
            raise dg.Failure(f"{key}: {error}", allow_retries=False) from error
        stored = project.lake.stored(key)
        computed = stored is None or stored.provenance.digest() != wanted.digest()
        started = time.perf_counter()
        if stored is None or computed:
            result = compute()
            stored = project.lake.write(result.table, wanted, content=result.content, summary=result.summary)
        metadata = event_metadata(stored, computed, time.perf_counter() - started)
        metadata["dagster/row_count"] = metadata.pop("dagster/partition_row_count")
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(stored.fingerprint))

    return WholeAsset(key, tuple(deps), provenance, compute, body)
