"""The format `datacomp`: metadata in Parquet with row-aligned embeddings in npz, and no images.

Three layouts are known:

| | DataComp | dataset2metadata | clip-retrieval |
|---|---|---|---|
| rows | <shard>.parquet | <shard>.parquet | metadata_<shard>.parquet |
| arrays | <shard>.npz | <shard>.npz | img_emb_<shard>.npy, text_emb_<shard>.npy |
| image, text of `b32` | b32_img, b32_txt | oai-clip-vit-b32-image, -text | the only ones |
| caption | text | caption | caption |

clip-retrieval's files may be in its folders metadata, img_emb and text_emb. Without a column `key` the key is the row's
number; width and height are those of the original. Without a `uid` it is a hash of the caption and the column sha256
(else the url's SHA-256, else the image path's).
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resources.pools import base as pools
from resources.pools.base import PoolError, PoolFormat, ShardRead
from resources.pools.datacomp_columns import flat, read_columns
from resources.pools.samples import nothing_usable
from resources.pools.stored_scores import require_same_order, sampled_rows, score_column
from resources.settings import EncoderSettings, PoolSettings, PrecomputedKeys
from resources.storage import files
from resources.storage.arrays import ArrayError, ArrayStream, array_names, open_array

_NORM_TOLERANCE = 0.01
_RETRIEVAL = re.compile(r"(metadata|img_emb|text_emb)_([^.]+)\.(parquet|npy)")
_FOLDERS = ("metadata", "img_emb", "text_emb")


@dataclass(slots=True)
class _Parts:
    """The files of a shard, and the stem of their names."""

    stem: str
    parquet: files.Listed | None = None
    npz: files.Listed | None = None
    image: files.Listed | None = None
    text: files.Listed | None = None

    def all(self) -> list[files.Listed]:
        found = (self.parquet, self.npz, self.image, self.text)
        return [file for file in found if file is not None]


@dataclass(slots=True)
class _Faults:
    """The first reason found against each row."""

    reasons: np.ndarray
    details: dict[int, str] = field(default_factory=dict)

    @property
    def good(self) -> np.ndarray:
        return self.reasons == ""

    def add(self, bad: np.ndarray, reason: str, detail: str | Callable[[int], str]) -> None:
        """Reject the rows in `bad` (bool [n]) that are not rejected yet; `detail` may depend on the row."""
        for row in np.flatnonzero(bad & self.good).tolist():
            self.reasons[row] = reason
            self.details[row] = detail if isinstance(detail, str) else detail(row)


class DatacompPool:
    """A folder of metadata with embeddings. See `pools.Pool`."""

    has_images = False

    def __init__(self, settings: PoolSettings, encoders: Mapping[str, EncoderSettings]) -> None:
        self.settings = settings
        self.encoders = {
            name: encoder.precomputed for name, encoder in encoders.items() if encoder.precomputed is not None
        }

    def _shards(self) -> dict[str, _Parts]:
        listed = pools.list_folder(self.settings)
        for folder in _FOLDERS:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                inside = files.list_folder(f"{self.settings.path.rstrip('/')}/{folder}")
                listed += [file for file in inside if not file.name.startswith(".")]
        shards: dict[str, _Parts] = {}
        for file in listed:
            retrieval = _RETRIEVAL.fullmatch(file.name)
            stem, _, suffix = file.name.rpartition(".")
            if retrieval is not None:
                stem = retrieval[2]
                kind = {"metadata": "parquet", "img_emb": "image", "text_emb": "text"}[retrieval[1]]
            elif suffix in ("parquet", "npz"):
                kind = suffix
            else:
                continue
            parts = shards.setdefault(pools.shard_name(stem), _Parts(stem))
            if getattr(parts, kind) is not None:
                raise PoolError(
                    f"shard {stem} is there twice: {getattr(parts, kind).url} and {file.url}. "
                    "Keep one of them in the folder."
                )
            setattr(parts, kind, file)
        if not shards:
            raise PoolError(
                f"no shards: there is no *.parquet in {self.settings.path}. Set pool.path to a "
                "folder of parquet and npz files, or pool.format to webdataset for tars."
            )
        return dict(sorted(shards.items()))

    def shard_files(self) -> dict[str, list[files.Listed]]:
        """See `pools.Pool`."""
        return {name: parts.all() for name, parts in self._shards().items()}

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        return pools.fingerprints(self.shard_files())

    def read_images(self, shard: str, rows: pa.Table) -> list[bytes | PoolError]:
        """See `pools.Pool`: there are none."""
        raise PoolError(
            f"shard {shard}, {rows.num_rows} rows: the datacomp pool {self.settings.path} carries no images. Set the "
            "encoder's `precomputed`, or point pool.path at the downloaded tars."
        )

    def _parts(self, name: str) -> _Parts:
        parts = self._shards().get(name)
        if parts is None:
            raise PoolError(f"there is no shard {name} in {self.settings.path}")
        pools.check_shard_name(parts.stem, parts.all()[0].url)
        if parts.parquet is None:
            raise PoolError(f"{parts.all()[0].url} has no parquet beside it. Download it, or remove the file.")
        return parts

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`."""
        parts = self._parts(name)
        assert parts.parquet is not None
        columns, sources, notes = read_columns(parts.parquet.url)
        total = len(columns["caption"])
        if total == 0:
            raise pools.empty_shard(name, parts.parquet.url)
        captions, repaired = _utf8(columns["caption"])
        columns["caption"] = pc.utf8_rtrim(pc.utf8_ltrim(captions, characters="\ufeff"), characters="\r\n")
        for column in ("uid", "key", "url", "sha256", "image_path"):
            columns[column] = _utf8(columns[column])[0]

        faults = _Faults(np.full(total, "", dtype=object))
        self._judge_captions(columns["caption"], faults)
        self._judge_sizes(columns, faults)
        notes += self._judge_embeddings(name, parts, columns, sources, faults)
        uids = _uids(columns, faults)
        fields = _fields(uids)

        kept = np.flatnonzero(faults.good)
        keys = _keys(columns["key"])
        nothing = pa.nulls(total)
        whole = {
            "uid": pa.array(uids, pa.string()),
            "f0": fields[0],
            "f1": fields[1],
            "shard": pa.array([name]).take(pa.array(np.zeros(total, np.int64))),
            "key": keys,
            "source_row": np.arange(total),
            "caption": columns["caption"],
            "url": columns["url"],
            "width": columns["width"],
            "height": columns["height"],
            "original_width": columns["width"],
            "original_height": columns["height"],
            "image_format": nothing,
            "sha256": columns["sha256"],
            "image_offset": nothing,
            "image_size": nothing,
            "caption_repaired": repaired,
            "clip_b32_similarity_score": columns["clip_b32_similarity_score"],
            "clip_l14_similarity_score": columns["clip_l14_similarity_score"],
        }
        rows = pa.table(
            [
                pa.chunked_array([flat(whole[wanted.name]).take(pa.array(kept))]).cast(wanted.type)
                for wanted in pools.RAW_POOL_SCHEMA
            ],
            schema=pools.RAW_POOL_SCHEMA,
        )
        rejects = [
            {
                "key": keys[row].as_py(),
                "source_row": row,
                "reason": faults.reasons[row],
                "detail": faults.details[row],
            }
            for row in np.flatnonzero(~faults.good).tolist()
        ]
        rejected = pools.rejects_table(name, rejects)
        return ShardRead(rows, rejected, [*notes, *nothing_usable(rows.num_rows, rejected)])

    def _judge_captions(self, captions: pa.Array, faults: _Faults) -> None:
        missing = _bools(pc.is_null(captions))
        faults.add(missing, "caption_missing", "the caption is null")
        empty = ~_bools(pc.match_substring_regex(captions, r"[^\s\p{Z}\p{Cc}\p{Cf}]"))
        faults.add(empty, "caption_empty", "nothing that is visible")
        limit = self.settings.max_caption_chars
        if limit is not None:
            lengths = pc.utf8_length(captions)
            faults.add(
                _bools(pc.greater(lengths, limit)),
                "caption_too_long",
                lambda row: f"{lengths[row].as_py():,} characters, more than {limit:,}",
            )

    def _judge_sizes(self, columns: Mapping[str, pa.Array], faults: _Faults) -> None:
        width, height = columns["width"], columns["height"]
        faults.add(
            _bools(pc.less(pc.min_element_wise(width, height), self.settings.min_side)),
            "image_too_small",
            lambda row: f"{width[row]} x {height[row]} px, a side under {self.settings.min_side}",
        )

    def _judge_embeddings(
        self,
        name: str,
        parts: _Parts,
        columns: Mapping[str, pa.Array],
        sources: Mapping[str, str | None],
        faults: _Faults,
    ) -> list[str]:
        """Check finiteness and norm of every embedding in use, 16 MB at a time, and the order of the rows."""
        notes = []
        total = len(columns["caption"])
        sample = sampled_rows(total)
        for encoder in self.encoders:
            dimensions, sampled = {}, []
            arrays = self._arrays(parts, encoder)
            for url, key in arrays:
                with _opened(url, key, parts, total) as stream:
                    dimensions[stream.where] = stream.shape[1]
                    norms, some = _norms(stream, sample)
                sampled.append(some)
                where = stream.where
                faults.add(
                    ~np.isfinite(norms),
                    "embedding_not_finite",
                    f"NaN or infinity in {where}",
                )
                off = np.isfinite(norms) & (np.abs(norms - 1) > _NORM_TOLERANCE)
                faults.add(
                    off,
                    "embedding_not_unit",
                    _norm_of(norms, where),
                )
                if off.mean() > 0.5:
                    notes.append(f"most of {where} is not of unit norm: normalise it")
            if len(set(dimensions.values())) > 1:
                raise PoolError(
                    f"the image and text embeddings of encoder {encoder} differ in length "
                    f"({dimensions}). Set `precomputed` to two arrays of one encoder."
                )
            column = score_column(*(key for _, key in arrays))
            if column is not None and sources.get(column) is not None:
                assert parts.parquet is not None
                require_same_order(
                    columns[column].take(pa.array(sample)).to_numpy(zero_copy_only=False),
                    *sampled,
                    uids=columns["uid"].take(pa.array(sample)).to_pylist(),
                    where=f"shard {name}: {parts.parquet.url} and {arrays[0][0]}",
                    column=str(sources[column]),
                )
        return notes

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`."""
        parts = self._parts(name)
        wanted = rows["source_row"].to_numpy()
        both = []
        for url, key in self._arrays(parts, encoder_name):
            with _opened(url, key, parts, None) as stream:
                if len(wanted) and wanted.max() >= stream.shape[0]:
                    raise PoolError(
                        f"{stream.where} has {stream.shape[0]:,} rows, and row {wanted.max():,} is "
                        "wanted: the file changed after it was read. Materialize raw_pool again."
                    )
                out = np.empty((len(wanted), stream.shape[1]), np.float16)
                start = 0
                for block in _blocks(stream):
                    here = np.flatnonzero((wanted >= start) & (wanted < start + len(block)))
                    out[here] = block[wanted[here] - start]
                    start += len(block)
            both.append(out)
        return both[0], both[1]

    def _arrays(self, parts: _Parts, encoder: str) -> list[tuple[str, str | None]]:
        """Return the places of an encoder's image and text arrays: file, and name in it."""
        keys = self.encoders[encoder]
        if parts.image is not None and parts.text is not None:
            return [(parts.image.url, None), (parts.text.url, None)]
        assert parts.parquet is not None
        if parts.npz is None:
            raise PoolError(
                f"{parts.parquet.url} has no npz (nor img_emb and text_emb .npy) beside it for "
                f"encoder {encoder}. Download it, or remove the parquet."
            )
        with _as_pool_error():
            names = array_names(parts.npz.url)
        pairs = (
            [(keys.image, keys.text)]
            if isinstance(keys, PrecomputedKeys)
            else [
                (f"{keys}_img", f"{keys}_txt"),
                (f"oai-clip-vit-{keys}-image", f"oai-clip-vit-{keys}-text"),
            ]
        )
        for image, text in pairs:
            if image in names and text in names:
                return [(parts.npz.url, image), (parts.npz.url, text)]
        raise PoolError(
            f"{parts.npz.url} has no embeddings for encoder {encoder}: looked for "
            f"{' or '.join(f'{image} and {text}' for image, text in pairs)}, found "
            f"{', '.join(names) or 'nothing'}. Set the encoder's `precomputed` to a prefix that is "
            "there, or to {image: <name>, text: <name>}."
        )


@contextlib.contextmanager
def _as_pool_error() -> Iterator[None]:
    try:
        yield
    except ArrayError as error:
        raise PoolError(str(error)) from error


@contextlib.contextmanager
def _opened(url: str, key: str | None, parts: _Parts, total: int | None) -> Iterator[ArrayStream]:
    """Open an array, and check that it holds embeddings and has `total` rows."""
    assert parts.parquet is not None
    with _as_pool_error(), open_array(url, key) as stream:
        if len(stream.shape) != 2 or stream.dtype.kind != "f":
            raise PoolError(
                f"{stream.where} is {stream.dtype} of shape {stream.shape}, and embeddings are "
                "floating-point numbers [rows, d]. Set the encoder's `precomputed` to them."
            )
        if total is not None and stream.shape[0] != total:
            raise PoolError(
                f"{parts.parquet.url} has {total:,} rows and {stream.where} has "
                f"{stream.shape[0]:,}; rows are matched by position, so none can be trusted. Download "
                "both again."
            )
        yield stream


def _norm_of(norms: np.ndarray, where: str) -> Callable[[int], str]:
    return lambda row: f"norm {norms[row]:.4f} in {where}"


def _norms(stream: ArrayStream, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of an array's rows, float32 `[n]`, and some of its rows, float32 `[len(rows), d]`."""
    norms, some, start = [], [], 0
    for block in _blocks(stream):
        norms.append(np.linalg.norm(block.astype(np.float32), axis=1))
        here = rows[(rows >= start) & (rows < start + len(block))]
        some.append(block[here - start].astype(np.float32))
        start += len(block)
    return np.concatenate(norms), np.concatenate(some)


def _blocks(stream: ArrayStream) -> Iterator[np.ndarray]:
    with _as_pool_error():
        yield from stream.blocks()


def _bools(array: pa.Array) -> np.ndarray:
    """Return a mask as a numpy array, null as false."""
    return np.asarray(pc.fill_null(array, False))


def _utf8(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return the strings with invalid UTF-8 replaced, and a mask of the replaced ones."""
    repaired = np.zeros(len(column), bool)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        for row, data in enumerate(column.cast(pa.binary()).to_pylist()):
            text = None if data is None else data.decode(errors="replace")
            repaired[row] = text is not None and text.encode() != data
            texts.append(text)
        column = pa.array(texts, pa.string())
    return column, repaired


def _keys(column: pa.Array) -> pa.Array:
    if column.null_count:
        return pc.coalesce(column, pa.array(np.arange(len(column))).cast(pa.string()))
    return column


def _uids(columns: Mapping[str, pa.Array], faults: _Faults) -> list[str | None]:
    """Return the uid of each good row; rows without a valid uid, or with one that occurred before, are rejected."""
    given = pc.utf8_lower(columns["uid"])
    uids = given.to_pylist()
    valid = _bools(pc.match_substring_regex(given, f"^{pools.UID.pattern}$"))
    missing = _bools(pc.is_null(given)) & faults.good
    faults.add(
        ~valid & ~missing,
        "uid_invalid",
        lambda row: f"{str(uids[row])[:80]!r} is not 32 hexadecimal digits",
    )
    for row in np.flatnonzero(missing).tolist():
        digest = _image_digest(columns, row)
        if digest is not None:
            uids[row] = pools.content_uid(digest, columns["caption"][row].as_py())
            missing[row] = False
    faults.add(missing, "uid_invalid", "no uid, and no sha256 or url to make one of")
    codes = flat(pa.array(uids, pa.string()).dictionary_encode().indices)
    codes = np.asarray(pc.fill_null(codes, -1))
    good = np.flatnonzero(faults.good)
    first = np.zeros(len(uids), bool)
    first[good[np.unique(codes[good], return_index=True)[1]]] = True
    faults.add(~first, "duplicate_uid", lambda row: f"the uid {uids[row]} came before")
    return uids


def _image_digest(columns: Mapping[str, pa.Array], row: int) -> bytes | None:
    stated = columns["sha256"][row].as_py()
    if stated is not None and re.fullmatch(r"[0-9a-fA-F]{64}", stated):
        return bytes.fromhex(stated)
    for column in ("url", "image_path"):
        place = columns[column][row].as_py()
        if place is not None:
            return hashlib.sha256(place.encode()).digest()
    return None


def _fields(uids: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return f0 and f1 of each uid, uint64 [n]; 0 where there is none (the row is rejected)."""
    halves = np.zeros((len(uids), 2), np.uint64)
    for row, uid in enumerate(uids):
        if uid is not None and pools.UID.fullmatch(uid):
            halves[row] = int(uid[:16], 16), int(uid[16:], 16)
    return halves[:, 0].copy(), halves[:, 1].copy()


FORMAT = PoolFormat(
    name="datacomp",
    files="metadata with embeddings and no images (DataComp, dataset2metadata, clip-retrieval)",
    has_embeddings=True,
    open=DatacompPool,
)
