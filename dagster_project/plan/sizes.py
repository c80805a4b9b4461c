"""Rows and bytes of shards: counted where `raw_pool` has read a shard, else estimated from the size of its files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from assets.base.context import Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import Graph

TEXT_BYTES = 40
"""Bytes of a text in a compressed file: an assumption, until there is a file."""


@dataclass(frozen=True)
class PoolSize:
    """The rows and bytes of a pool.

    Attributes:
        bytes: of each shard's files.
        rows: of the shards that `raw_pool` has read, as they were then.
        rows_per_byte: of those, or of a shard that was read for the estimate; None where neither is known.
    """

    bytes: Mapping[str, int]
    rows: Mapping[str, int]
    rows_per_byte: float | None = None

    def rows_of(self, shards: Iterable[str]) -> int | None:
        """Return the rows of shards, counted or estimated; None where there is nothing to estimate from."""
        total = 0.0
        for shard in shards:
            if shard in self.rows:
                total += self.rows[shard]
            elif self.rows_per_byte is None:
                return None
            else:
                total += self.bytes[shard] * self.rows_per_byte
        return round(total)

    @property
    def total(self) -> int | None:
        """The rows of the pool."""
        return self.rows_of(self.bytes)

    def with_reported(self, rows: Mapping[str, int]) -> "PoolSize":
        """Return the size with an estimate from rows that were reported of shards, where none are counted."""
        known = [shard for shard in rows if shard in self.bytes]
        return self.with_sample(sum(rows[shard] for shard in known), known)

    @property
    def is_counted(self) -> bool:
        """Whether no shard's rows are estimated."""
        return self.rows.keys() >= self.bytes.keys()

    def with_sample(self, rows: int, of: Iterable[str]) -> "PoolSize":
        """Return the size with an estimate from shards that were read; counted rows are the better estimate."""
        read = sum(self.bytes[shard] for shard in of)
        return self if self.rows_per_byte is not None or not read else replace(self, rows_per_byte=rows / read)


def pool_size(snapshot: Snapshot) -> PoolSize:
    """Return the size of a project's pool, from the listings of pool and lake."""
    files = snapshot.context.pool.shard_files()
    sizes = {shard: sum(file.size for file in files[shard]) for shard in sorted(snapshot.listing)}
    stored = {shard: snapshot.context.lake.stored("raw_pool", shard) for shard in sizes}
    rows = {shard: record.rows for shard, record in stored.items() if record is not None}
    read = sum(sizes[shard] for shard in rows)
    return PoolSize(sizes, rows, sum(rows.values()) / read if read else None)


@dataclass(frozen=True)
class FileSize:
    """The files of an asset.

    Attributes:
        total: bytes of all of them.
        per_row: bytes for each row.
        by_shard: bytes of each shard's file.
    """

    total: int
    per_row: float
    by_shard: Mapping[str, int]


def file_sizes(snapshot: Snapshot, graph: Graph, dimensions: Mapping[str, int]) -> dict[str, FileSize]:
    """Return the size of every asset's files; bytes per row follow from the schema where there are none.

    Args:
        snapshot: the project's inputs.
        graph: its assets.
        dimensions: d of each encoder, where it is known.
    """
    return {node.key: _file_size(snapshot, node, dimensions) for node in graph.nodes}


def _file_size(
    snapshot: Snapshot, node: PartitionedAsset | UnpartitionedAsset, dimensions: Mapping[str, int]
) -> FileSize:
    lake = snapshot.context.lake
    folder = lake.path(node.key).rpartition("/")[0] if not node.partitioned else f"{lake.root}/{node.key}"
    listed = {entry.location: entry.size for entry in lake.listing(folder)}
    sizes, rows = {}, 0
    for shard in list(snapshot.listing) if node.partitioned else [None]:
        stored = lake.stored(node.key, shard)
        path = lake.path(node.key, shard)
        if stored is not None and path in listed:
            sizes[shard or ""] = listed[path]
            rows += stored.rows
    total = sum(sizes.values())
    if rows:
        return FileSize(total, total / rows, sizes)
    d = dimensions.get(node.declared.names.get("encoder", ""), 0)
    return FileSize(0, sum(_width(field.type, d) for field in node.declared.schema), {})


def _width(kind: pa.DataType, dimensions: int) -> float:
    """Return the bytes of a value."""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return dimensions * _width(kind.value_type, dimensions)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return TEXT_BYTES
    return kind.bit_width / 8 if pa.types.is_primitive(kind) else TEXT_BYTES
