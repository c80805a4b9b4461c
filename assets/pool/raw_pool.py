"""`raw_pool`: one row per sample of a shard, and the rejected samples with the reason.

Images are decoded here once, to find the usable samples. Every later asset has its rows in the order of this one.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from assets.base.asset import Declared, FileAsset
from assets.base.checks import Check, Finding, Tables, not_compared
from assets.base.context import Context, Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Result
from assets.base.settings import json_settings
from assets.base.shard import Shard
from assets.base.standard_checks import uid_records
from core.uids import format_uids
from resources.lake.files import sample_digest
from resources.pools.base import RAW_POOL_SCHEMA, ShardRead


def _rows_and_rejects(tables: Tables) -> Finding:
    rows = tables.read("raw_pool", ["source_row"])["source_row"].to_numpy()
    rejects = tables.read("rejects", ["source_row"])["source_row"].to_numpy()
    seen = np.sort(np.concatenate([rows, rejects]))
    figures = {"rows": len(rows), "rejects": len(rejects), "samples_seen": int(seen[-1]) + 1 if len(seen) else 0}
    wrong = np.flatnonzero(seen != np.arange(len(seen)))
    if not len(wrong):
        return Finding(True, figures)
    first, place = int(seen[wrong[0]]), int(wrong[0])
    why = f"sample {first} occurs twice" if first < place else f"sample {place} is neither a row nor a reject"
    return Finding(False, figures, f"rows + rejects = samples seen does not hold: {why}")


def _uids_unique(tables: Tables) -> Finding:
    table = tables.read("raw_pool", ["uid", "f0", "f1"])
    uids = uid_records(table)
    if not len(uids):
        return not_compared("there are no rows")
    repeated = len(uids) - len(np.unique(uids))
    if repeated:
        return Finding(False, {"repeated": repeated}, f"{repeated} rows repeat the uid of another row in the shard")
    spelled = format_uids(uids["f0"], uids["f1"])
    for row, (uid, text) in enumerate(zip(table["uid"].to_pylist(), spelled, strict=True)):
        if uid != text:
            return Finding(False, {"repeated": 0}, f"row {row}: uid {uid} is not f0, f1 ({text})")
    return Finding(True, {"repeated": 0})


ROWS_AND_REJECTS = Check(
    "rows_and_rejects",
    "Rows + rejects = samples seen: every position in the source is a row or a reject, once.",
    _rows_and_rejects,
)
UIDS_UNIQUE = Check("uids_unique", "Each uid occurs once in the shard, and f0, f1 spell the uid.", _uids_unique)


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = context.settings
    return {
        # how new tars are grouped changes no shard
        "pool": {k: v for k, v in json_settings(settings.pool).items() if k != "tars_per_shard"},
        "precomputed": {
            name: encoder.precomputed if isinstance(encoder.precomputed, str) else json_settings(encoder.precomputed)
            for name, encoder in settings.encoders.items()
            if encoder.precomputed is not None
        },
    }


def _source(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    fingerprint = snapshot.listing.get(shard)
    if fingerprint is None:
        path = snapshot.context.settings.pool.path
        raise NotReady(f"{path}: no shard {shard} in the pool. Remedy: put it back, or remove its partition")
    return {"source": fingerprint}


def _content(found: ShardRead) -> str:
    """Return the fingerprint of a shard's rows, and of the pictures that encoders see of them.

    Pictures that are not RGB are converted before they are resized, which code version 1 did not do. Only shards that
    have such pictures get another fingerprint, so that the others stay up to date.
    """
    digest = sample_digest(found.rows)
    if not found.converted:
        return digest
    return hashlib.sha256(f"{digest} to RGB first: {found.converted}".encode()).hexdigest()


@partitioned(
    key="raw_pool",
    deps=[],
    columns=RAW_POOL_SCHEMA,
    checks=[lambda _: ROWS_AND_REJECTS, lambda _: UIDS_UNIQUE],
    code_version="2",
    group_name="pool",
    kinds={"parquet"},
    beside=["rejects"],
    pool="cpu",
    description="Every usable sample of a shard: identity, caption, sizes, SHA-256, and where its bytes are. Samples "
    "that can't be used are in `rejects`, each with its reason; rows + rejects = samples seen.",
    parameters=_parameters,
    inputs=_source,
    every_row=False,
    reads_pool=True,
)
def raw_pool(shard: Shard) -> Result:
    """Read one shard and check every sample in it."""
    found = shard.step.context.pool.read_shard(shard.name)
    shard.step.progress(found.rows.num_rows, shard.name)
    reasons = Counter(found.rejects["reason"].to_pylist())
    return Result(
        table=found.rows,
        content=_content(found),
        summary={
            "samples_seen": found.rows.num_rows + found.rejects.num_rows,
            "rejected": found.rejects.num_rows,
            **({"converted_to_rgb": len(found.converted)} if found.converted else {}),
            **{f"rejected/{reason}": count for reason, count in sorted(reasons.items())},
            **({"notes": "\n".join(found.notes)} if found.notes else {}),
        },
        beside={"rejects": found.rejects},
    )
