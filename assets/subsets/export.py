"""`export/<recipe>`: new webdataset shards that hold only the samples of a subset's current version.

It copies data, so `clip-select run` skips it: materialize it when a training run needs it. Each source shard gives one
tar, `<lake>/export/<recipe>/<version>/<shard>.tar`, and a Parquet file of keys and uids beside it, so that the folder
is itself a pool. The asset's own file lists the written samples.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from assets.base.asset import Dep, FileAsset, Step
from assets.base.context import Context, Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Outcome, Result
from core.uids import UID_DTYPE
from resources.lake.versions import Version, Versions
from resources.pools.base import TarPool, place_in_tar
from resources.storage import files, tars
from resources.storage.tar_samples import members_by_key
from resources.storage.tar_writer import copies, copy_samples, new_tar

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("copy", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("url", pa.string()),
    ]
)

_COPY = ["key", "source_key", "copy"]


def _tar(context: Context, recipe: str, version: str, shard: str) -> str:
    return f"{context.lake.root}/export/{recipe}/{version}/{shard}.tar"


def _current(snapshot: Snapshot, recipe: str) -> Version:
    def read() -> Version:
        found = Versions(snapshot.context.lake, recipe).current()
        if found is None:
            raise NotReady(f"subset/{recipe} has no version yet. Remedy: materialize it first")
        return found

    return snapshot.memoized(f"export/{recipe} version", read)


def _inputs(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    lake, recipe = snapshot.context.lake, asset.declared.names["recipe"]
    version = _current(snapshot, recipe)
    if not asset.assets["raw_pool"].is_fresh(snapshot, shard):
        raise NotReady("raw_pool is out of date. Remedy: materialize it")
    stored = lake.stored("raw_pool", shard)
    selected_from = version.lineage["shards"].get(shard, {}).get("raw_pool")
    if stored is None or stored.fingerprint != selected_from:
        raise NotReady(
            f"subset/{recipe} {version.name} was not selected from shard {shard} as it is now. Remedy: "
            f"materialize subset/{recipe} first"
        )
    written = lake.stored(asset.key, shard)
    if written is not None and written.rows and not lake.exists(_tar(snapshot.context, recipe, version.name, shard)):
        lake.remove(asset.key, shard)  # a list of a tar that was removed
    return {
        "raw_pool": stored.fingerprint,
        f"subset/{recipe}": version.lineage["fingerprint"],
        "source": snapshot.listing[shard],
    }


@partitioned(
    key="export/{recipe}",
    deps=[Dep("raw_pool", recorded=False), Dep("subset/{recipe}", recorded=False)],
    columns=SCHEMA,
    checks=[],
    code_version="1",
    group_name="exports",
    kinds={"webdataset", "parquet"},
    pool="cpu",
    description="Webdataset shards that hold only the samples of `subset/{recipe}`'s current version, members byte for "
    "byte as in the pool. Copies data: materialize it when a training run needs it.",
    parameters=lambda context, asset: {"version": Versions(context.lake, asset.names["recipe"]).newest()},
    inputs=_inputs,
    streams=True,
    spread=False,
    every_row=False,
)
def export(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Write the tars of shards."""
    recipe = step.names["recipe"]
    version = _current(step.snapshot, recipe)
    selected = _selected(step.context, version, shards)
    for shard in shards:
        try:
            rows = selected.filter(pl.col("shard") == shard)
            index = _write(step.context, shard, rows, _tar(step.context, recipe, version.name, shard))
        except Exception as error:  # noqa: BLE001 - stays with its shard
            yield shard, error
            continue
        step.progress(index.num_rows, shard)
        yield shard, Result(index, {"version": version.name}, beside={f"export/{recipe}/{version.name}": index})


def _selected(context: Context, version: Version, shards: Sequence[str]) -> pl.DataFrame:
    """Read the version's rows of some shards (shard, f0, f1), and how often its `.npy` lists each (times)."""
    versions = Versions(context.lake, version.recipe)
    rows = pl.read_parquet(versions.verified_path(version), columns=["shard", "f0", "f1"])
    rows = rows.filter(pl.col("shard").is_in(shards))
    uids = np.load(versions.verified_path(version, "subset.npy"), allow_pickle=False)
    wanted = np.empty(len(rows), UID_DTYPE)
    wanted["f0"], wanted["f1"] = rows["f0"], rows["f1"]
    times = np.searchsorted(uids, wanted, side="right") - np.searchsorted(uids, wanted, side="left")
    return rows.with_columns(times=pl.Series(times, dtype=pl.Int64))


def _write(context: Context, shard: str, selected: pl.DataFrame, tar: str) -> pa.Table:
    """Write a shard's tar, in the order of the source, unless nothing of the shard is selected; return its list."""
    read = context.lake.read("raw_pool", shard, ["f0", "f1", "key", "uid", "caption", "url", "image_offset"])
    rows = pl.DataFrame(read).join(selected.drop("shard"), on=["f0", "f1"], how="inner", maintain_order="left")
    wanted = copies(rows.select("key", "times").iter_rows())
    if not wanted:
        return SCHEMA.empty_table()
    assert isinstance(context.pool, TarPool)
    numbers = [place_in_tar(offset)[0] for offset in rows["image_offset"]]  # of each row's tar in the shard
    with context.lake.replacing(tar) as path, new_tar(path) as written:
        for number, url in enumerate(context.pool.tars(shard)):
            if some := [copy for copy in wanted if numbers[copy.row] == number]:
                with files.mapped(url) as view:
                    copy_samples(written, view, members_by_key(tars.walk(view, url)), some)
    listed = pl.DataFrame([(c.key, c.source_key, c.copy, c.row) for c in wanted], [*_COPY, "row"], orient="row")
    described = rows.with_row_index("row").select("uid", "caption", "url", pl.col("row").cast(pl.Int64))
    listed = listed.join(described, on="row", maintain_order="left")
    return listed.select(SCHEMA.names).to_arrow().cast(SCHEMA)
