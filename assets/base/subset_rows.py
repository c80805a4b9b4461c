"""The rows of a subset by shard, for assets that cover only those: `of: subset/<recipe>`.

Here: the input that makes such a file stale, and the rows' uids. Not here: the computation.
"""

from collections.abc import Mapping
from functools import cached_property

import duckdb
import pyarrow as pa

from assets.base.asset import FileAsset, Step
from assets.base.context import Snapshot
from assets.base.freshness import newest_version
from assets.base.results import NotReady
from core.hashing import digest
from resources.lake.files import Lake
from resources.lake.versions import Version, Versions


def subset_rows_input(asset: FileAsset, snapshot: Snapshot, of: str, shard: str) -> Mapping[str, str]:
    """Return a digest of a shard's rows in a subset, under the name of the input that it is.

    A version that selects the same rows of a shard has the same digest.

    Args:
        asset: the asset that covers them.
        snapshot: the project's inputs.
        of: the subset's key, `subset/<recipe>`.
        shard: the shard.

    Raises:
        NotReady: the subset is missing, out of date, or was selected without this shard.
    """
    version = newest_version(snapshot, asset.assets[of])
    if shard not in version.lineage["shards"]:
        raise NotReady(f"{of} was selected without shard {shard}. Remedy: materialize {of} again")

    def read() -> dict[str, str]:
        with duckdb.connect() as con:
            rows = con.execute(
                "SELECT shard, count(*), bit_xor(md5_number(concat(f0, '/', f1))) FROM read_parquet(?) GROUP BY 1",
                [Versions(snapshot.context.lake, version.recipe).verified_path(version)],
            ).fetchall()
        return {name: digest([count, str(mixed)]) for name, count, mixed in rows}

    digests = snapshot.memoized(f"{of} {version.lineage['fingerprint']} rows", read)
    return {f"rows of {of}": digests.get(shard, digest([0, ""]))}


class SubsetRows:
    """The rows of a subset's version.

    Args:
        lake: the lake.
        version: the version.
    """

    def __init__(self, lake: Lake, version: Version) -> None:
        self.lake, self.version = lake, version

    @classmethod
    def newest(cls, step: Step, of: str | None) -> "SubsetRows | None":
        """Return the rows of a subset's newest version, given its key; None for the whole pool.

        Raises:
            NotReady: there is none, or it is out of date.
        """
        if of is None:
            return None
        return cls(step.context.lake, newest_version(step.snapshot, step.asset.assets[of]))

    @cached_property
    def _manifest(self) -> str:
        return Versions(self.lake, self.version.recipe).verified_path(self.version)

    def uids(self, shard: str) -> pa.Table:
        """Return f0 and f1 of a shard's rows.

        Raises:
            LakeError: the manifest is damaged.
        """
        with duckdb.connect() as con:
            return con.sql(
                "SELECT f0, f1 FROM read_parquet($path) WHERE shard = $shard",
                params={"path": self._manifest, "shard": shard},
            ).to_arrow_table()
