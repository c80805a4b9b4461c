"""`external_scores/<name>`: imported scores, joined by uid, with `external_files/<name>` before it.

Here: scores in files that the YAML names. Not here: how such files are read (`resources.inputs.external`), and their
coverage checks (`assets.scores.coverage`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, FileAsset, Step
from assets.base.columns import Column
from assets.base.context import Context, Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Outcome, Result
from assets.base.score_kind import ScoreKind
from assets.base.score_tables import score_stats
from assets.base.settings import ProjectSettings, json_settings
from assets.base.standard_checks import rows_aligned
from assets.base.unpartitioned import unpartitioned
from assets.scores.coverage import pool_coverage, shard_coverage
from core.hashing import digest
from core.uids import format_uids
from resources.inputs.external import ExternalError, Table, find, opened
from resources.lake.files import LakeError
from resources.settings import ExternalScores
from resources.storage import files

ROWS_AT_ONCE = 2_000_000  # of the pool, looked up by one pass over the files
UIDS = pa.schema([pa.field("f0", pa.uint64(), nullable=False), pa.field("f1", pa.uint64(), nullable=False)])
FILES = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def files_fingerprint(snapshot: Snapshot, field: str, name: str) -> dict[str, str]:
    """Return the fingerprint of imported files; `field` is the YAML's, `name` the name there.

    Raises:
        NotReady: a file is missing.
    """
    try:
        return {"files": snapshot.files_fingerprint(field, name)}
    except ExternalError as error:
        raise NotReady(f"{field}.{name}: {error}") from error


def _settings(asset: Declared) -> ExternalScores:
    return asset.settings.external_scores[asset.names["name"]]


def _files(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    return files_fingerprint(snapshot, "external_scores", asset.declared.names["name"])


@unpartitioned(
    key="external_files/{name}",
    deps=[],
    columns=FILES,
    checks=[lambda asset: pool_coverage("external_scores", asset.names["name"])],
    code_version="1",
    group_name="external",
    kinds={"parquet"},
    description="The files of `external_scores/{name}`, with their SHA-256. New files are compared with the pool as it "
    "is then.",
    parameters=lambda context, asset: {"minimum_coverage": _settings(asset).minimum_coverage},
    inputs=_files,
)
def external_files(step: Step) -> Result:
    """Hash the files of an imported score."""
    found = find(_settings(step.asset.declared).files)
    digests = [files.sha256(file.url) for file in found]
    sizes = [int(file.stamp.split()[0]) for file in found]
    table = pa.table([[file.url for file in found], sizes, digests], schema=FILES)
    return Result(table, {"files": len(found), "bytes": sum(sizes)}, content=digest(digests))


def _columns(asset: Declared) -> Sequence[Column]:
    return [
        Column(
            name=name,
            type=pa.float64(),
            description=f"Column `{column}` of the files; NULL for uids that they lack.",
            direction="larger",
            bounds=None,
            nullable=True,
        )
        for name, column in _settings(asset).columns.items()
    ]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    return {"uid": settings.uid, "columns": settings.columns}


@partitioned(
    key="external_scores/{name}",
    deps=["raw_pool", "external_files/{name}"],
    columns=_columns,
    checks=[rows_aligned, shard_coverage],
    code_version="1",
    group_name="external",
    kinds={"duckdb", "parquet"},
    description=lambda asset: (
        f"Imported scores, joined by uid: {', '.join(_settings(asset).columns)}. NULL where the files have no value "
        "for a uid."
    ),
    parameters=_parameters,
    streams=True,
    spread=False,
)
def external_scores(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Look up the shards' uids in the files."""
    settings = _settings(step.asset.declared)
    try:
        with opened(find(settings.files), uid=settings.uid, columns=settings.columns) as table:
            for some in _in_groups(step, shards):
                yield from _look_up(step, table, some)
    except ExternalError as error:
        yield from ((shard, error) for shard in shards)


def _in_groups(step: Step, shards: Sequence[str]) -> Iterator[dict[str, pa.Table | Exception]]:
    """Yield the uids of several shards at once, so that one pass over the files serves many rows."""
    some: dict[str, pa.Table | Exception] = {}
    rows = 0
    for shard in shards:
        try:
            uids = step.read("raw_pool", shard, ["f0", "f1"]).cast(UIDS)
            some[shard], rows = uids, rows + uids.num_rows
        except LakeError as error:
            some[shard] = error
        if rows >= ROWS_AT_ONCE:
            yield some
            some, rows = {}, 0
    yield some


def _look_up(step: Step, table: Table, some: Mapping[str, pa.Table | Exception]) -> Iterator[tuple[str, Outcome]]:
    pool = pa.concat_tables([UIDS.empty_table(), *(rows for rows in some.values() if isinstance(rows, pa.Table))])
    values, differs = table.look_up(pool["f0"].to_numpy(), pool["f1"].to_numpy())
    start = 0
    for shard, rows in some.items():
        if isinstance(rows, Exception):
            yield shard, rows
            continue
        here = slice(start, start + rows.num_rows)
        start = here.stop
        step.progress(rows.num_rows, shard)
        of_shard = {column: numbers[here] for column, numbers in values.items()}
        yield shard, _result(step.asset.key, shard, rows, of_shard, np.flatnonzero(differs[here]))


def _result(key: str, shard: str, rows: pa.Table, values: Mapping[str, np.ndarray], differs: np.ndarray) -> Outcome:
    if len(differs):
        first = rows.slice(int(differs[0]), 1)
        (uid,) = format_uids(first["f0"].to_numpy(), first["f1"].to_numpy())
        return ExternalError(
            f"{key}: {len(differs)} uids have more than one value, the first is {uid}. Remedy: one value a uid"
        )
    columns = {column: pa.array(numbers, from_pandas=True) for column, numbers in values.items()}
    table = pa.table(
        {"shard": pa.array([shard] * rows.num_rows, pa.string()), "f0": rows["f0"], "f1": rows["f1"], **columns}
    )
    summary: dict[str, object] = {}
    for column, numbers in values.items():
        summary |= score_stats(column, numbers[np.isfinite(numbers)])
    return Result(table, summary)


def configured(settings: ProjectSettings) -> Mapping[str, ExternalScores]:
    """Return the settings by name."""
    return settings.external_scores


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    kept = {name: json_settings(m) for name, m in configured(settings).items() if f"external_scores/{name}" in wanted}
    return {"external_scores": kept}


EXTERNAL_SCORES = ScoreKind(
    name="external_scores",
    asset=external_scores,
    settings=None,
    configured=configured,
    instances=lambda settings: [{"name": name} for name in configured(settings)],
    upstream=lambda settings: (external_files.declare(settings, name=name) for name in configured(settings)),
    validate=lambda settings: None,
    recorded=_recorded,
    user_columns=True,
)
