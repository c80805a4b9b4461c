"""The Parquet file beside a tar of a webdataset pool: descriptions by key, and failed downloads, as by img2dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resources.pools.errors import PoolError
from resources.pools.samples import METADATA, column_values, encodable, is_null, match_keys, shown
from resources.storage import files


class Sidecar:
    """The Parquet file beside a tar.

    Args:
        url: its place, for messages.
        rows: its rows by key.
        notes: remarks about the file, one sentence each.
    """

    def __init__(self, url: str, rows: Mapping[str, dict[str, Any]] | None = None, notes: Sequence[str] = ()) -> None:
        self.url = url
        self.rows = rows or {}
        self.notes = list(notes)
        self.has_uids = any(not is_null(row.get("uid")) for row in self.rows.values())
        self.all_failed = bool(self.rows) and all(map(failed, self.rows.values()))
        self._matched: dict[str, str] = {}

    def match(self, keys: Sequence[str]) -> None:
        """Match the file's keys to those of the tar's samples.

        Raises:
            PoolError: fewer than half of the tar's keys are in the file.
        """
        if not self.rows or not keys:
            return
        self._matched = match_keys(keys, self.rows)
        if 2 * len(self._matched) < len(set(keys)):
            ours = next(key for key in keys if key not in self._matched)
            theirs = next((key for key in self.rows if key not in self._matched.values()), next(iter(self.rows)))
            raise PoolError(
                f"{self.url}: only {len(self._matched)} of the tar's {len(set(keys))} keys are in this parquet. The "
                f"tar has {encodable(ours)[0]!r}, for example, and the parquet has {encodable(theirs)[0]!r}. Remedy: "
                "write the tar's keys into its column `key`, or remove it if the tar alone describes its samples."
            )
        other = [(ours, theirs) for ours, theirs in self._matched.items() if ours != theirs]
        if other:
            ours, theirs = other[0]
            self.notes.append(
                f"{len(other)} keys are spelt differently in tar and parquet, such as {encodable(ours)[0]} and {theirs}"
            )

    def row(self, key: str) -> Mapping[str, Any] | None:
        """Return the row of a sample of the tar."""
        matched = self._matched.get(key)
        return None if matched is None else self.rows[matched]

    def unmatched(self) -> dict[str, dict[str, Any]]:
        """Return the rows that have no sample in the tar."""
        matched = set(self._matched.values())
        return {key: row for key, row in self.rows.items() if key not in matched}


def read_sidecar(url: str) -> Sidecar:
    """Read the Parquet file beside a tar.

    Of rows with one key the first successful one is used, else the first. Rows without a key are left out.

    Raises:
        PoolError: it cannot be read, or has no key column.
    """
    wanted = ["key", "caption", "status", "error_message", *METADATA]
    remedy = "Write it again, or remove it: the tar is enough."
    try:
        with files.open_binary(url) as file:
            parquet = pq.ParquetFile(file)
            names = set(parquet.schema_arrow.names)
            table = parquet.read([name for name in wanted if name in names])
    except (pa.ArrowException, OSError) as error:
        raise PoolError(f"{url}: the parquet cannot be read ({error}). {remedy}") from error
    if "key" not in names:
        raise PoolError(f"{url}: the parquet has no column `key`. {remedy}")
    rows: dict[str, dict[str, Any]] = {}
    without_key, repeated = 0, []
    columns = {name: column_values(table[name]) for name in table.column_names}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        if is_null(row["key"]):
            without_key += 1
            continue
        key = row["key"].decode(errors="surrogateescape") if isinstance(row["key"], bytes) else str(row["key"])
        first = rows.setdefault(key, row)
        if first is not row:
            repeated.append(key)
            if failed(first) and not failed(row):
                rows[key] = row
    file_name = url.rpartition("/")[2]
    notes = []
    if without_key:
        notes.append(f"ignored rows of {file_name} without a key: {without_key}")
    if repeated:
        notes.append(f"keys that {file_name} has more than once, of which one row is used: {shown(repeated)}")
    return Sidecar(url, rows, notes)


def failed(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the Parquet file is of a download that failed."""
    return not is_null(row.get("status")) and row["status"] != "success"
