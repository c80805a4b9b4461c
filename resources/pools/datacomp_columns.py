"""The columns of a DataComp shard's metadata, as `raw_pool` has them.

Names and types vary between DataComp, dataset2metadata and clip-retrieval. Here: reading them from Parquet. Not here:
which rows are usable (`resources.pools.datacomp`).
"""

import contextlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from resources.pools import base as pools
from resources.pools.base import PoolError
from resources.pools.samples import column_values, encodable, is_null, normal_uid, pixels_or_none, score_or_none
from resources.storage import files

_COLUMNS = {  # of raw_pool: names in the file, of which the first that exists is used
    "uid": ("uid",),
    "key": ("key",),
    "caption": ("text", "caption"),
    "url": ("url",),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "sha256": ("sha256",),
    "clip_b32_similarity_score": ("clip_b32_similarity_score", "oai-clip-vit-b32-score"),
    "clip_l14_similarity_score": ("clip_l14_similarity_score", "oai-clip-vit-l14-score"),
    "image_path": ("image_path",),
}


def read_columns(url: str) -> tuple[dict[str, pa.Array], dict[str, str | None], list[str]]:
    """Read the columns of `raw_pool` from a shard's metadata.

    Args:
        url: the Parquet file.

    Returns:
        Each column, with nulls where the file lacks it; its name in the file, None where it lacks it; and notes.

    Raises:
        PoolError: the file can't be read, or has no captions.
    """
    try:
        with files.open_binary(url) as file:
            parquet = pq.ParquetFile(file)
            there = set(parquet.schema_arrow.names)
            sources = {
                column: next((name for name in names if name in there), None) for column, names in _COLUMNS.items()
            }
            table = parquet.read([name for name in sources.values() if name is not None])
    except (pa.ArrowException, OSError) as error:
        raise PoolError(f"{url}: the parquet cannot be read ({error}). Download or write it again.") from error
    if sources["caption"] is None:
        raise PoolError(f"{url}: there is no column `text` or `caption`. Add the captions.")
    numbers = {"width": pa.int32(), "height": pa.int32()}
    columns = {}
    notes: list[str] = []
    for column, source in sources.items():
        kind = numbers.get(column, pa.float32() if "score" in column else pa.string())
        if source is None:
            columns[column] = pa.nulls(table.num_rows, kind)
            continue
        found = flat(table[source])
        if column == "uid":
            columns[column] = _normal_uids(found)
            continue
        columns[column], lost = _cast(found, kind, column, f"{url}: the column {source}")
        notes += [f"{lost} values of column {source} are not usable as {kind} and are null"] if lost else []
        if pa.types.is_floating(kind):  # DuckDB would rank a NaN first
            finite = pc.is_finite(columns[column])
            columns[column] = pc.if_else(finite, columns[column], pa.scalar(None, kind))
    return columns, sources, notes


def _cast(found: pa.Array, kind: pa.DataType, column: str, where: str) -> tuple[pa.Array, int]:
    """Return a column as `kind`, and how many of its values became null because they cannot be.

    Raises:
        PoolError: it is the caption, and not text.
    """
    if found.type == kind:
        return found, 0
    try:
        if pa.types.is_string(kind) or pa.types.is_integer(found.type) or pa.types.is_dictionary(found.type):
            return found.cast(kind), 0
    except pa.ArrowException as error:
        if column == "caption":
            raise PoolError(f"{where} is {found.type} and cannot be read as {kind} ({error}). Correct it.") from error
        if pa.types.is_string(kind):
            return pa.nulls(len(found), kind), len(found) - found.null_count
    read = pixels_or_none if pa.types.is_integer(kind) else score_or_none
    values = column_values(found)
    numbers = pa.array([read(value) for value in values], kind)
    return numbers, numbers.null_count - sum(map(is_null, values))


def _normal_uids(column: pa.Array) -> pa.Array:
    """Return uids as 32 lower-case hexadecimal digits; others stay, with their type unless they are text."""
    if pa.types.is_string(column.type):
        text = column
    elif pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        text = column.cast(pa.string())
    else:
        text = None
    if text is not None:
        with contextlib.suppress(pa.ArrowInvalid):  # no UTF-8
            lower = pc.utf8_lower(text)
            if pc.all(pc.match_substring_regex(lower, f"^{pools.UID.pattern}$"), min_count=0).as_py():
                return lower
    uids = [None if is_null(value) else normal_uid(value) or _unusable(value) for value in column_values(column)]
    return pa.array(uids, pa.string())


def _unusable(value: object) -> str:
    """Return a value that is not a uid as text that cannot be taken for one."""
    return encodable(value)[0] if isinstance(value, str) else f"{value!r} ({type(value).__name__})"


def flat(column: Any) -> pa.Array:
    """Return a column as one array."""
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array(column)
