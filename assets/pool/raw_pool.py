"""`raw_pool`: one row a sample of the shard, and the rejected samples with the reason.

The shard's images are decoded here, once, to know which samples are fit; every later asset is row-aligned with
what this one keeps.
"""

from collections import Counter

from assets.base.partitioned import NotReady, Result, ShardAsset, each, sharded_asset
from assets.project import Project, json_settings
from resources.lake.files import Provenance, sample_digest
from resources.pools.base import RAW_POOL_SCHEMA

CODE_VERSION = "1"
KEY = "raw_pool"


def raw_pool(project: Project) -> ShardAsset:
    """Make the asset `raw_pool`."""
    parameters = {
        "pool": json_settings(project.settings.pool),
        "precomputed": {
            name: encoder.precomputed if isinstance(encoder.precomputed, str) else json_settings(encoder.precomputed)
            for name, encoder in project.settings.encoders.items()
            if encoder.precomputed is not None
        },
    }

    def provenance(shard: str) -> Provenance:
        source = project.listing().get(shard)
        if source is None:
            raise NotReady(
                f"{project.settings.pool.path}: no shard {shard} in the pool. Remedy: put it back, or remove its "
                "partition"
            )
        return Provenance(KEY, shard, CODE_VERSION, parameters, {"source": source})

    def read(shard: str) -> Result:
        found = project.pool.read_shard(shard)
        project.on_progress(KEY, shard, found.rows.num_rows)
        reasons = Counter(found.rejects["reason"].to_pylist())
        return Result(
            table=found.rows,
            content=sample_digest(found.rows),
            summary={
                "samples_seen": found.rows.num_rows + found.rejects.num_rows,
                "rejected": found.rejects.num_rows,
                **{f"rejected/{reason}": count for reason, count in sorted(reasons.items())},
                **({"notes": "\n".join(found.notes)} if found.notes else {}),
            },
            beside={"rejects": found.rejects},
        )

    return sharded_asset(
        project,
        key=KEY,
        deps=(),
        provenance=provenance,
        compute=each(read),
        code_version=CODE_VERSION,
        group="pool",
        kinds={"parquet"},
        description="Every usable sample of a shard: identity, caption, sizes, digest, and where its bytes lie. "
        "Samples that can't be used are in `rejects`, each with its reason; rows + rejects = samples seen.",
        columns=RAW_POOL_SCHEMA,
        pool="cpu",
    )
