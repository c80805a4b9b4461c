"""`external_uids/<name>`: an imported uid list, which recipes call by this asset's key."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from assets.base.asset import Declared, FileAsset, Step
from assets.base.context import Context, Snapshot
from assets.base.results import Result
from assets.base.unpartitioned import unpartitioned
from assets.scores.coverage import pool_coverage
from assets.scores.external_scores import UIDS, files_fingerprint
from resources.inputs.external import find, opened
from resources.lake.files import sample_digest
from resources.settings import ExternalUids


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = asset.settings.external_uids[asset.names["name"]]
    return {"uid": settings.uid, "minimum_coverage": settings.minimum_coverage}


def _files(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    return files_fingerprint(snapshot, "external_uids", asset.declared.names["name"])


@unpartitioned(
    key="external_uids/{name}",
    deps=[],
    columns=UIDS,
    checks=[lambda asset: pool_coverage("external_uids", asset.names["name"])],
    code_version="1",
    group_name="external",
    kinds={"duckdb", "parquet"},
    description="An imported uid list, which recipes call by this asset's key. A new list is compared with the pool as "
    "it is then.",
    parameters=_parameters,
    inputs=_files,
)
def external_uids(step: Step) -> Result:
    """Read a uid list."""
    uids = read_uids(step.context.settings.external_uids[step.names["name"]])
    return Result(uids, content=sample_digest(uids))


def read_uids(settings: ExternalUids) -> pa.Table:
    """Read the files of a uid list: columns f0 and f1, sorted, each uid once.

    Raises:
        ExternalError: a file is missing or can't be read.
    """
    with opened(find(settings.files), uid=settings.uid) as table:
        return table.uids().cast(UIDS)
