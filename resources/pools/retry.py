"""Samples whose download failed, as a list that img2dataset downloads again.

Only img2dataset's Parquet files beside the tars (format `webdataset`) list such samples.
"""

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resources.pools.base import PoolError
from resources.pools.samples import match_keys
from resources.settings import PoolSettings
from resources.storage import files

RETRY_SCHEMA = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("uid", pa.string()),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
    ]
)
"""Columns of the list: img2dataset's `url_col` and `caption_col`; uid and key for `save_additional_columns`."""


def failed_downloads(
    settings: PoolSettings, shard: str, keys: Collection[str], tars: Sequence[str] | None = None
) -> pa.Table:
    """Read url, caption and uid of rejected samples from the Parquet file beside each of a shard's tars.

    Args:
        settings: the pool.
        shard: its shard.
        keys: keys of the rejected samples.
        tars: names of the shard's tars, without `.tar`; by default the shard's own.

    Returns:
        A table of `RETRY_SCHEMA`, in the order of the files; samples without a url are left out.

    Raises:
        PoolError: the pool has another format, or a file cannot be read.
    """
    if settings.format != "webdataset":
        raise PoolError(
            f"pool.format is {settings.format}: only the Parquet files of a webdataset pool list failed downloads. "
            "Remedy: download the pool's source again"
        )
    found = []
    for tar in tars or [shard]:
        rows = _rows(f"{settings.path.rstrip('/')}/{tar}.parquet")
        wanted = set(match_keys(keys, dict.fromkeys(str(row["key"]) for row in rows)).values())
        found += [_listed(shard, row) for row in rows if str(row["key"]) in wanted and row["url"]]
    return pa.Table.from_pylist(found, RETRY_SCHEMA)


def _rows(url: str) -> list[dict[str, Any]]:
    try:
        with files.open_binary(url) as file:
            parquet = pq.ParquetFile(file)
            names = [name for name in ("key", "url", "caption", "uid") if name in parquet.schema_arrow.names]
            rows: list[dict[str, Any]] = parquet.read(names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PoolError(f"{url}: the parquet cannot be read ({error}). Remedy: put it back") from error
    if "url" not in names or "key" not in names:
        raise PoolError(f"{url}: a retry needs the columns key and url; it has {', '.join(names) or 'neither'}")
    return rows


def _listed(shard: str, row: dict[str, Any]) -> dict[str, str | None]:
    text = {name: None if row.get(name) is None else str(row[name]) for name in ("url", "caption", "uid", "key")}
    return {**text, "shard": shard}
