"""The lake: a folder of files, each complete or absent, each with its provenance.

Here: paths, atomic writing, provenance, and reading tables. Not here: columns of tables (the assets define them) and
queries (`resources.catalog.build`).

A file is written under a temporary name with a leading dot, flushed to disk and renamed. A reader therefore sees a
complete file or none. Temporary names are unique to the writer (`resources.lake.owners`). A killed run leaves at most
one temporary file; the next write in the same folder removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from core.hashing import digest
from resources.lake.owners import create_temporary, is_abandoned

METADATA_KEY = b"clip_data_selection"
ARROW_ASSETS = ("embeddings", "target_embeddings", "negatives")
LOOKED_UP = {"raw_pool": "f0"}
"""Column by which single rows of an asset are looked up; its files are not sorted by it."""
ROW_GROUP = 1 << 17
KNOWN_FILES = 60_000  # whose records the lake caches; some 4 kB each, so 250 MB at most
TEMPORARY_SUFFIX = ".tmp"


class LakeError(UserError):
    """A file of the lake is missing or can't be read; the message names it and the remedy."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a file. Two files with equal provenance hold the same rows.

    Attributes:
        asset: key of the asset, such as `neg_clip_loss/b32`.
        shard: name of the shard, or None for an asset that is not partitioned.
        code_version: version of the code that computes the asset.
        parameters: settings that the result depends on, JSON values only.
        inputs: fingerprint of everything read, by name.
    """

    asset: str
    shard: str | None
    code_version: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the provenance as JSON values."""
        return {
            "asset": self.asset,
            "shard": self.shard,
            "code_version": self.code_version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }

    def digest(self) -> str:
        """Return the SHA-256 of the provenance."""
        return digest(self.as_dict())


@dataclass(frozen=True)
class Stored:
    """The record of one file of the lake.

    Attributes:
        provenance: the file's provenance.
        fingerprint: identifies the content for assets that read it: the provenance's digest, or a digest of the
            content where the asset passed one (so that a source that was touched but not changed stops there).
        rows: number of rows.
        summary: statistics of the content, such as rejects by reason. The same inputs give the same summary.
    """

    provenance: Provenance
    fingerprint: str
    rows: int
    summary: dict[str, Any]

    def is_from(self, provenance: Provenance) -> bool:
        """Return whether a run with this provenance would write the same file."""
        return self.provenance.digest() == provenance.digest()


def sample_digest(table: pa.Table) -> str:
    """Return a SHA-256 of a table's values that does not depend on its chunks."""
    sha = hashlib.sha256(str(table.schema.remove_metadata()).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            writer.write_batch(batch)
    sha.update(sink.getvalue())
    return sha.hexdigest()


def vectors_to_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return `[n, d]` float16 vectors as an Arrow column of fixed-size lists, without a copy.

    Raises:
        ValueError: another dtype or shape.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise ValueError(f"vectors: expected float16 [n, d], got {vectors.dtype} {vectors.shape}")
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def column_to_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of fixed-size float16 lists as `[n, d]`; a memory-mapped column of one chunk is not copied."""
    chunks = [
        chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1) for chunk in column.chunks if len(chunk)
    ]
    if not chunks:
        return np.empty((0, column.type.list_size), dtype=np.float16)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def write_parquet(table: pa.Table, path: Path, *, looked_up: str | None = None) -> None:
    """Write a table in the layout of the lake's Parquet files.

    Args:
        table: its rows.
        path: local file.
        looked_up: column that gets Bloom filters: a search for a value (by DuckDB) then skips 99 of 100 row groups
            without it. They take up to 2 bytes per row.
    """
    distinct = max(1, min(table.num_rows, ROW_GROUP))
    filters = {looked_up: {"ndv": distinct, "fpp": 0.01}} if looked_up else None
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP, bloom_filter_options=filters)


class Lake:
    """A folder of files, local or on any fsspec file system.

    Args:
        root: path or URL of the folder; the first write creates it.
    """

    def __init__(self, root: str) -> None:
        if "://" in root:
            self.fs, self.root = fsspec.core.url_to_fs(root)
        else:  # fsspec would read "::" in a path as a chain of file systems, and write to another place
            self.fs, self.root = fsspec.filesystem("file"), os.path.abspath(root)
        self.is_local = "file" in _protocols(self.fs)
        self._known: dict[str, tuple[tuple[int, ...], Stored]] = {}

    def path(self, asset: str, shard: str | None = None) -> str:
        """Return the path of an asset's file."""
        suffix = ".arrow" if asset.split("/")[0] in ARROW_ASSETS else ".parquet"
        name = asset if shard is None else f"{asset}/{shard}"
        return f"{self.root}/{name}{suffix}"

    def local_root(self) -> Path:
        """Return the root as a local path.

        Raises:
            LakeError: the lake is on another file system.
        """
        if not self.is_local:
            raise LakeError(f"{self.root}: this needs a lake in a local folder. Remedy: a path as `lake`, not a URL")
        return Path(self.root)

    def shards(self, asset: str) -> list[str]:
        """List the shards for which an asset has a file, sorted."""
        folder = f"{self.root}/{asset}"
        if not self.fs.exists(folder):
            return []
        names = (Path(path).name for path in self.fs.ls(folder, detail=False, refresh=True))
        return sorted(Path(n).stem for n in names if not n.startswith(".") and "." in n)

    def stored(self, asset: str, shard: str | None = None) -> Stored | None:
        """Return the record of an asset's file, or None if there is no file. Records of unchanged files are cached.

        Raises:
            LakeError: the file was not written by this project.
        """
        path = self.path(asset, shard)
        if not self.is_local:
            return self._read_stored(path) if self.fs.exists(path) else None
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            self._known.pop(path, None)
            return None
        version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._known.get(path)
        if known is None or known[0] != version:
            if len(self._known) >= KNOWN_FILES:
                self._known.clear()
            known = self._known[path] = (version, self._read_stored(path))
        return known[1]

    def _read_stored(self, path: str) -> Stored:
        try:
            if path.endswith(".parquet"):
                with self.fs.open(path) as file:
                    parquet = pq.ParquetFile(file)
                    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
                record = json.loads(schema.metadata[METADATA_KEY])
            else:
                with self._open_arrow(path) as reader:
                    record = json.loads(reader.schema.metadata[METADATA_KEY])
                rows = record["rows"]
            return Stored(
                provenance=Provenance(**record["provenance"]),
                fingerprint=record["fingerprint"],
                rows=rows,
                summary=record["summary"],
            )
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise LakeError(
                f"{path}: not a file of this lake ({error}). Remedy: move it away; the asset is computed again."
            ) from error

    def read(self, asset: str, shard: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read an asset's file; Arrow files are memory-mapped where the lake is local.

        Raises:
            LakeError: there is no such file.
        """
        path = self.path(asset, shard)
        if not self.fs.exists(path):
            where = f" of shard {shard}" if shard else ""
            raise LakeError(f"{path}: {asset}{where} is not there yet. Remedy: materialize it first.")
        if path.endswith(".parquet"):
            with self.fs.open(path) as file:
                return pq.ParquetFile(file).read(columns=columns)
        with self._open_arrow(path) as reader:
            table = reader.read_all()
        return table.select(columns) if columns else table

    def write(
        self,
        table: pa.Table,
        provenance: Provenance,
        *,
        content: str | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> Stored:
        """Write an asset's file, completely or not at all.

        Args:
            table: its rows.
            provenance: its provenance, which also determines its path.
            content: a digest of the content, to be the fingerprint in place of the provenance's digest.
            summary: statistics of the content.

        Returns:
            The file's record.
        """
        stored = Stored(
            provenance=provenance,
            fingerprint=content or provenance.digest(),
            rows=table.num_rows,
            summary=dict(summary or {}),
        )
        record = {
            "provenance": provenance.as_dict(),
            "fingerprint": stored.fingerprint,
            "rows": stored.rows,
            "summary": stored.summary,
        }
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(record, sort_keys=True)})
        path = self.path(provenance.asset, provenance.shard)
        with self.replacing(path) as temporary:
            if path.endswith(".parquet"):
                write_parquet(table, temporary, looked_up=LOOKED_UP.get(provenance.asset))
            else:
                with pa.ipc.new_file(str(temporary), table.schema) as writer:
                    writer.write_table(table.combine_chunks())
        return stored

    def remove(self, asset: str, shard: str | None = None) -> bool:
        """Remove an asset's file, and return whether there was one."""
        path = self.path(asset, shard)
        if not self.fs.exists(path):
            return False
        self.fs.rm_file(path)
        return True

    @contextmanager
    def replacing(self, path: str) -> Iterator[Path]:
        """Yield a local temporary path whose file becomes `path` when the block ends without an error."""
        folder, name = path.rsplit("/", 1)
        if not self.is_local:
            self.fs.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="lake-") as local:
                yield Path(local) / name
                self.fs.put_file(f"{local}/{name}", path)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        _clear_strays(Path(folder))
        temporary = create_temporary(Path(folder), f".{name}.", TEMPORARY_SUFFIX)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _open_arrow(self, path: str) -> Iterator[pa.RecordBatchFileReader]:
        source = pa.memory_map(path) if self.is_local else pa.BufferReader(self.fs.cat_file(path))
        with source:
            yield pa.ipc.open_file(source)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _clear_strays(folder: Path) -> None:
    """Remove the temporary files of a folder whose writers were killed."""
    for stray in folder.glob(f".*{TEMPORARY_SUFFIX}*"):  # `.tmp`, and DuckDB's `.tmp.wal`
        written_by = stray.name.rpartition(TEMPORARY_SUFFIX)[0].rsplit(".", 1)[-1]
        if stray.is_file() and is_abandoned(stray, written_by):
            stray.unlink(missing_ok=True)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
