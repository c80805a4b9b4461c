"""What others have computed: `external_scores/<name>` with `external_files/<name>` before it, `external_uids/<name>`.

Here: scores and uid lists in files that the YAML names. Not here: how such files are read
(`resources.inputs.external`), nor
what their coverage check asks for (`assets.scores.coverage`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, input_fingerprint, sharded_asset
from assets.base.score_tables import IDENTITY, figures
from assets.base.unpartitioned import WholeAsset, up_to_date, whole_asset
from assets.project import Project
from core.hashing import digest
from resources.inputs.external import ExternalError, Table, find, opened
from resources.lake.files import LakeError, Provenance, sample_digest
from resources.settings import ExternalUids
from resources.storage import files

CODE_VERSION = "1"
ROWS_AT_ONCE = 2_000_000  # of the pool, looked up by one pass over the files
UIDS = pa.schema([pa.field("f0", pa.uint64(), nullable=False), pa.field("f1", pa.uint64(), nullable=False)])
FILES = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def external_files(project: Project, name: str) -> WholeAsset:
    """Make the asset `external_files/<name>`: the files of a score, and the digest of each."""
    key = f"external_files/{name}"
    settings = project.settings.external_scores[name]

    def provenance(redraw: bool) -> Provenance:
        del redraw  # the same files are the same
        inputs = {"files": _fingerprint(project, "external_scores", name)}
        return Provenance(key, None, CODE_VERSION, {"minimum_coverage": settings.minimum_coverage}, inputs)

    def compute() -> Result:
        found = find(settings.files)
        digests = [files.sha256(file.url) for file in found]
        sizes = [int(file.stamp.split()[0]) for file in found]
        table = pa.table([[file.url for file in found], sizes, digests], schema=FILES)
        return Result(table, {"files": len(found), "bytes": sum(sizes)}, content=digest(digests))

    return whole_asset(
        project,
        key=key,
        deps=(),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="external",
        kinds={"parquet"},
        description=f"The files that `external_scores/{name}` is read from, with their digests. When they are new, "
        "they are compared with the pool as it is then.",
        columns=FILES,
    )


def external_scores(project: Project, name: str, read: WholeAsset) -> ShardAsset:
    """Make the asset `external_scores/<name>`; `read` is its `external_files/<name>`."""
    key = f"external_scores/{name}"
    settings = project.settings.external_scores[name]

    def provenance(shard: str) -> Provenance:
        inputs = {"raw_pool": input_fingerprint(project, "raw_pool", shard), read.key: up_to_date(project, read)}
        parameters = {"uid": settings.uid, "columns": settings.columns}
        return Provenance(key, shard, CODE_VERSION, parameters, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        try:
            with opened(find(settings.files), uid=settings.uid, columns=settings.columns) as table:
                for some in _in_groups(project, shards):
                    yield from _looked_up(project, key, table, some)
        except ExternalError as error:
            yield from ((shard, error) for shard in shards)

    values = [pa.field(column, pa.float64(), nullable=True) for column in settings.columns]
    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool", read.key),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="external",
        kinds={"duckdb", "parquet"},
        description=f"Scores from elsewhere, joined by uid: {', '.join(settings.columns)}. NULL where the files have "
        "no value for a uid.",
        columns=pa.schema([*IDENTITY, *values]),
    )


def _in_groups(project: Project, shards: Sequence[str]) -> Iterator[dict[str, pa.Table | Exception]]:
    """Give the uids of so many shards at once that a pass over the files serves many rows."""
    some: dict[str, pa.Table | Exception] = {}
    rows = 0
    for shard in shards:
        try:
            uids = project.lake.read("raw_pool", shard, ["f0", "f1"]).cast(UIDS)
            some[shard], rows = uids, rows + uids.num_rows
        except LakeError as error:
            some[shard] = error
        if rows >= ROWS_AT_ONCE:
            yield some
            some, rows = {}, 0
    yield some


def _looked_up(
    project: Project, key: str, table: Table, some: Mapping[str, pa.Table | Exception]
) -> Iterator[tuple[str, Outcome]]:
    pool = pa.concat_tables([UIDS.empty_table(), *(rows for rows in some.values() if isinstance(rows, pa.Table))])
    values, differs = table.look_up(pool["f0"].to_numpy(), pool["f1"].to_numpy())
    start = 0
    for shard, rows in some.items():
        if isinstance(rows, Exception):
            yield shard, rows
            continue
        here = slice(start, start + rows.num_rows)
        start = here.stop
        project.on_progress(key, shard, rows.num_rows)
        yield shard, _result(key, shard, rows, {c: v[here] for c, v in values.items()}, np.flatnonzero(differs[here]))


def _result(key: str, shard: str, rows: pa.Table, values: Mapping[str, np.ndarray], differs: np.ndarray) -> Outcome:
    from core.uids import format_uids

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
        summary |= figures(column, numbers[np.isfinite(numbers)])
    return Result(table, summary)


def external_uids(project: Project, name: str) -> WholeAsset:
    """Make the asset `external_uids/<name>`: the different uids of a list, sorted."""
    key = f"external_uids/{name}"

    def provenance(redraw: bool) -> Provenance:
        del redraw  # the same files are the same
        return _uids_provenance(project, name)

    def compute() -> Result:
        uids = read_uids(project.settings.external_uids[name])
        return Result(uids, content=sample_digest(uids))

    return whole_asset(
        project,
        key=key,
        deps=(),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="external",
        kinds={"duckdb", "parquet"},
        description="A uid list from elsewhere, which recipes call by this asset's key. When it is new, it is "
        "compared with the pool as it is then.",
        columns=UIDS,
    )


def read_uids(settings: ExternalUids) -> pa.Table:
    """Read the files of a uid list: columns f0 and f1, sorted, without repeats.

    Raises:
        ExternalError: a file is missing or can't be read.
    """
    with opened(find(settings.files), uid=settings.uid) as table:
        return table.uids().cast(UIDS)


def fresh_uids(project: Project, key: str) -> str:
    """Give the fingerprint of `external_uids/<name>` for a recipe that reads it.

    Raises:
        NotReady: it is not there, or not what a run would write now.
    """
    stored = project.lake.stored(key)
    if stored is None or not stored.is_from(_uids_provenance(project, key.split("/")[1])):
        raise NotReady(f"{key} is {'not there yet' if stored is None else 'out of date'}. Remedy: materialize it")
    return stored.fingerprint


def _uids_provenance(project: Project, name: str) -> Provenance:
    settings = project.settings.external_uids[name]
    inputs = {"files": _fingerprint(project, "external_uids", name)}
    parameters = {"uid": settings.uid, "minimum_coverage": settings.minimum_coverage}
    return Provenance(f"external_uids/{name}", None, CODE_VERSION, parameters, inputs)


def _fingerprint(project: Project, field: str, name: str) -> str:
    try:
        return project.files_fingerprint(field, name)
    except ExternalError as error:
        raise NotReady(f"{field}.{name}: {error}") from error
