"""Rules that all pool formats share: joining descriptions of one sample, and checking a sample's parts.

A sample may be described in several places (a Parquet file, a .json, a table). Each field has the first value that is
not null, in the format's order of places. Places are joined by key; uids and keys have several spellings.

Here: keys, captions, images and uids, and the reasons for rejecting them (the table is in `resources.pools.base`).
Not here: how a format finds a sample's parts.
"""

import codecs
import decimal
import hashlib
import math
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from resources.pools import base
from resources.settings import PoolSettings
from resources.storage import images
from resources.storage.tar_samples import IMAGE_SUFFIXES

METADATA = (
    "url",
    "uid",
    "original_width",
    "original_height",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
)
"""Fields of a sample's metadata that become columns of `raw_pool`."""

_DASHED = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INVISIBLE = frozenset({"Cc", "Cf"})
_NUMBER = re.compile(r"0*([0-9]+?)(\.0+)?")


class RejectedError(ValueError):
    """A sample cannot be used.

    Attributes:
        reason: one of the reasons in `resources.pools.base`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A decoded image: its SHA-256, and either its size and format or its fault."""

    sha256: bytes
    size: int
    facts: images.ImageFacts | None = None
    fault: images.ImageError | None = None


def check_image(data: bytes, max_pixels: int) -> CheckedImage:
    """Hash and decode an image. Safe to call from several threads, which decode in parallel."""
    digest = hashlib.sha256(data).digest()
    try:
        return CheckedImage(digest, len(data), facts=images.check(data, max_pixels))
    except images.ImageError as fault:
        return CheckedImage(digest, len(data), fault=fault)


class ShardSamples:
    """The rows and rejects of one shard while it is read.

    Args:
        shard: its name.
        settings: limits on sizes and captions.
    """

    def __init__(self, shard: str, settings: PoolSettings) -> None:
        self.shard = shard
        self.settings = settings
        self.keys: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[dict[str, Any]] = []
        self._uids: dict[str, str] = {}
        self._converted: list[int] = []

    @property
    def seen(self) -> int:
        """Number of samples so far, which is the `source_row` of the next one."""
        return len(self._rows) + len(self._rejects)

    def add(self, key: str, build: Callable[[], dict[str, Any]]) -> None:
        """Add a sample: the row that `build` returns, or a reject if it raises `RejectedError`."""
        try:
            row = build()
        except RejectedError as rejected:
            self.reject(key, rejected)
        else:
            self._uids[row["uid"]] = key
            self._rows.append({**row, "shard": self.shard, "source_row": self.seen})
        self.keys.add(key)

    def reject(self, key: str, rejected: RejectedError) -> None:
        """Add a sample that cannot be used."""
        self._rejects.append(
            {
                "key": encodable(key)[0],
                "source_row": self.seen,
                "reason": rejected.reason,
                "detail": encodable(rejected.detail)[0],
            }
        )

    def row(
        self,
        key: str,
        image: CheckedImage,
        caption: object,
        metadata: Mapping[str, Any],
        *,
        offset: int | None = None,
    ) -> dict[str, Any]:
        """Return a row of `raw_pool` without its shard and place.

        Args:
            key: the sample's key.
            image: its image.
            caption: its caption, which `caption_text` decodes; None or NaN if there is none.
            metadata: the fields in `METADATA`, as far as the pool has them.
            offset: place of the image's bytes in the shard's tar, for formats that have one.

        Raises:
            RejectedError: caption, image or uid cannot be used.
        """
        text, repaired = self._caption(caption)
        if image.fault is not None:
            raise RejectedError(image.fault.reason, image.fault.detail)
        facts = image.facts
        assert facts is not None
        if min(facts.width, facts.height) < self.settings.min_side:
            raise RejectedError(
                "image_too_small",
                f"{facts.width} x {facts.height} px, a side under {self.settings.min_side}",
            )
        uid = self._uid(metadata.get("uid"), image.sha256, text)
        if facts.converted:
            self._converted.append(self.seen)
        return {
            "uid": uid,
            "f0": int(uid[:16], 16),
            "f1": int(uid[16:], 16),
            "key": key,
            "caption": text,
            "url": _text_or_none(metadata.get("url")),
            "width": facts.width,
            "height": facts.height,
            "original_width": pixels_or_none(metadata.get("original_width")),
            "original_height": pixels_or_none(metadata.get("original_height")),
            "image_format": facts.format,
            "sha256": image.sha256.hex(),
            "image_offset": offset,
            "image_size": image.size,
            "caption_repaired": repaired,
            "clip_b32_similarity_score": score_or_none(metadata.get("clip_b32_similarity_score")),
            "clip_l14_similarity_score": score_or_none(metadata.get("clip_l14_similarity_score")),
        }

    def result(self, notes: list[str]) -> base.ShardRead:
        """Return the shard's rows and rejects."""
        rows = pa.Table.from_pylist(self._rows, base.RAW_POOL_SCHEMA)
        rejects = base.rejects_table(self.shard, self._rejects)
        return base.ShardRead(rows, rejects, [*notes, *nothing_usable(rows.num_rows, rejects)], self._converted)

    def _caption(self, given: object) -> tuple[str, bool]:
        if given is None or given != given:
            raise RejectedError("caption_missing", "no .txt, and no caption in the metadata")
        if not isinstance(given, str | bytes):
            raise RejectedError("caption_invalid", f"the caption is {described(given)}, not text")
        caption, repaired = caption_text(given)
        if not is_visible(caption):
            raise RejectedError("caption_empty", "nothing that is visible" if caption else "no text")
        limit = self.settings.max_caption_chars
        if limit is not None and len(caption) > limit:
            raise RejectedError("caption_too_long", f"{len(caption):,} characters, more than {limit:,}")
        return caption, repaired

    def _uid(self, given: object, digest: bytes, caption: str) -> str:
        if is_null(given):
            uid = base.content_uid(digest, caption)
        else:
            parsed = normal_uid(given)
            if parsed is None:
                raise RejectedError("uid_invalid", f"{str(given)[:80]!r} is not 32 hexadecimal digits")
            uid = parsed
        if uid in self._uids:
            raise RejectedError("duplicate_uid", f"the uid {uid} is also that of key {self._uids[uid]}")
        return uid


def is_null(value: object) -> bool:
    """Return whether a value of a description states nothing: None, NaN (pandas' null), or a blank string."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def merge_descriptions(*places: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first value of each field that is not None or NaN.

    Args:
        places: the descriptions of one sample, the most trusted first.
    """
    merged: dict[str, Any] = {}
    for place in places:
        for name, value in place.items():
            if merged.get(name) is None and value == value:
                merged[name] = value
    return merged


def normal_uid(value: object) -> str | None:
    """Return a uid as 32 lower-case hexadecimal digits, or None if the value is not a uid.

    Accepts text in any case, with the dashes of a UUID and with white space around it; 16 bytes; and `uuid.UUID`.
    Integers are refused: their digits could be read as hexadecimal ones.
    """
    if isinstance(value, uuid.UUID):
        return value.hex
    if isinstance(value, bytes) and len(value) == 16:
        return value.hex()
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return None
    text = value.strip().lower()
    if _DASHED.fullmatch(text):
        text = text.replace("-", "")
    return text if base.UID.fullmatch(text) else None


def normal_key(key: str) -> str:
    """Return a key without folders, image suffix and leading zeros: `00000/000000012`, `12` and `12.0` are one key."""
    name = key.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    if suffix.lower() in IMAGE_SUFFIXES:
        name = stem
    number = _NUMBER.fullmatch(name)
    return name if number is None else number[1]


def match_keys(samples: Iterable[str], described: Collection[str]) -> dict[str, str]:
    """Match the keys of samples to the keys of their descriptions.

    A key matches the same key, else the only one that `normal_key` makes the same.

    Returns:
        The description's key by the sample's, for the samples that have one.
    """
    ours = list(dict.fromkeys(samples))
    found = {key: key for key in ours if key in described}
    if len(found) == len(ours):
        return found
    sides = [Counter(map(normal_key, keys)) for keys in (ours, described)]
    by_normal = {normal: key for key in described if sides[1][normal := normal_key(key)] == 1}
    for key in ours:
        other = by_normal.get(normal_key(key))
        if key not in found and other is not None and sides[0][normal_key(key)] == 1:
            found[key] = other
    return found


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return a column's values; strings that are no UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.binary()).to_pylist()


def caption_text(given: str | bytes) -> tuple[str, bool]:
    """Return a caption without byte order mark and line ends at its end, and whether it was repaired.

    Bytes are UTF-8, or UTF-16 if they start with its byte order mark. Invalid bytes become replacement characters.
    """
    if isinstance(given, bytes):
        encoding = "utf-16" if given.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
        try:
            caption, repaired = given.decode(encoding), False
        except UnicodeDecodeError:
            caption, repaired = given.decode(encoding, errors="replace"), True
    else:
        caption, repaired = encodable(given)
    return caption.removeprefix("\ufeff").rstrip("\r\n"), repaired


def is_visible(caption: str) -> bool:
    """Return whether a caption has more than white space, control characters and zero-width characters."""
    return any(not character.isspace() and unicodedata.category(character) not in _INVISIBLE for character in caption)


def described(value: object) -> str:
    """Return the kind of a value that is not text, for a message."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"{value!r} ({type(value).__name__})"[:80]


def nothing_usable(rows: int, rejects: pa.Table) -> list[str]:
    """Return a note if a shard has rejects and no row: how many of each reason, and the details of the first."""
    if rows or not rejects.num_rows:
        return []
    counts = Counter(rejects["reason"].to_pylist()).most_common()
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    return [f"no sample of this shard is usable: {reasons} (the first: {rejects['detail'][0]})"]


def encodable(text: str) -> tuple[str, bool]:
    """Return the text with lone surrogates replaced, and whether there were any."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text), True
    return text, False


def shown(names: list[str], limit: int = 5) -> str:
    """Return the first names and the number of the others, for a note."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(encodable(name)[0] for name in names[:limit]) + more


def _text_or_none(value: object) -> str | None:
    return None if value is None else encodable(str(value))[0]


def pixels_or_none(value: object) -> int | None:
    """Return a width or height, or None if the value is none."""
    number = _number_or_none(value)
    return int(number) if number is not None and 0 <= number < 1 << 31 else None


def score_or_none(value: object) -> float | None:
    """Return a finite number, or None if the value is none."""
    return _number_or_none(value)


def _number_or_none(value: object) -> float | None:
    """Return a finite number, also from text and decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | decimal.Decimal):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
