"""The lake: a folder of files, each complete or absent, each with its provenance.

Here: paths, atomic writing, provenance, and reading tables. Not here: columns of tables (the assets define them) and
queries (`resources.catalog.build`).

A file is written under a temporary name with a leading dot, flushed to disk and renamed. A reader therefore sees a
complete file or none. Temporary names are unique to the writer (`resources.lake.owners`). A killed run leaves at most
one temporary file; the next write in the same folder removes it.

Files have checksums, which are verified when they are read (`resources.lake.sealed`). A damaged file is set aside:
renamed to `.<name>.damaged`. It then counts as missing, so that a run computes it again, and nothing is lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from resources.lake.owners import create_temporary, is_abandoned
from resources.lake.records import Records
from resources.lake.sealed import METADATA_KEY, SEALED, Vectors, mapped, opened, read_arrow, read_parquet, read_record
from resources.lake.sealed import verify_columns as verify_parquet
from resources.lake.stored import Provenance as Provenance
from resources.lake.stored import Stored as Stored
from resources.lake.stored import as_record, from_record
from resources.storage.by_location import open_store
from resources.storage.checksums import ChecksumError, seal
from resources.storage.objects import credential_free
from resources.storage.stores import Entry, ReplacedError, cache_folder, state_folder

ARROW_ASSETS = ("embeddings", "target_embeddings", "negatives")
LOOKED_UP = {"raw_pool": "f0"}
"""Column by which single rows of an asset are looked up; its files are not sorted by it."""
ROW_GROUP = 1 << 17
RECORDS_AHEAD = 128  # remote files whose records are read together
READERS = 32
TEMPORARY_SUFFIX = ".tmp"
DAMAGED_SUFFIX = ".damaged"


class LakeError(UserError):
    """A file of the lake is missing or can't be read; the message names it and the remedy."""


class DamagedError(LakeError):
    """A file of the lake does not hold what was written."""


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
    """A folder of files, local or in an object store.

    Args:
        root: path or URL (`s3://`, `gs://`, `az://`) of the folder; the first write creates it.

    Attributes:
        root: the absolute path, or the URL.
        store: the storage.
        is_local: whether it is on local disks.
        damaged: paths of files that were found damaged and set aside, with the reason.

    Raises:
        StorageError: a URL of another kind.
    """

    def __init__(self, root: str) -> None:
        self.is_local = "://" not in root
        self.root = os.path.abspath(root) if self.is_local else credential_free(root)
        self.store = open_store(self.root)
        self.damaged: dict[str, str] = {}
        self._listed: dict[str, dict[str, Entry]] = {}
        self._cleared: set[str] = set()
        self._records = Records(cache_folder(self.root) / "records.sqlite")

    @property
    def scratch_folder(self) -> Path:
        """Local folder of copies of remote files; it can be deleted at any time."""
        return Path(self.root) if self.is_local else cache_folder(self.root)

    @property
    def home(self) -> Path:
        """Local folder of what belongs to the lake and stays on this machine, such as Dagster's records."""
        return Path(self.root) if self.is_local else state_folder(self.root)

    @property
    def catalog(self) -> Path:
        """Local path of the catalog."""
        return self.home / "catalog.duckdb"

    def refresh(self) -> None:
        """Begin anew: list the folders of a remote lake again, and look for killed writers' files again."""
        self._listed.clear()
        self._cleared.clear()

    def changed(self, path: str) -> float:
        """Return when a file was written, in seconds since 1970; 0 if there is none."""
        entry = self.store.stat(path)
        return 0.0 if entry is None else entry.modified

    def folder_changed(self, folder: str) -> float:
        """Return when a file was last written in a folder, in seconds since 1970; 0 without files."""
        if self.is_local:
            return os.stat(folder).st_mtime if os.path.isdir(folder) else 0.0
        return max((entry.modified for entry in self.listing(folder)), default=0.0)

    def listing(self, folder: str) -> Iterable[Entry]:
        """List the files of a folder, by location; those of a remote lake as they were at the last `refresh`."""
        return self.store.files(folder) if self.is_local else self._remote(folder).values()

    def _remote(self, folder: str) -> dict[str, Entry]:
        if folder not in self._listed:
            self._listed[folder] = {entry.location: entry for entry in self.store.files(folder)}
        return self._listed[folder]

    def exists(self, path: str) -> bool:
        """Check whether there is a file."""
        return self.store.stat(path) is not None

    def path(self, asset: str, shard: str | None = None) -> str:
        """Return the path of an asset's file."""
        suffix = ".arrow" if asset.split("/")[0] in ARROW_ASSETS else ".parquet"
        name = asset if shard is None else f"{asset}/{shard}"
        return f"{self.root}/{name}{suffix}"

    def shards(self, asset: str) -> list[str]:
        """List the shards for which an asset has a file, sorted."""
        folder = f"{self.root}/{asset}"
        self._listed.pop(folder, None)
        names = (entry.name for entry in self.listing(folder))
        return sorted(Path(n).stem for n in names if not n.startswith(".") and "." in n)

    def rows(self, asset: str, shards: Iterable[str] | None = None) -> dict[str, int]:
        """Return the number of rows of each shard's file, by default of all; shards without one are left out."""
        found = {shard: self.stored(asset, shard) for shard in (self.shards(asset) if shards is None else shards)}
        return {shard: stored.rows for shard, stored in found.items() if stored is not None}

    def _entry(self, path: str) -> Entry | None:
        """Return a file as it is now; of a remote lake, as its folder was listed last."""
        if self.is_local:
            return self.store.stat(path)
        return self._remote(path.rpartition("/")[0]).get(path)

    def local(self, path: str) -> Path:
        """Return a local path with a file's content; of a remote lake, a copy of the file as it was listed last.

        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            return self.store.local(path, None if self.is_local else self._entry(path))
        except (ReplacedError, FileNotFoundError):
            self._changed(path)
            return self.store.local(path)

    def _changed(self, path: str) -> None:
        """Look again at a remote file that this process wrote, moved or removed."""
        folder = path.rpartition("/")[0]
        if folder in self._listed:
            entry = self.store.stat(path)
            if entry is None:
                self._listed[folder].pop(path, None)
            else:
                self._listed[folder][path] = entry

    def stored(self, asset: str, shard: str | None = None) -> Stored | None:
        """Return the record of an asset's file, None if there is no file. Records of unchanged files are cached.

        A file whose record can't be read is set aside.

        Raises:
            DamagedError: it can't be set aside.
        """
        path = self.path(asset, shard)
        entry = self._entry(path)
        if entry is None:
            return None
        stored = self._records.get(entry)
        if stored is None:
            stored = self._stored_or_none(entry)
            if stored is not None and not self.is_local:
                self._read_ahead(entry)
        return stored

    def _stored_or_none(self, entry: Entry) -> Stored | None:
        path = entry.location
        try:
            with self._reading(path):
                stored = self.read_stored(path, entry)[0]
        except DamagedError:
            if self.exists(path):
                raise
            return None
        except (FileNotFoundError, ReplacedError):  # removed or replaced since it was listed
            self._changed(path)
            now = self._entry(path)
            return None if now is None or now == entry else self._stored_or_none(now)
        self._records.keep([(entry, stored)])
        return stored

    def _read_ahead(self, entry: Entry) -> None:
        """Read the records of the remote files that follow one in its folder, at the same time, unless they are known.

        An error is raised when it is that file's turn.
        """

        def read(following: Entry) -> tuple[Entry, Stored] | None:
            try:
                return following, self.read_stored(following.location, following)[0]
            except (OSError, ChecksumError):
                return None

        listed = iter(self._remote(entry.location.rpartition("/")[0]).values())
        after = itertools.islice(itertools.dropwhile(lambda one: one != entry, listed), 1, RECORDS_AHEAD)
        wanted = [one for one in after if _has_record(one) and self._records.get(one) is None]
        if wanted:
            with ThreadPoolExecutor(READERS) as pool:
                self._records.keep([found for found in pool.map(read, wanted) if found is not None])

    def read_stored(self, path: str, entry: Entry | None = None) -> tuple[Stored, bool]:
        """Read the record of a file by its path, and return whether the file has checksums, too.

        With the `entry` of a remote file, one request is enough.

        Raises:
            ChecksumError: the record is damaged, or it is not a file of this lake.
        """
        try:
            record, sealed = read_record(self.store, path, None if self.is_local else entry)
            return from_record(record), sealed
        except ChecksumError:
            raise
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ChecksumError(f"not a file of this lake ({error})") from error

    def read(self, asset: str, shard: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read an asset's file and verify the columns; Arrow files are memory-mapped where the lake is local.

        Raises:
            LakeError: there is no such file, or it is damaged.
        """
        path, local = self._existing(asset, shard)
        with self._reading(path):
            if path.endswith(".parquet"):
                return read_parquet(local, columns)
            table = read_arrow(*mapped(local), columns)
        return table.select(columns) if columns else table

    def vectors(self, asset: str, shard: str | None = None, *, columns: Collection[str]) -> list[Vectors]:
        """Open columns of vectors. Rows are read and verified when they are indexed, so that others cost nothing.

        Args:
            asset: key of an asset of Arrow files, such as `embeddings/b32`.
            shard: name of the shard.
            columns: columns of float16 vectors.

        Returns:
            A `[n, d]` sequence of each column. Indexing it raises DamagedError.

        Raises:
            LakeError: there is no such file, or it is damaged.
        """
        path, local = self._existing(asset, shard)
        with self._reading(path):
            buffer, checked = mapped(local)
            table = read_arrow(buffer, checked, set(pa.ipc.open_file(buffer).schema.names) - set(columns))

        def verify(blocks: np.ndarray) -> None:
            with self._reading(path):
                checked.verify_blocks(blocks)

        found = []
        for column in columns:
            values = column_to_vectors(table[column])
            if table[column].num_chunks > 1:  # joined in memory, away from the blocks
                with self._reading(path):
                    checked.verify()
            offset = values.ctypes.data - buffer.address if table[column].num_chunks == 1 else 0
            found.append(Vectors(values, verify, offset))
        return found

    def verified_path(self, asset: str, shard: str | None = None, columns: Collection[str] | None = None) -> Path:
        """Verify columns of a Parquet file, by default all, and return its local path, for DuckDB to read.

        Raises:
            LakeError: there is no such file, or it is damaged.
        """
        path, local = self._existing(asset, shard)
        with self._reading(path), opened(local) as (file, checked):
            verify_parquet(pq.ParquetFile(file).metadata, checked, columns)
        return local

    def _existing(self, asset: str, shard: str | None) -> tuple[str, Path]:
        """Return a file's path, and the local path of its content."""
        path = self.path(asset, shard)
        try:
            if not self.is_local or self.exists(path):
                return path, self.local(path)
        except FileNotFoundError:
            pass
        where = f" of shard {shard}" if shard else ""
        raise LakeError(f"{path}: {asset}{where} is not there yet. Remedy: materialize it first.")

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Set a file aside if the block finds it damaged.

        Raises:
            DamagedError: it was.
        """
        try:
            yield
        except (ChecksumError, pa.ArrowInvalid) as error:
            raise self.set_aside(path, str(error)) from error
        except OSError as error:
            if error.errno is not None or isinstance(error, UserError):  # Arrow's own about the format have none
                raise
            raise self.set_aside(path, str(error)) from error

    def set_aside(self, path: str, why: str) -> DamagedError:
        """Rename a damaged file to `.<name>.damaged`, and return the error to raise."""
        folder, name = path.rsplit("/", 1)
        aside = f"{folder}/.{name}{DAMAGED_SUFFIX}"
        try:
            self.store.move(path, aside)
        except FileNotFoundError:
            pass  # another process was first
        except OSError as error:
            return DamagedError(f"{path}: damaged: {why}. Remedy: remove it; a run computes it again ({error})")
        self._changed(path)
        self.damaged[path] = why
        return DamagedError(f"{path}: damaged: {why}. Set aside as {aside}. Remedy: clip-select run computes it again")

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
        record = {**as_record(stored), **SEALED}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(record, sort_keys=True)})
        path = self.path(provenance.asset, provenance.shard)
        with self.replacing(path) as temporary:
            if path.endswith(".parquet"):
                write_parquet(table, temporary, looked_up=LOOKED_UP.get(provenance.asset))
            else:
                with pa.ipc.new_file(str(temporary), table.schema) as writer:
                    writer.write_table(table.combine_chunks())
            seal(temporary)
        return stored

    def remove(self, asset: str, shard: str | None = None) -> bool:
        """Remove an asset's file, and return whether there was one."""
        path = self.path(asset, shard)
        was_there = self.store.delete(path)
        self._changed(path)
        return was_there

    def put(self, path: str, content: bytes) -> None:
        """Write a small file, completely or not at all."""
        with self.replacing(path) as temporary:
            temporary.write_bytes(content)

    @contextmanager
    def replacing(self, path: str) -> Iterator[Path]:
        """Yield a local temporary path whose file becomes `path` when the block ends without an error."""
        folder, name = path.rsplit("/", 1)
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="lake-") as local:
                yield Path(local) / name
                self.store.put(path, Path(local) / name)
            self._changed(path)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        if folder not in self._cleared:  # it lists the folder, which may hold many files
            _clear_strays(Path(folder))
            self._cleared.add(folder)
        temporary = create_temporary(Path(folder), f".{name}.", TEMPORARY_SUFFIX)
        try:
            yield temporary
            self.store.put(path, temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _has_record(entry: Entry) -> bool:
    return not entry.name.startswith(".") and entry.name.endswith((".parquet", ".arrow"))


def _clear_strays(folder: Path) -> None:
    """Remove the temporary files of a folder whose writers were killed."""
    for stray in folder.glob(f".*{TEMPORARY_SUFFIX}*"):  # `.tmp`, and DuckDB's `.tmp.wal`
        written_by = stray.name.rpartition(TEMPORARY_SUFFIX)[0].rsplit(".", 1)[-1]
        if stray.is_file() and is_abandoned(stray, written_by):
            stray.unlink(missing_ok=True)
