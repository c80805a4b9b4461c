"""The format `image_folder`: image files, with captions in .txt files beside them or in a table.

Each folder directly in the pool's folder is a shard, with all images in it and below. Images directly in the pool's
folder are the shard `top`. With `pool.buckets` each of these is divided into `<folder>-00000`, `<folder>-00001` and so
on, by a hash of the file's name. A new file changes the fingerprint of its own shard alone.

The caption of `a.jpg` is `a.txt`; without one, it is in a table `captions` or `metadata` with the suffix .csv, .tsv,
.parquet or .jsonl. A table lies in the shard's folder or in the pool's; file names in it are relative to its own
folder. Its columns are found by these names, unless `pool.columns` names them:

| column | names, in this order |
|---|---|
| image (the file's name) | file_name, filename, file, image, image_path, path, key |
| caption | caption, text |
| uid, url | uid; url, URL |

A sample's key is the path of its image from the pool's folder.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources.pools import base as pools
from resources.pools.base import PoolError, PoolFormat, ShardRead
from resources.pools.samples import (
    METADATA,
    CheckedImage,
    RejectedError,
    ShardSamples,
    check_image,
    encodable,
    merge_descriptions,
    shown,
)
from resources.settings import PoolColumns, PoolSettings, available_cores
from resources.storage import files
from resources.storage.tar_samples import IMAGE_SUFFIXES

TOP = "top"
"""Name of the shard of images that lie directly in the pool's folder."""

_TABLES = frozenset(
    f"{name}.{suffix}" for name in ("captions", "metadata") for suffix in ("csv", "tsv", "parquet", "jsonl")
)
_NAMES: Mapping[str, Sequence[str]] = {
    "image": ("file_name", "filename", "file", "image", "image_path", "path", "key"),
    "caption": ("caption", "text"),
    "uid": ("uid",),
    "url": ("url", "URL"),
}


_NUMBERS = tuple(name for name in METADATA if name not in _NAMES)


@dataclass(frozen=True, slots=True)
class _Read:
    """One image file and its .txt, read."""

    image: CheckedImage | None
    text: bytes | None


class ImageFolderPool:
    """A folder of images. See `pools.Pool`."""

    has_images = True

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self._root = settings.path.rstrip("/")

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        return pools.fingerprints(self.shard_files())

    def shard_files(self) -> dict[str, list[files.Listed]]:
        """See `pools.Pool`."""
        top = _visible(pools.list_folder(self.settings))
        tables = [file for file in top if file.name in _TABLES]
        above = [files.Listed(f"../{table.name}", table.url, table.stamp) for table in tables]
        found: dict[str, list[files.Listed]] = {}
        for folder in self._folders(top):
            listed = self._tree(folder) if folder else top
            own = [file for file in listed if file.name in _TABLES and folder]
            for shard, inside in self._divided(folder, listed).items():
                if any(_is_image(file.name) for file in inside):
                    found[shard] = [*inside, *own, *above]
        if not found:
            raise PoolError(
                f"no shards: there is no image in {self._root} or its folders; looked for files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}. Set pool.path to the folder that holds them."
            )
        return found

    def _folders(self, top: Iterable[files.Listed]) -> list[str]:
        """Return the folders that are shards, "" for the pool's own if it has images."""
        folders = sorted(name for name in files.list_folders(self._root) if not name.startswith("."))
        if not any(_is_image(file.name) for file in top):
            return folders
        if TOP in folders:
            raise PoolError(
                f"{self._root}: the images directly in this folder are the shard {TOP}, and there is a folder {TOP} as "
                "well. Rename that folder, or move the images into one of their own."
            )
        return ["", *folders]

    def _tree(self, folder: str) -> list[files.Listed]:
        return _visible(files.list_tree(f"{self._root}/{folder}"))

    def _divided(self, folder: str, listed: Iterable[files.Listed]) -> dict[str, list[files.Listed]]:
        """Return a folder's images, .txt files and others by shard, without tables."""
        found: dict[str, list[files.Listed]] = {}
        for file in listed:
            if file.name not in _TABLES:
                found.setdefault(self._shard(folder, file.name), []).append(file)
        return found

    def _shard(self, folder: str, name: str) -> str:
        """Return the shard of a file. An image and its .txt are in the same one."""
        shard = pools.shard_name(folder) if folder else TOP
        if self.settings.buckets is None:
            return shard
        stem = os.path.splitext(name)[0].encode("utf-8", "surrogateescape")
        bucket = int.from_bytes(hashlib.sha256(stem).digest()[:8], "big") % self.settings.buckets
        return f"{shard}-{bucket:05d}"

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`."""
        top = _visible(pools.list_folder(self.settings))
        folder = name if self.settings.buckets is None else name.rpartition("-")[0]
        folders = self._folders(top)
        folder = next((found for found in folders if found and pools.shard_name(found) == folder), folder)
        if folder and folder in folders:
            pools.check_shard_name(folder, f"{self._root}/{folder}")
        if folder == TOP and "" in folders:
            folder = ""
        if folder not in folders:
            raise PoolError(f"there is no shard {name} (no folder {folder}) in {self._root}")
        listed = self._tree(folder) if folder else top
        inside = {file.name: file for file in self._divided(folder, listed).get(name, ())}
        image_names = sorted(file for file in inside if _is_image(file))
        if not image_names:
            raise pools.empty_shard(name, f"{self._root}/{folder}")
        rows, notes = self._table_rows(folder, top, listed)
        samples = ShardSamples(name, self.settings)
        with ThreadPoolExecutor(available_cores()) as threads:
            reads = threads.map(lambda image: self._read(inside, image), image_names)
            for image, read in zip(image_names, reads, strict=True):
                key = f"{folder}/{image}" if folder else image
                samples.add(key, lambda: _row(samples, key, read, rows.get(image, {})))  # noqa: B023, called at once
        described = {image for image in rows if self._shard(folder, image) == name}
        described |= {text for text in inside if text.endswith(".txt")} - {_text_of(image) for image in image_names}
        for missing in sorted(described - set(image_names)):
            key = f"{folder}/{missing}" if folder else missing
            samples.reject(key, RejectedError("image_missing", "it has a caption, and there is no such image"))
        others = [file for file in inside if not _is_image(file) and not file.endswith(".txt")]
        if others:
            notes.append(f"ignored files that are neither image nor caption: {shown(sorted(others))}")
        return samples.result(notes)

    def _read(self, inside: Mapping[str, files.Listed], image: str) -> _Read:
        """Read and decode an image file; safe to call from several threads."""
        text = inside.get(_text_of(image))
        try:
            with files.open_binary(inside[image].url) as file:
                checked = check_image(file.read(), self.settings.max_pixels)
            if text is None:
                return _Read(checked, None)
            with files.open_binary(text.url) as file:
                return _Read(checked, file.read())
        except OSError as error:
            raise PoolError(
                f"{inside[image].url} or its .txt cannot be read ({error}). Correct or remove it."
            ) from error

    def _table_rows(
        self, folder: str, top: Sequence[files.Listed], listed: Sequence[files.Listed]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the rows of the tables by file name, relative to the shard's folder, and notes."""
        tables = [(file, f"{folder}/" if folder else "") for file in top if file.name in _TABLES]
        if folder:
            tables = [(file, "") for file in listed if file.name in _TABLES] + tables
        rows: dict[str, dict[str, Any]] = {}
        repeated = 0
        for table, prefix in tables:
            for name, row in _table(table.url, self.settings.columns):
                if name.startswith(prefix) and (folder or "/" not in name):
                    inside = name.removeprefix(prefix)
                    repeated += inside in rows
                    rows[inside] = merge_descriptions(rows.get(inside, {}), row)
        notes = [f"{repeated} table rows of images that had one before only fill in missing values"] if repeated else []
        return rows, notes

    def read_images(self, shard: str, rows: pa.Table) -> list[bytes | PoolError]:
        """See `pools.Pool`."""
        del shard  # the key is the path from the pool's folder
        return [self._image(key) for key in rows["key"].to_pylist()]

    def _image(self, key: str) -> bytes | PoolError:
        try:
            with files.open_binary(f"{self._root}/{key}") as file:
                return file.read()
        except OSError as error:
            return PoolError(f"{self._root}/{key}: {error}")

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`: there are none."""
        raise pools.no_embeddings(self.settings, name, rows, encoder_name)


def _row(samples: ShardSamples, key: str, read: _Read, values: Mapping[str, Any]) -> dict[str, Any]:
    if encodable(key)[1]:
        raise RejectedError("key_invalid", "the file's name is not valid UTF-8")
    assert read.image is not None
    caption = read.text if read.text is not None else values.get("caption")
    return samples.row(key, read.image, caption, values)


def _visible(listed: Iterable[files.Listed]) -> list[files.Listed]:
    return [file for file in listed if not any(part.startswith(".") for part in file.name.split("/"))]


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and "." in name


def _text_of(image: str) -> str:
    return os.path.splitext(image)[0] + ".txt"


def _table(url: str, columns: PoolColumns | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the file name and the values of each row of a caption table.

    Raises:
        PoolError: it cannot be read, or has no column of file names.
    """
    try:
        for row in _table_rows(url):
            yield _named(row, columns, url)
    except (pa.ArrowException, OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, PoolError):
            raise
        raise PoolError(f"{url}: the table cannot be read ({error}). Write it again.") from error


def _table_rows(url: str) -> Iterator[Mapping[str, Any]]:
    with files.open_binary(url) as file:
        if url.endswith(".parquet"):
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
            return
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as lines:
            if url.endswith(".jsonl"):
                for line in lines:
                    if line.strip():
                        yield dict(json.loads(line))
            elif url.endswith(".tsv"):
                yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                yield from csv.DictReader(lines)


def _named(row: Mapping[str, Any], columns: PoolColumns | None, url: str) -> tuple[str, dict[str, Any]]:
    found: dict[str, Any] = {name: _number(row[name]) for name in _NUMBERS if row.get(name) is not None}
    for column, names in _NAMES.items():
        given = getattr(columns, column) if columns is not None else None
        if given is not None and given not in row:
            raise PoolError(
                f"{url}: there is no column {given!r} (pool.columns.{column}); it has {', '.join(map(str, row))}. "
                "Correct the name."
            )
        name = given or next((name for name in names if name in row), None)
        if name is not None and row[name] not in (None, ""):
            found[column] = row[name]
    if "image" not in found:
        raise PoolError(
            f"{url}: a row has no file name; looked for a column {' or '.join(_NAMES['image'])}. "
            "Set pool.columns.image."
        )
    return str(found["image"]).removeprefix("./"), found


def _number(value: object) -> object:
    """Return the number that a text of a CSV or TSV table stands for, or None."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


FORMAT = PoolFormat(
    name="image_folder",
    files="image files with captions in .txt files beside them, or in a captions.csv, .tsv, .parquet or .jsonl",
    has_images=True,
    options=frozenset({"columns", "buckets"}),
    open=lambda settings, _: ImageFolderPool(settings),
)
