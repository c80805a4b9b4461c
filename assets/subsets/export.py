"""`export/<recipe>`: new webdataset shards that hold only the samples of a subset's current version.

Off the default path, because it copies data: `clip-select run` leaves it alone, and somebody materializes it when
a training run is due. Each source shard gives one tar, `<lake>/export/<recipe>/<version>/<shard>.tar`, and beside it
a parquet with key and uid, so that the folder is itself a pool. The asset's own file lists what was written.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, each, sharded_asset
from assets.project import Project
from core.uids import UID_DTYPE
from resources.lake.files import Provenance
from resources.lake.versions import Version, Versions
from resources.pools.base import TarPool
from resources.storage import files, tars
from resources.storage.tar_samples import members_by_key
from resources.storage.tar_writer import copies, write_tar

CODE_VERSION = "1"
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


def export(project: Project, recipe: str, pool: ShardAsset) -> ShardAsset:
    """Make the asset `export/<recipe>`.

    Args:
        project: the project; its pool is of tars.
        recipe: the recipe's name.
        pool: the asset `raw_pool`.
    """
    key = f"export/{recipe}"
    versions = Versions(project.lake, recipe)
    newest: list[Version] = []

    def current() -> Version:
        names = versions.names()
        if not names:
            raise NotReady(f"subset/{recipe} has no version yet. Remedy: materialize it first")
        if not newest or newest[0].name != names[-1]:
            newest[:] = [versions.read(names[-1])]
        return newest[0]

    def tar(version: Version, shard: str) -> str:
        return f"{project.lake.root}/{key}/{version.name}/{shard}.tar"

    def provenance(shard: str) -> Provenance:
        version = current()
        if not pool.is_fresh(project, shard):
            raise NotReady("raw_pool is out of date. Remedy: materialize it")
        stored = project.lake.stored("raw_pool", shard)
        chosen_from = version.lineage["shards"].get(shard, {}).get("raw_pool")
        if stored is None or stored.fingerprint != chosen_from:
            raise NotReady(
                f"subset/{recipe} {version.name} was not chosen from shard {shard} as it is now. Remedy: "
                f"materialize subset/{recipe} first"
            )
        written = project.lake.stored(key, shard)
        if written is not None and written.rows and not project.lake.fs.exists(tar(version, shard)):
            project.lake.remove(key, shard)  # a list of a tar that somebody removed
        inputs = {
            "raw_pool": stored.fingerprint,
            f"subset/{recipe}": version.lineage["fingerprint"],
            "source": project.listing()[shard],
        }
        return Provenance(key, shard, CODE_VERSION, {"version": version.name}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        version = current()
        chosen = _chosen(project, version, shards)

        def write(shard: str) -> Result:
            index = _write(project, shard, chosen.filter(pl.col("shard") == shard), tar(version, shard))
            project.on_progress(key, shard, index.num_rows)
            return Result(index, {"version": version.name}, beside={f"{key}/{version.name}": index})

        yield from each(write)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool", f"subset/{recipe}"),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="exports",
        kinds={"webdataset", "parquet"},
        description=f"Webdataset shards that hold only the samples of `subset/{recipe}`'s current version, members "
        "byte for byte as in the pool. Copies data: materialize it when a training run is due.",
        columns=SCHEMA,
        pool="cpu",
    )


def _chosen(project: Project, version: Version, shards: Sequence[str]) -> pl.DataFrame:
    """Give the version's rows of some shards (shard, key, f0, f1), and how often its `.npy` names each (times)."""
    with project.lake.fs.open(version.manifest) as file:
        rows = pl.read_parquet(file, columns=["shard", "key", "f0", "f1"]).filter(pl.col("shard").is_in(shards))
    with project.lake.fs.open(version.uids) as file:
        uids = np.load(file, allow_pickle=False)
    wanted = np.empty(len(rows), UID_DTYPE)
    wanted["f0"], wanted["f1"] = rows["f0"], rows["f1"]
    times = np.searchsorted(uids, wanted, side="right") - np.searchsorted(uids, wanted, side="left")
    return rows.with_columns(times=pl.Series(times, dtype=pl.Int64))


def _write(project: Project, shard: str, chosen: pl.DataFrame, tar: str) -> pa.Table:
    """Write a shard's tar, in the order of the source, unless nothing of the shard is chosen; give its list."""
    pool = pl.DataFrame(project.lake.read("raw_pool", shard, ["key", "uid", "caption", "url"]))
    rows = pool.join(chosen.select("key", "times"), on="key", how="inner", maintain_order="left")
    wanted = copies(rows.select("key", "times").iter_rows())
    if not wanted:
        return SCHEMA.empty_table()
    assert isinstance(project.pool, TarPool)
    url = project.pool.tar_url(shard)
    with files.mapped(url) as view, project.lake.replacing(tar) as path:
        write_tar(path, view, members_by_key(tars.walk(view, url)), wanted)
    listed = pl.DataFrame([(c.key, c.source_key, c.copy) for c in wanted], ["key", "source_key", "copy"], orient="row")
    listed = listed.join(rows, left_on="source_key", right_on="key", maintain_order="left")
    return listed.select(SCHEMA.names).to_arrow().cast(SCHEMA)
