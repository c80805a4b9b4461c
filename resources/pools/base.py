"""What a raw pool is to the rest of the project: shards, rows, rejects and embeddings.

The formats are read in `pools_webdataset` and `pools_datacomp`; both give the tables below, so
that nothing downstream knows where a sample came from. Samples seen = rows + rejects, always.

Every reason for which a sample is rejected:

| reason | the sample |
|---|---|
| unsafe_path | its members' path is absolute, climbs with `..` or has a backslash |
| key_invalid | its key is not valid UTF-8 |
| shard_truncated | the tar ends or is damaged inside it |
| duplicate_key | its key came before in the shard (the first one stays) |
| image_missing | no .jpg, .jpeg, .png, .webp, .gif or .bmp member |
| image_empty | zero bytes |
| image_undecodable | not JPEG, PNG, WEBP, GIF or BMP, whatever its name, or damaged |
| image_truncated | the image's data ends early |
| image_bomb | more than `max_pixels`, or thinner than 1 : 200; refused before it is decoded |
| image_too_small | a side is under `min_side` |
| caption_missing | no .txt, and no caption in the sidecar or .json either |
| caption_empty | nothing, or white space only |
| caption_too_long | more than `max_caption_chars` |
| metadata_invalid | its .json cannot be read (and no sidecar row stands in for it) |
| uid_invalid | its uid is not 32 hexadecimal digits |
| duplicate_uid | its uid came before in the shard (the first one stays) |
| download_failed | a sidecar row whose status is not success; nothing was stored |
| missing_from_tar | a sidecar row with status success and no members in the tar |
| embedding_not_finite | NaN or infinity in an embedding of an encoder in use |
| embedding_not_unit | the norm of such an embedding differs from 1 by more than 0.01 |

Not a reason: a caption that is not valid UTF-8 is repaired with replacement characters, and
`caption_repaired` says so (caption_bad_utf8 in other tools).

Captions are kept as they are, less line ends at their end. The .txt is the caption; without one,
the sidecar's or .json's caption is. The uid is the sidecar's, else the .json's, else the content's.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from core.errors import UserError
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

UID = re.compile(r"[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PoolError(UserError, ValueError):
    """A pool or a shard cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class ShardRead:
    """One shard, read.

    Attributes:
        rows: accepted samples, in `RAW_POOL_SCHEMA`, in the order of the source.
        rejects: the others, in `REJECTS_SCHEMA`, in the order of the source.
        notes: what a person should know about the shard, one sentence each.
        samples: how many samples were seen: rows plus rejects.
    """

    rows: pa.Table
    rejects: pa.Table
    notes: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Samples seen in the shard."""
        return self.rows.num_rows + self.rejects.num_rows


class Pool(Protocol):
    """A raw pool, whatever its format."""

    settings: PoolSettings

    def list_shards(self) -> dict[str, str]:
        """Name of each shard to its fingerprint, from the listing alone.

        Raises:
            PoolError: no such folder, no shard in it, or a name that cannot be a partition.
        """

    def read_shard(self, name: str) -> ShardRead:
        """Read one shard and check every sample in it.

        Raises:
            PoolError: no such shard, an empty one, or files that do not belong together.
        """

    def image_url(self, name: str) -> str:
        """The file in which a shard's image_offset and image_size point.

        Raises:
            PoolError: the pool has no images.
        """

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """A precomputed encoder's embeddings of `rows` (the shard's raw_pool, or some of it).

        Returns:
            image and text, float16 [n, d], unit norm, row for row as `rows`.

        Raises:
            PoolError: the pool has none for that encoder, or the file changed.
        """


def open_pool(settings: PoolSettings, encoders: Mapping[str, EncoderSettings]) -> Pool:
    """The reader for a pool's format. Nothing is read yet.

    Args:
        settings: the pool.
        encoders: all encoders by name; the precomputed ones tell which embeddings to check.

    Raises:
        PoolError: an encoder needs what this format has not (images, or embeddings).
    """
    if settings.format == "webdataset":
        from resources.pools.webdataset import WebdatasetPool

        for name, encoder in encoders.items():
            if encoder.precomputed is not None:
                raise PoolError(
                    f"encoder {name} is precomputed, but the webdataset pool {settings.path} "
                    "carries no embeddings. Give the encoder a `model` and drop `precomputed`, or "
                    "set the pool's format to datacomp."
                )
        return WebdatasetPool(settings)
    from resources.pools.datacomp import DatacompPool

    for name, encoder in encoders.items():
        if encoder.precomputed is None:
            raise PoolError(
                f"encoder {name} has a model only, but the datacomp pool {settings.path} carries "
                "no images. Set `precomputed` to the embeddings it is to read (such as b32)."
            )
    return DatacompPool(settings, encoders)


def content_uid(image_sha256: bytes, caption: str) -> str:
    """Make a uid where a sample brings none: sha256(sha256(image) + caption), 32 hex digits."""
    return hashlib.sha256(image_sha256 + caption.encode()).hexdigest()[:32]


def list_folder(settings: PoolSettings) -> list[files.Listed]:
    """The pool's folder.

    Raises:
        PoolError: there is none.
    """
    try:
        return files.list_folder(settings.path)
    except FileNotFoundError as error:
        raise PoolError(
            f"the pool's folder {settings.path} does not exist. Set pool.path to the folder that "
            "holds the shards; a relative path starts at the config file."
        ) from error
    except NotADirectoryError as error:
        raise PoolError(
            f"the pool's path {settings.path} is a file. Set pool.path to the folder that holds it."
        ) from error


def check_shard_name(name: str, url: str) -> str:
    """The name, if it can be a partition key and a file name.

    Raises:
        PoolError: it cannot.
    """
    if not _SHARD_NAME.fullmatch(name):
        raise PoolError(
            f"{url}: the shard's name {name!r} must begin with a letter or digit and hold only "
            "letters, digits, '.', '_' and '-'. Rename the file."
        )
    return name


def rejects_table(shard: str, rejects: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rejects in `REJECTS_SCHEMA`, in the order of the source."""
    ordered = sorted(rejects, key=lambda reject: reject["source_row"])
    return pa.Table.from_pylist([{"shard": shard, **row} for row in ordered], REJECTS_SCHEMA)


def empty_shard(name: str, url: str) -> PoolError:
    """The error for a shard in which there is no sample at all."""
    return PoolError(f"empty shard {name}: there is no sample in {url}. Remove the file, or write it again.")
