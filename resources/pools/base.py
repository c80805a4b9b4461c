"""The interface of raw pools: shards, rows, rejects, images and embeddings.

Each format has a module beside this one, and `resources.pools.formats` lists them. All return the tables below, so
downstream assets do not depend on the format. Samples seen = rows + rejects, always.

Reasons for which a sample is rejected:

| reason | the sample |
|---|---|
| unsafe_path | its path is absolute, contains `..` or a backslash |
| key_invalid | its key is not valid UTF-8 |
| shard_truncated | the tar ends or is damaged inside it |
| duplicate_key | its key occurred before in the shard (the first one stays) |
| image_missing | no member, file or column value is its image |
| image_empty | zero bytes |
| image_undecodable | the bytes are not JPEG, PNG, WEBP, GIF, BMP or AVIF, or are damaged |
| image_truncated | the image's data ends early |
| image_bomb | more than `max_pixels`, or a JPEG of very many scans; refused before it is decoded |
| image_too_thin | thinner than 1 : 200 |
| image_too_small | a side is under `min_side` |
| caption_missing | no .txt, and no caption in a sidecar, .json, table or column |
| caption_invalid | its caption is a number, a list or an object |
| caption_empty | nothing, or white space, control and zero-width characters only |
| caption_too_long | more than `max_caption_chars` |
| metadata_invalid | its .json cannot be read, and the sidecar does not have its uid |
| uid_invalid | its uid is not 32 hexadecimal digits (in any case, as a UUID with dashes, or as 16 bytes) |
| duplicate_uid | its uid occurred before in the shard (the first one stays) |
| download_failed | a sidecar row whose status is not success; nothing was stored |
| missing_from_tar | a sidecar row with status success and no members in the tar |
| missing_from_parquet | its key is not in the sidecar, which has the uids of the others, and its .json has no uid |
| embedding_not_finite | NaN or infinity in an embedding of an encoder in use |
| embedding_not_unit | the norm of such an embedding differs from 1 by more than 0.01 |

A caption that is not valid UTF-8 (or UTF-16 with a byte order mark) is no reason: it is repaired with replacement
characters, and `caption_repaired` is true (caption_bad_utf8 in other tools).

Captions are kept unchanged, except for a byte order mark and line ends at their end. The .txt is the caption; without
one, the sidecar's or .json's caption is. The uid is the sidecar's, else the .json's, else a hash of the content.
`resources.pools.samples` has the rules by which descriptions of one sample are joined.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from resources.pools.errors import PoolError as PoolError
from resources.pools.groups import TAR_STRIDE, ShardGroups
from resources.settings import EncoderSettings, PoolSettings
from resources.storage import files

RAW_POOL_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("f0", pa.uint64()),
        ("f1", pa.uint64()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("source_row", pa.int64()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("image_format", pa.string()),
        ("sha256", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("caption_repaired", pa.bool_()),
        ("clip_b32_similarity_score", pa.float32()),
        ("clip_l14_similarity_score", pa.float32()),
    ]
)

REJECTS_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

IMAGE_COLUMNS = ("key", "source_row", "image_offset", "image_size")
"""Columns of `raw_pool` by which a pool finds the images of rows."""

UID = re.compile(r"[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ShardRead:
    """The rows and rejects of one shard.

    Attributes:
        rows: accepted samples, in `RAW_POOL_SCHEMA`, in the order of the source.
        rejects: the others, in `REJECTS_SCHEMA`, in the order of the source.
        notes: remarks about the shard for the user, one sentence each.
        converted: `source_row` of each row whose image `resources.storage.images` converts to RGB.
    """

    rows: pa.Table
    rejects: pa.Table
    notes: list[str] = field(default_factory=list)
    converted: list[int] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Samples seen in the shard."""
        return self.rows.num_rows + self.rejects.num_rows


class Pool(Protocol):
    """A raw pool of any format.

    Pools are sent to decoding processes, so they can be pickled.

    Attributes:
        settings: the pool's settings.
        has_images: whether `read_images` works.
    """

    settings: PoolSettings
    has_images: bool

    def shard_files(self) -> dict[str, list[files.Listed]]:
        """Return the files of each shard by name, from the listing alone.

        Raises:
            PoolError: the folder or its shards are missing.
        """

    def list_shards(self) -> dict[str, str]:
        """Return the fingerprint of each shard by name, which follows from `shard_files`.

        Raises:
            PoolError: the folder or its shards are missing.
        """

    def read_shard(self, name: str) -> ShardRead:
        """Read one shard and check every sample in it.

        Raises:
            PoolError: the shard is missing or empty, or its files do not belong together.
        """

    def read_images(self, shard: str, rows: pa.Table) -> list[bytes | PoolError]:
        """Read the images of some rows of a shard.

        Args:
            shard: its name.
            rows: n rows of its `raw_pool`, with at least the columns in `IMAGE_COLUMNS`.

        Returns:
            The n images as stored; in place of an image that cannot be read, the error.

        Raises:
            PoolError: the pool has no images.
        """

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """Read a precomputed encoder's embeddings of `rows` (the shard's `raw_pool`, or some of it).

        Returns:
            Image and text, float16 [n, d], unit norm, row-aligned with `rows`.

        Raises:
            PoolError: the pool has none for that encoder, or the file changed.
        """


@runtime_checkable
class TarPool(Protocol):
    """A pool whose shards are tars, or groups of tars, so that the members of a sample can be copied.

    Attributes:
        groups: the recorded groups; None where every tar is a shard.
    """

    groups: ShardGroups | None

    def tars(self, shard: str) -> list[str]:
        """Return the paths or URLs of a shard's tars, in their order."""

    def record_groups(self) -> None:
        """Record the groups of new tars, so that they never change; nothing without `tars_per_shard`."""


def place_in_tar(image_offset: int) -> tuple[int, int]:
    """Return the number of the tar in its shard, and the byte in it, of an `image_offset`."""
    return divmod(image_offset, TAR_STRIDE)


@dataclass(frozen=True)
class PoolFormat:
    """The declaration of a pool format: `FORMAT` at the end of the format's module.

    Attributes:
        name: its name in the YAML.
        files: the files that a pool of this format holds, for messages and documentation.
        open: makes a pool of the settings and all encoders by name; reads nothing.
        has_images: whether the pool stores images.
        has_embeddings: whether the pool stores embeddings.
        has_tars: whether its shards are tars (`TarPool`), so that subsets can be exported.
        options: fields of `PoolSettings` that only some formats have, and this one does.
    """

    name: str
    files: str
    open: Callable[[PoolSettings, Mapping[str, EncoderSettings]], Pool]
    has_images: bool = False
    has_embeddings: bool = False
    has_tars: bool = False
    options: frozenset[str] = frozenset()


def content_uid(image_sha256: bytes, caption: str) -> str:
    """Return the uid of a sample that has none: sha256(sha256(image) + caption), its first 32 hexadecimal digits."""
    return hashlib.sha256(image_sha256 + caption.encode()).hexdigest()[:32]


def list_folder(settings: PoolSettings) -> list[files.Listed]:
    """List the files in the pool's folder; hidden files (such as macOS's `._00000.tar`) are left out.

    Raises:
        PoolError: the folder is missing.
    """
    try:
        return [file for file in files.list_folder(settings.path) if not file.name.startswith(".")]
    except FileNotFoundError as error:
        raise PoolError(
            f"the pool's folder {settings.path} does not exist. Set pool.path to the folder that "
            "holds the shards; a relative path starts at the config file."
        ) from error
    except NotADirectoryError as error:
        raise PoolError(
            f"the pool's path {settings.path} is a file. Set pool.path to the folder that holds it."
        ) from error


def fingerprints(shards: Mapping[str, Sequence[files.Listed]]) -> dict[str, str]:
    """Return the fingerprint of each shard's files."""
    return {name: files.fingerprint(listed) for name, listed in shards.items()}


def shard_name(stem: str) -> str:
    """Return the name of a shard: the file's stem, or a stand-in if that cannot be a partition key and file name.

    A shard with a stand-in is listed, so that it fails alone: reading it raises the error of `check_shard_name`.
    """
    if _SHARD_NAME.fullmatch(stem):
        return stem
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"unusable-name-{re.sub('[^A-Za-z0-9._-]+', '_', stem).strip('_')[:40]}-{digest}"


def check_shard_name(name: str, url: str) -> str:
    """Return the name of a shard, which must fit as partition key and file name.

    Raises:
        PoolError: it does not.
    """
    if not _SHARD_NAME.fullmatch(name):
        raise PoolError(
            f"{url}: the shard's name {name!r} must start with a letter or digit and contain only "
            "letters, digits, '.', '_' and '-'. Rename the file."
        )
    return name


def rejects_table(shard: str, rejects: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rejects in `REJECTS_SCHEMA`, in the order of the source."""
    ordered = sorted(rejects, key=lambda reject: reject["source_row"])
    return pa.Table.from_pylist([{"shard": shard, **row} for row in ordered], REJECTS_SCHEMA)


def empty_shard(name: str, url: str) -> PoolError:
    """Return the error of a shard without samples."""
    return PoolError(f"empty shard {name}: there is no sample in {url}. Remove the file, or write it again.")


def no_embeddings(settings: PoolSettings, shard: str, rows: pa.Table, encoder_name: str) -> PoolError:
    """Return the error of a pool that carries no embeddings."""
    return PoolError(
        f"the {settings.format} pool {settings.path} carries no embeddings for {encoder_name} "
        f"({shard}, {rows.num_rows} rows)"
    )
