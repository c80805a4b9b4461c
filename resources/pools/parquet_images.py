"""The format `parquet_images`: Parquet files with the image bytes in a column.

Each `*.parquet` in the folder is a shard, and each of its rows is a sample. The image column is binary, or Hugging
Face's `struct<bytes, path>`. Columns are found by these names, unless `pool.columns` names them:

| column | names, in this order |
|---|---|
| image | image, img, jpg, jpeg, png, webp, image_bytes, bytes |
| caption | caption, text, txt |
| uid, url, key | uid; url, URL; key, __key__ |

`original_width`, `original_height` and the `clip_*_similarity_score` columns are read where they exist. Without a key
column the key is the row's number.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from resources.pools import base as pools
from resources.pools.base import PoolError, PoolFormat, ShardRead
from resources.pools.samples import METADATA, CheckedImage, RejectedError, ShardSamples, check_image, column_values
from resources.settings import PoolColumns, PoolSettings, available_cores
from resources.storage import files

_ROWS = 128  # decoded at a time
_BUFFER = 1 << 20  # bytes of a column chunk read ahead
_NAMES: Mapping[str, Sequence[str]] = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"),
    "caption": ("caption", "text", "txt"),
    "uid": ("uid",),
    "url": ("url", "URL"),
    "key": ("key", "__key__"),
}


class ParquetImagesPool:
    """A folder of Parquet files with images. See `pools.Pool`."""

    has_images = True

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self._open: _Images | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file: each process opens its own."""
        return {**self.__dict__, "_open": None}

    def _shards(self) -> dict[str, files.Listed]:
        found = {}
        for file in pools.list_folder(self.settings):
            if file.name.endswith(".parquet") and file.name[0] not in "._":
                found[pools.shard_name(file.name.removesuffix(".parquet"))] = file
        if not found:
            raise PoolError(
                f"no shards: there is no *.parquet in {self.settings.path}. Set pool.path to the folder that holds the "
                "Parquet files (of a Hugging Face dataset, its folder `data`)."
            )
        return found

    def _shard(self, name: str) -> files.Listed:
        file = self._shards().get(name)
        if file is None:
            raise PoolError(f"there is no shard {name} (no {name}.parquet) in {self.settings.path}")
        pools.check_shard_name(file.name.removesuffix(".parquet"), file.url)
        return file

    def shard_files(self) -> dict[str, list[files.Listed]]:
        """See `pools.Pool`."""
        return {name: [file] for name, file in self._shards().items()}

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        return pools.fingerprints(self.shard_files())

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`."""
        file = self._shard(name)
        samples = ShardSamples(name, self.settings)
        try:
            with closing(_source(file.url)) as source, ThreadPoolExecutor(available_cores()) as threads:
                parquet = _parquet(source)
                columns = _columns(parquet.schema_arrow, self.settings.columns, file.url)
                wanted = [*columns.values(), *(name for name in METADATA if name in parquet.schema_arrow.names)]
                for batch in parquet.iter_batches(_ROWS, columns=list(dict.fromkeys(wanted))):
                    _add(samples, batch, columns, threads)
        except (pa.ArrowException, OSError) as error:
            raise PoolError(f"{file.url}: the parquet cannot be read ({error}). Download or write it again.") from error
        if not samples.seen:
            raise pools.empty_shard(name, file.url)
        return samples.result([])

    def read_images(self, shard: str, rows: pa.Table) -> list[bytes | PoolError]:
        """See `pools.Pool`. Rows in ascending order are read in one pass over the file."""
        wanted = rows["source_row"].to_numpy()
        found: list[bytes | PoolError] = [b""] * len(wanted)
        try:
            images = self._images(shard)
            for place in np.argsort(wanted, kind="stable").tolist():
                found[place] = images.read(int(wanted[place]))
        except (PoolError, pa.ArrowException, OSError) as error:
            self._open = None
            return [error if isinstance(error, PoolError) else PoolError(f"{shard}.parquet: {error}")] * len(wanted)
        return found

    def _images(self, shard: str) -> "_Images":
        """Return the open file of the last call, if it is the same and has not changed."""
        file = files.stat(f"{self.settings.path.rstrip('/')}/{shard}.parquet")
        if self._open is None or self._open.file != file:
            self._open = _Images(file, self.settings.columns)
        return self._open

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`: there are none."""
        raise pools.no_embeddings(self.settings, name, rows, encoder_name)


class _Images:
    """The images of one file, for reading forward; it holds one batch of rows.

    Args:
        file: the file.
        columns: names of columns.
    """

    def __init__(self, file: files.Listed, columns: PoolColumns | None) -> None:
        self.file = file
        self._parquet = _parquet(_source(file.url))
        self._column = _columns(self._parquet.schema_arrow, columns, file.url)["image"]
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._batches: Iterator[tuple[int, pa.Array]] = iter(())
        self._group = -1
        self._first = 0
        self._batch: pa.Array = pa.nulls(0, pa.binary())

    def read(self, row: int) -> bytes | PoolError:
        """Return the image of a row, or the error if it has none."""
        if row >= self._starts[-1]:
            return PoolError(f"{self.file.url} has {self._starts[-1]} rows, and row {row} is wanted")
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._group or row < self._first:
            self._group = group
            self._batches = self._of_group(group)
            self._first, self._batch = next(self._batches)
        while row >= self._first + len(self._batch):
            self._first, self._batch = next(self._batches)
        data = self._batch[row - self._first].as_py()
        return PoolError(f"{self.file.url}: row {row} has no image") if data is None else data

    def _of_group(self, group: int) -> Iterator[tuple[int, pa.Array]]:
        """Yield the batches of a row group, each with the number of its first row."""
        first = int(self._starts[group])
        for batch in self._parquet.iter_batches(_ROWS, row_groups=[group], columns=[self._column]):
            yield first, _bytes(batch.column(0))
            first += batch.num_rows


def _source(url: str) -> Any:
    return files.open_binary(url) if files.is_remote(url) else pa.OSFile(url)


def _parquet(source: Any) -> pq.ParquetFile:
    """Open a file for reading a part of a row group at a time; by default Arrow buffers all of it."""
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER)


def _columns(schema: pa.Schema, given: PoolColumns | None, url: str) -> dict[str, str]:
    """Return the file's column for each of image, caption, uid, url and key that it has.

    Raises:
        PoolError: a named column is missing, there is no column of images or captions, or images are no bytes.
    """
    found = {}
    for column, names in _NAMES.items():
        name = getattr(given, column) if given is not None else None
        if name is not None and name not in schema.names:
            raise PoolError(
                f"{url}: there is no column {name!r} (pool.columns.{column}); it has {', '.join(schema.names)}. "
                "Correct the name."
            )
        name = name or next((name for name in names if name in schema.names), None)
        if name is not None:
            found[column] = name
    for column in ("image", "caption"):
        if column not in found:
            raise PoolError(
                f"{url}: there is no column {' or '.join(_NAMES[column])}; it has {', '.join(schema.names)}. Set "
                f"pool.columns.{column}."
            )
    kind = schema.field(found["image"]).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not _is_binary(kind):
        raise PoolError(
            f"{url}: column {found['image']} is {kind}, not binary or struct<bytes, path>. Set pool.columns.image to "
            "the column that holds the image bytes."
        )
    return found


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _bytes(column: pa.Array) -> pa.Array:
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _add(samples: ShardSamples, batch: pa.RecordBatch, columns: Mapping[str, str], threads: ThreadPoolExecutor) -> None:
    """Add the samples of some rows; images are decoded in parallel."""
    first = samples.seen
    images = _bytes(batch.column(columns["image"])).to_pylist()
    limit = samples.settings.max_pixels
    checked = threads.map(lambda data: None if data is None else check_image(data, limit), images)
    metadata = {name: column_values(batch.column(name)) for name in METADATA if name in batch.schema.names}
    named = {column: column_values(batch.column(name)) for column, name in columns.items() if column != "image"}
    for row, image in enumerate(checked):
        of_row = {name: values[row] for name, values in (metadata | named).items()}
        key = of_row.get("key")
        key = f"{first + row:09d}" if key is None else str(key)
        samples.add(key, lambda: _row(samples, key, image, of_row))  # noqa: B023, called at once


def _row(samples: ShardSamples, key: str, image: CheckedImage | None, values: Mapping[str, Any]) -> dict[str, Any]:
    if key in samples.keys:
        raise RejectedError("duplicate_key", "the key came before")
    if image is None:
        raise RejectedError("image_missing", "the image is null")
    caption = values["caption"]
    if isinstance(caption, list):
        raise RejectedError("caption_invalid", f"a list of {len(caption)} captions. Name a column with one caption")
    return samples.row(key, image, caption, values)


FORMAT = PoolFormat(
    name="parquet_images",
    files="*.parquet with image bytes in a column (binary, or Hugging Face's struct<bytes, path>)",
    has_images=True,
    options=frozenset({"columns"}),
    open=lambda settings, _: ParquetImagesPool(settings),
)
