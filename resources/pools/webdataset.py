"""Webdataset shards as img2dataset writes them: a tar, and perhaps a parquet beside it.

A sample is a run of neighbouring members with one key: the path up to the first dot of the file
name. Members with other suffixes, or without image, caption and .json, are ignored and noted.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources.pools import base as pools
from resources.pools.base import PoolError, ShardRead
from resources.settings import PoolSettings, available_cores
from resources.storage import files, images, tars

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp"}
_SUFFIXES = _IMAGES | {"txt", "json"}
_SHOWN = 5  # names in a note


@dataclass(slots=True)
class _Group:
    """Neighbouring members of one key, by kind."""

    key: str
    image: tars.Member | None = None
    text: tars.Member | None = None
    json: tars.Member | None = None
    cut: bool = False

    def kinds(self) -> set[str]:
        return {kind for kind in ("image", "text", "json") if getattr(self, kind) is not None}


class _RejectedError(ValueError):
    """A sample that cannot be used, with one of the reasons in `pools`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class WebdatasetPool:
    """A folder of tars. See `pools.Pool`."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings

    def _shards(self) -> dict[str, dict[str, files.Listed]]:
        found: dict[str, dict[str, files.Listed]] = {}
        compressed = []
        for file in pools.list_folder(self.settings):
            stem, suffix = os.path.splitext(file.name)
            if suffix == ".tar":
                pools.check_shard_name(stem, file.url)
                found.setdefault(stem, {})["tar"] = file
            elif suffix == ".parquet":
                found.setdefault(stem, {})["parquet"] = file
            elif file.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz")):
                compressed.append(file.name)
        # img2dataset numbers its shards: a numbered parquet without its tar is a shard that lost it
        shards = {name: parts for name, parts in found.items() if "tar" in parts or name.isdecimal()}
        if not any("tar" in parts for parts in shards.values()):
            hint = (
                f"It has compressed tars ({compressed[0]}): images are read in place, so decompress them."
                if compressed
                else "Set pool.path to a folder of img2dataset or webdataset tars, or set "
                "pool.format to datacomp for parquet with npz."
            )
            raise PoolError(f"no shards: there is no *.tar in {self.settings.path}. {hint}")
        return shards

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        return {name: files.fingerprint(list(parts.values())) for name, parts in self._shards().items()}

    def image_url(self, name: str) -> str:
        """See `pools.Pool`."""
        return f"{self.settings.path.rstrip('/')}/{name}.tar"

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`: there are none."""
        raise PoolError(
            f"the webdataset pool {self.settings.path} carries no embeddings for {encoder_name} "
            f"({name}, {rows.num_rows} rows)"
        )

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`."""
        parts = self._shards().get(name)
        if parts is None:
            raise PoolError(f"there is no shard {name} (no {name}.tar) in {self.settings.path}")
        if "tar" not in parts:
            raise PoolError(
                f"{parts['parquet'].url} has no {name}.tar beside it. Bring the tar, or remove the parquet."
            )
        url = parts["tar"].url
        sidecar = _read_sidecar(parts["parquet"].url) if "parquet" in parts else {}
        with files.mapped(url) as view:
            try:
                index = tars.walk(view, url)
            except tars.TarError as error:
                raise PoolError(str(error)) from error
            groups, unrelated = _group(index)
            if not groups:
                raise pools.empty_shard(name, url)
            shard = _Shard(name, self.settings, view, sidecar)
            with ThreadPoolExecutor(available_cores()) as threads:
                # decoding and hashing release the interpreter's lock
                looks = threads.map(shard.look, groups)
                for group, look in zip(groups, looks, strict=True):
                    shard.add(group, look)
        shard.add_sidecar_only()
        notes = []
        if index.fault is not None:
            notes.append(f"{name}.tar is incomplete ({index.fault}); what comes before is used")
        if unrelated:
            shown = ", ".join(unrelated[:_SHOWN])
            more = f" and {len(unrelated) - _SHOWN} more" if len(unrelated) > _SHOWN else ""
            notes.append(f"ignored members that are no part of a sample: {shown}{more}")
        return ShardRead(
            pa.Table.from_pylist(shard.rows, pools.RAW_POOL_SCHEMA),
            pools.rejects_table(name, shard.rejects),
            notes,
        )


@dataclass(frozen=True, slots=True)
class _Look:
    """What a sample's bytes are. `fault` stands in for `facts` where the image is no good."""

    digest: bytes | None = None
    facts: images.ImageFacts | None = None
    fault: images.ImageError | None = None


class _Shard:
    """One shard while it is read: each sample becomes a row or a reject."""

    def __init__(
        self,
        name: str,
        settings: PoolSettings,
        view: memoryview,
        sidecar: Mapping[str, dict[str, Any]],
    ) -> None:
        self.name = name
        self.settings = settings
        self.view = view
        self.sidecar = sidecar
        self.rows: list[dict[str, Any]] = []
        self.rejects: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._uids: dict[str, str] = {}

    def _bytes(self, member: tars.Member) -> bytes:
        return bytes(self.view[member.offset : member.offset + member.size])

    def look(self, group: "_Group") -> _Look:
        """Hash and decode the image; safe to call from several threads."""
        if group.image is None or group.cut:
            return _Look()
        data = self._bytes(group.image)
        digest = hashlib.sha256(data).digest()
        try:
            return _Look(digest, facts=images.check(data, self.settings.max_pixels))
        except images.ImageError as fault:
            return _Look(digest, fault=fault)

    def add(self, group: "_Group", look: _Look) -> None:
        """Judge one sample of the tar."""
        source_row = len(self.rows) + len(self.rejects)
        try:
            row = self._row(group, look)
        except _RejectedError as reject:
            self._reject(group.key, source_row, reject)
        else:
            self._uids[row["uid"]] = group.key
            self.rows.append({**row, "shard": self.name, "source_row": source_row})
        self._keys.add(group.key)

    def add_sidecar_only(self) -> None:
        """Reject the sidecar's rows that have no members in the tar."""
        for key, row in self.sidecar.items():
            if key in self._keys:
                continue
            if row.get("status", "success") != "success":
                detail = f"{row['status']}: {row.get('error_message') or 'no message'}"
                reject = _RejectedError("download_failed", detail)
            else:
                reject = _RejectedError("missing_from_tar", "the parquet has this key, the tar does not")
            self._reject(key, len(self.rows) + len(self.rejects), reject)

    def _reject(self, key: str, source_row: int, reject: _RejectedError) -> None:
        self.rejects.append(
            {
                "key": _encodable(key)[0],
                "source_row": source_row,
                "reason": reject.reason,
                "detail": _encodable(reject.detail)[0],
            }
        )

    def _row(self, group: "_Group", look: _Look) -> dict[str, Any]:
        key = group.key
        if _encodable(key)[1]:
            raise _RejectedError("key_invalid", "the members' names are not valid UTF-8")
        if _climbs(key):
            raise _RejectedError("unsafe_path", "the path leads out of the folder it is unpacked to")
        if group.cut:
            raise _RejectedError("shard_truncated", "the tar ends before the sample does")
        if key in self._keys:
            raise _RejectedError(
                "duplicate_key",
                "the key came before; a sample's members must be neighbours in the tar",
            )
        if group.image is None:
            raise _RejectedError("image_missing", f"no image beside {', '.join(group.kinds())}")
        meta = self._meta(group)
        caption, repaired = self._caption(group, meta)
        if look.fault is not None:
            raise _RejectedError(look.fault.reason, look.fault.detail)
        assert look.facts is not None
        assert look.digest is not None
        facts = look.facts
        if min(facts.width, facts.height) < self.settings.min_side:
            raise _RejectedError(
                "image_too_small",
                f"{facts.width} x {facts.height} px, a side under {self.settings.min_side}",
            )
        uid = self._uid(meta, look.digest, caption)
        return {
            "uid": uid,
            "f0": int(uid[:16], 16),
            "f1": int(uid[16:], 16),
            "key": key,
            "caption": caption,
            "url": _text_or_none(meta.get("url")),
            "width": facts.width,
            "height": facts.height,
            "original_width": _pixels_or_none(meta.get("original_width")),
            "original_height": _pixels_or_none(meta.get("original_height")),
            "image_format": facts.format,
            "sha256": look.digest.hex(),
            "image_offset": group.image.offset,
            "image_size": group.image.size,
            "caption_repaired": repaired,
            "clip_b32_similarity_score": _score_or_none(meta.get("clip_b32_similarity_score")),
            "clip_l14_similarity_score": _score_or_none(meta.get("clip_l14_similarity_score")),
        }

    def _meta(self, group: "_Group") -> Mapping[str, Any]:
        """The sidecar's row, else the .json, else nothing."""
        if group.key in self.sidecar:
            return self.sidecar[group.key]
        if group.json is None:
            return {}
        try:
            meta = json.loads(self._bytes(group.json))
        except (ValueError, RecursionError) as error:
            raise _RejectedError("metadata_invalid", f"{group.json.name}: {error}") from error
        if not isinstance(meta, dict):
            raise _RejectedError("metadata_invalid", f"{group.json.name}: not an object")
        return meta

    def _caption(self, group: "_Group", meta: Mapping[str, Any]) -> tuple[str, bool]:
        if group.text is not None:
            data = self._bytes(group.text)
            try:
                caption, repaired = data.decode(), False
            except UnicodeDecodeError:
                caption, repaired = data.decode(errors="replace"), True
        elif isinstance(meta.get("caption"), str):
            caption, repaired = _encodable(meta["caption"])
        else:
            raise _RejectedError("caption_missing", "no .txt, and no caption in the metadata")
        caption = caption.rstrip("\r\n")
        if not caption.strip():
            raise _RejectedError("caption_empty", "nothing but white space" if caption else "no text")
        limit = self.settings.max_caption_chars
        if limit is not None and len(caption) > limit:
            raise _RejectedError("caption_too_long", f"{len(caption):,} characters, more than {limit:,}")
        return caption, repaired

    def _uid(self, meta: Mapping[str, Any], digest: bytes, caption: str) -> str:
        given = meta.get("uid")
        if given is None:
            uid = pools.content_uid(digest, caption)
        else:
            uid = str(given).lower()
            if not pools.UID.fullmatch(uid):
                raise _RejectedError("uid_invalid", f"{str(given)[:80]!r} is not 32 hexadecimal digits")
        if uid in self._uids:
            raise _RejectedError("duplicate_uid", f"the uid {uid} is also that of key {self._uids[uid]}")
        return uid


def _group(index: tars.TarIndex) -> tuple[list[_Group], list[str]]:
    """Samples in the order of the tar, and the names of members that belong to none."""
    groups: list[_Group] = []
    unrelated: list[str] = []
    current: _Group | None = None
    members = index.members if index.cut is None else [*index.members, index.cut]
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        suffix = suffix.lower()
        if not stem or suffix not in _SUFFIXES:
            unrelated.append(_encodable(member.name)[0])
            continue
        key = (folder + slash + stem).removeprefix("./")
        kind = "image" if suffix in _IMAGES else "text" if suffix == "txt" else "json"
        if current is None or current.key != key or getattr(current, kind) is not None:
            current = _Group(key)
            groups.append(current)
        setattr(current, kind, member)
        current.cut = member is index.cut
    if index.fault is not None and current is not None and len(groups) > 1:
        # between two members nothing shows that a sample is cut, but what the one before had
        current.cut = current.cut or not current.kinds() >= groups[-2].kinds()
    return groups, unrelated


def _read_sidecar(url: str) -> dict[str, dict[str, Any]]:
    """The parquet's rows by key.

    Raises:
        PoolError: it cannot be read, or has no key column.
    """
    wanted = [
        "key",
        "uid",
        "caption",
        "url",
        "status",
        "error_message",
        "original_width",
        "original_height",
        "clip_b32_similarity_score",
        "clip_l14_similarity_score",
    ]
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
    for row in table.to_pylist():
        if row["key"] is None:
            raise PoolError(f"{url}: a row has no key. {remedy}")
        if rows.setdefault(str(row["key"]), row) is not row:
            raise PoolError(f"{url}: the key {row['key']} is in it twice. {remedy}")
    return rows


def _climbs(key: str) -> bool:
    return key.startswith("/") or "\\" in key or "\0" in key or ".." in key.split("/")


def _encodable(text: str) -> tuple[str, bool]:
    """The text with lone surrogates replaced, and whether there were any."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text), True
    return text, False


def _text_or_none(value: object) -> str | None:
    return None if value is None else _encodable(str(value))[0]


def _pixels_or_none(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 31 else None


def _score_or_none(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
