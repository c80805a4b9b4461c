"""The format `webdataset`: shards as img2dataset writes them, a tar and perhaps a Parquet file beside it.

With `tars_per_shard`, a shard is a group of consecutive tars (`resources.pools.groups`).

A sample's caption is its .txt, else the Parquet file's, else its .json's. Every other field is the first that is not
null of Parquet file and .json; a uid that neither has is a hash of the content.

Which members form a sample is decided in `resources.storage.tar_samples`. Members that belong to no sample are ignored
and noted.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources.pools import base as pools
from resources.pools.base import PoolError, PoolFormat, ShardRead
from resources.pools.groups import TAR_STRIDE, ShardGroups, grouped
from resources.pools.samples import (
    METADATA,
    CheckedImage,
    RejectedError,
    ShardSamples,
    check_image,
    column_values,
    encodable,
    is_null,
    match_keys,
    merge_descriptions,
    shown,
)
from resources.settings import PoolSettings, available_cores
from resources.storage import files, tars
from resources.storage.tar_samples import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    TarSample,
    group_samples,
    split_name,
)

_Parts = dict[str, files.Listed]
"""The files of a tar by suffix: tar and parquet."""


class WebdatasetPool:
    """A folder of tars. See `pools.Pool`."""

    has_images = True

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.groups: ShardGroups | None = None

    def _listed(self) -> dict[str, _Parts]:
        """List the tars by name."""
        found: dict[str, _Parts] = {}
        compressed = []
        for file in pools.list_folder(self.settings):
            stem, dot, suffix = file.name.rpartition(".")
            stem, suffix = stem or file.name, dot + suffix
            stem = pools.shard_name(stem)
            if suffix == ".tar":
                found.setdefault(stem, {})["tar"] = file
            elif suffix == ".parquet":
                found.setdefault(stem, {})["parquet"] = file
            elif file.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz")):
                compressed.append(file.name)
        # img2dataset numbers its shards: a numbered parquet without its tar is a shard that lost it
        found = {name: parts for name, parts in found.items() if "tar" in parts or name.isdecimal()}
        if not any("tar" in parts for parts in found.values()):
            hint = (
                f"It has compressed tars ({compressed[0]}): images are read in place, so decompress them."
                if compressed
                else "Set pool.path to a folder of img2dataset or webdataset tars, or set "
                "pool.format to datacomp for parquet with npz."
            )
            raise PoolError(f"no shards: there is no *.tar in {self.settings.path}. {hint}")
        return found

    def _shards(self) -> dict[str, dict[str, _Parts]]:
        """Return the tars of each shard by name, as far as they are there."""
        listed = self._listed()
        shards = self._grouped(listed)
        found = {name: {tar: listed[tar] for tar in tars if tar in listed} for name, tars in shards.items()}
        return {name: tars for name, tars in found.items() if tars}

    def _grouped(self, listed: Iterable[str]) -> dict[str, list[str]]:
        """Return the recorded groups, and those that new tars would be."""
        number = self.settings.tars_per_shard or 1
        recorded = {} if self.groups is None else self.groups.recorded()
        known = {tar for tars in recorded.values() for tar in tars}
        new = sorted(tar for tar in listed if tar not in known)
        taken = next((tar for tar in new if tar in recorded), None)
        if taken is not None:
            raise PoolError(
                f"{self.settings.path}: {taken}.tar has the name of a group of tars. Remedy: rename the tar"
            )
        if self.groups is None or number == 1 or not new:
            return recorded | {tar: [tar] for tar in new}
        return recorded | grouped(new, number, self.groups.single())

    def record_groups(self) -> None:
        """See `pools.TarPool`."""
        while self.groups is not None and (self.settings.tars_per_shard or 1) > 1:
            shards = self._grouped(self._listed())
            recorded = self.groups.recorded()
            new = {name: tars for name, tars in shards.items() if name not in recorded}
            if not new or self.groups.record(new):
                return

    def shard_files(self) -> dict[str, list[files.Listed]]:
        """See `pools.Pool`."""
        return {
            name: [file for parts in tars.values() for file in parts.values()] for name, tars in self._shards().items()
        }

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        return pools.fingerprints(self.shard_files())

    def tars(self, shard: str) -> list[str]:
        """See `pools.TarPool`."""
        names = None if self.groups is None else self.groups.tars(shard)
        return [f"{self.settings.path.rstrip('/')}/{name}.tar" for name in names or [shard]]

    def read_images(self, shard: str, rows: pa.Table) -> list[bytes | PoolError]:
        """See `pools.Pool`. Neighbouring images are read together; if a tar is too short, all of its get the error."""
        sizes, urls = rows["image_size"].to_pylist(), self.tars(shard)
        by_tar: dict[int, list[tuple[int, int]]] = {}  # the row, and the byte of its image
        for row, offset in enumerate(rows["image_offset"].to_pylist()):
            number, byte = pools.place_in_tar(offset)
            by_tar.setdefault(number, []).append((row, byte))
        found: list[bytes | PoolError] = [PoolError(f"shard {shard} has no such tar")] * len(sizes)
        for number, places in by_tar.items():
            if number >= len(urls):
                continue
            read: Iterable[bytes | PoolError]
            try:
                read = list(files.read_ranges(urls[number], [(byte, sizes[row]) for row, byte in places]))
            except OSError as error:
                read = [PoolError(str(error))] * len(places)
            for (row, _), image in zip(places, read, strict=True):
                found[row] = image
        return found

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`: there are none."""
        raise pools.no_embeddings(self.settings, name, rows, encoder_name)

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`. The tars of a group follow one another."""
        samples, notes = ShardSamples(name, self.settings), list[str]()
        for number, (tar, parts) in enumerate(self._parts(name).items()):
            if not parts:
                notes.append(f"{tar}.tar is gone, and was one of the tars of this shard")
            else:
                notes += _read_tar(tar, parts, samples, number)
        return samples.result(notes)

    def _parts(self, name: str) -> dict[str, _Parts]:
        """Return the files of each tar of a shard; no files for a tar of a group that is gone.

        Raises:
            PoolError: the shard is not there.
        """
        tars = None if self.groups is None else self.groups.tars(name)
        if tars is not None and len(tars) > 1:  # without listing a folder of very many tars
            found = {tar: self._stat(tar) for tar in tars}
        else:
            found = self._shards().get(name, {})
        if not any(found.values()):
            raise PoolError(f"there is no shard {name} (no {name}.tar) in {self.settings.path}")
        return found

    def _stat(self, tar: str) -> _Parts:
        found: _Parts = {}
        for suffix in ("tar", "parquet"):
            with contextlib.suppress(FileNotFoundError):
                found[suffix] = files.stat(f"{self.settings.path.rstrip('/')}/{tar}.{suffix}")
        return found


def _read_tar(name: str, parts: _Parts, samples: ShardSamples, number: int) -> list[str]:
    """Add the samples of a shard's tar, and return remarks.

    Args:
        name: the tar's, without `.tar`.
        parts: its files.
        samples: gets the samples.
        number: its place among the shard's tars.

    Raises:
        PoolError: it can't be read, or has no samples.
    """
    if "tar" not in parts:
        raise PoolError(f"{parts['parquet'].url} has no {name}.tar beside it. Bring the tar, or remove the parquet.")
    url = parts["tar"].url
    pools.check_shard_name(parts["tar"].name.removesuffix(".tar"), url)
    sidecar = _read_sidecar(parts["parquet"].url) if "parquet" in parts else _Sidecar("")
    samples.keys.clear()  # keys are those of a tar
    with files.mapped(url) as view:
        try:
            index = tars.walk(view, url)
        except tars.TarError as error:
            raise PoolError(str(error)) from error
        groups, unrelated = group_samples(index)
        if not groups and not sidecar.all_failed:
            raise _no_samples(name, url, sidecar, unrelated)
        sidecar.match([group.key for group in groups])
        shard = _Tar(samples, view, sidecar, number * TAR_STRIDE)
        with ThreadPoolExecutor(available_cores()) as threads:
            # Decoding and hashing release the interpreter's lock.
            for group, image in zip(groups, threads.map(shard.check, groups), strict=True):
                shard.add(group, image)
    shard.add_sidecar_only()
    notes = list(sidecar.notes)
    if index.fault is not None:
        notes.append(f"{name}.tar is incomplete ({index.fault}); the samples before that point are used")
    notes += _remarks(name, groups)
    if index.after_end is not None:
        notes.append(f"{name}.tar: {index.after_end}")
    if unrelated:
        notes.append(f"ignored members that are no part of a sample: {shown(unrelated)}")
    return notes


class _Sidecar:
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
        self.all_failed = bool(self.rows) and all(map(_failed, self.rows.values()))
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


class _Tar:
    """One tar while it is read.

    Args:
        samples: of its shard.
        view: its bytes.
        sidecar: the Parquet file beside it.
        base: `image_offset` of its first byte.
    """

    def __init__(self, samples: ShardSamples, view: memoryview, sidecar: _Sidecar, base: int) -> None:
        self.samples = samples
        self.view = view
        self.sidecar = sidecar
        self.base = base

    def _bytes(self, member: tars.Member) -> bytes:
        return bytes(self.view[member.offset : member.offset + member.size])

    def check(self, sample: TarSample) -> CheckedImage | None:
        """Hash and decode the image; safe to call from several threads."""
        if sample.image is None or sample.cut:
            return None
        return check_image(self._bytes(sample.image), self.samples.settings.max_pixels)

    def add(self, sample: TarSample, image: CheckedImage | None) -> None:
        """Add one sample of the tar."""
        self.samples.add(sample.key, lambda: self._row(sample, image))

    def add_sidecar_only(self) -> None:
        """Reject the sidecar's rows that have no members in the tar."""
        for key, row in self.sidecar.unmatched().items():
            if _failed(row):
                detail = f"{row['status']}: {row.get('error_message') or 'no message'}"
                rejected = RejectedError("download_failed", detail)
            else:
                rejected = RejectedError("missing_from_tar", "the parquet has this key, the tar does not")
            self.samples.reject(key, rejected)

    def _row(self, sample: TarSample, image: CheckedImage | None) -> dict[str, Any]:
        key = sample.key
        if encodable(key)[1]:
            raise RejectedError("key_invalid", "the members' names are not valid UTF-8")
        if _climbs(key):
            raise RejectedError("unsafe_path", "the path leads out of the folder it is unpacked to")
        if sample.cut:
            raise RejectedError("shard_truncated", "the tar ends before the sample does")
        if key in self.samples.keys:
            raise RejectedError(
                "duplicate_key",
                "the key came before, with members of the same suffix",
            )
        if sample.image is None or image is None:
            raise RejectedError("image_missing", _suffixes_found(sample))
        metadata = self._metadata(sample)
        caption = metadata.get("caption") if sample.text is None else self._bytes(sample.text)
        return self.samples.row(key, image, caption, metadata, offset=self.base + sample.image.offset)

    def _metadata(self, sample: TarSample) -> Mapping[str, Any]:
        """Return the sample's description, merged from the Parquet file and the .json."""
        row = self.sidecar.row(sample.key)
        metadata = merge_descriptions(row or {}, self._json(sample, row))
        if row is None and self.sidecar.has_uids and is_null(metadata.get("uid")):
            raise RejectedError("missing_from_parquet", "the parquet has the uids of other samples, and not this key")
        return metadata

    def _json(self, sample: TarSample, row: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if sample.json is None:
            return {}
        try:
            metadata = json.loads(self._bytes(sample.json))
            if isinstance(metadata, dict):
                return metadata
            fault = "not an object"
        except (ValueError, RecursionError) as error:
            fault = str(error)
        if row is not None and not is_null(row.get("uid")):
            return {}  # the sample's identity is known without it
        raise RejectedError("metadata_invalid", f"{sample.json.name}: {fault}")


def _suffixes_found(sample: TarSample) -> str:
    suffixes = [split_name(member.name)[1] for member in sample.members]
    found = f"no image: the suffixes of this key are {', '.join(map(repr, suffixes))}"
    if any("." in suffix for suffix in suffixes):
        found += (
            ". A suffix is everything after the first dot of the name: rename the members to <key>.jpg and <key>.txt"
        )
    return found


def _remarks(name: str, groups: Sequence[TarSample]) -> list[str]:
    """Return notes on how the members of samples lie in the tar."""
    notes = []
    scattered = [group.key for group in groups if group.scattered]
    if scattered:
        notes.append(
            f"members of one sample are not neighbours in {name}.tar ({shown(scattered)}); webdataset needs them to "
            f"be: pack it again with `tar --sort=name -cf {name}.tar <folder>`"
        )
    several = [group.key for group in groups if any(_is_image(other.name) for other in group.others) and group.image]
    if several:
        notes.append(f"keys with more than one image, of which the first is used: {shown(several)}")
    return notes


def _is_image(name: str) -> bool:
    return split_name(name)[1].lower() in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES


def _no_samples(name: str, url: str, sidecar: _Sidecar, unrelated: list[str]) -> PoolError:
    """Return the error of a tar without samples."""
    if sidecar.rows:
        good = sum(not _failed(row) for row in sidecar.rows.values())
        return PoolError(
            f"empty shard {name}: there is no sample in {url}, and {good} downloads were successful according to "
            f"{sidecar.url}. Remedy: bring the whole tar, or remove both files."
        )
    if unrelated:
        return PoolError(
            f"empty shard {name}: no member of {url} is an image, .txt or .json; it has {shown(unrelated)}. Remedy: "
            f"name images <key>.jpg (or {', '.join(sorted(IMAGE_SUFFIXES - {'jpg'}))}), or remove the file."
        )
    return pools.empty_shard(name, url)


def _read_sidecar(url: str) -> _Sidecar:
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
            if _failed(first) and not _failed(row):
                rows[key] = row
    file_name = url.rpartition("/")[2]
    notes = []
    if without_key:
        notes.append(f"ignored rows of {file_name} without a key: {without_key}")
    if repeated:
        notes.append(f"keys that {file_name} has more than once, of which one row is used: {shown(repeated)}")
    return _Sidecar(url, rows, notes)


def _failed(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the Parquet file is of a download that failed."""
    return not is_null(row.get("status")) and row["status"] != "success"


def _climbs(key: str) -> bool:
    return key.startswith("/") or "\\" in key or "\0" in key or ".." in key.split("/")


FORMAT = PoolFormat(
    name="webdataset",
    files="*.tar, each with an optional *.parquet of the same stem, as img2dataset writes them",
    has_images=True,
    has_tars=True,
    options=frozenset({"tars_per_shard"}),
    open=lambda settings, _: WebdatasetPool(settings),
)
