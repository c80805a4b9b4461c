"""Pictures and tokens of an evaluation's samples, decoded once for all runs.

Here: the arrays in an evaluation's work folder, and the small pictures by which near duplicates are found. Not here:
which samples (assets.evaluations.arms) and what trains on them (`resources.training.process`).

A shard's rows are written and then listed in `decoded.txt`, so a killed run decodes only the shards that are left.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from core.errors import UserError
from resources.pools.base import IMAGE_COLUMNS, Pool, PoolError
from resources.settings import available_cores
from resources.storage.images import ImageError, picture

THUMB = 16
"""Pixels of a side of the pictures that are compared."""
_TOGETHER = 512
DECODED = "decoded.txt"
"""File of a work folder that lists the shards whose rows are decoded."""


class EvaluationError(UserError, RuntimeError):
    """An evaluation cannot run; the message has the remedy."""


@dataclass(frozen=True)
class Decoder:
    """Decodes pictures for a model, and to the size at which they are compared.

    Attributes:
        size: pixels of a side of the model's input; None where only the small pictures are wanted.
        transform: open_clip's resizing and cropping, without its normalisation.
    """

    size: int | None
    transform: Any = None

    @classmethod
    def of(cls, size: int | None) -> "Decoder":
        """Return the decoder for a model's input."""
        if size is None:
            return cls(None)
        import open_clip

        return cls(size, open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1)))

    def __call__(self, data: bytes, max_pixels: int | None = None) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the picture, uint8 [3, size, size], and its small one, float16 [3 · 16 · 16].

        Raises:
            ImageError: the bytes are no picture.
        """
        image = picture(data, max_pixels)
        whole = None if self.size is None else (self.transform(image) * 255).round().byte().numpy()
        return whole, small_picture(image)


def small_picture(image: Any) -> np.ndarray:
    """Return a picture at 16 x 16 pixels, less its mean colour and of unit norm, float16 [768].

    A picture that deviates from one colour by less than a level is zeros, and like no other.
    """
    from PIL import Image

    values = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), np.float32)
    values = (values - values.mean(axis=(0, 1))).ravel()
    norm = np.linalg.norm(values)
    found: np.ndarray = (values / norm if norm >= len(values) ** 0.5 else np.zeros_like(values)).astype(np.float16)
    return found


def decode_samples(
    pool: Pool, rows: pl.DataFrame, folder: Path, decoder: Decoder, on_rows: Callable[[int], None]
) -> None:
    """Write `pictures.npy` (where the decoder has a size) and `thumbs.npy`, row by row as in `rows`.

    Args:
        pool: reads the images.
        rows: shard, key and what `Pool.read_images` needs; the rows of a shard are neighbours.
        folder: the evaluation's work folder.
        decoder: decodes one picture.
        on_rows: called with the number of rows just decoded.

    Raises:
        EvaluationError: an image cannot be read or decoded any more.
    """
    n, size = len(rows), decoder.size
    thumbs = _array(folder / "thumbs.npy", np.float16, (n, 3 * THUMB * THUMB))
    pictures = None if size is None else _array(folder / "pictures.npy", np.uint8, (n, 3, size, size))
    done = set((folder / DECODED).read_text().split("\n")) if (folder / DECODED).exists() else set()
    with ThreadPoolExecutor(available_cores()) as threads, open(folder / DECODED, "a", encoding="utf-8") as listed:
        start = 0
        for (name,), of_shard in rows.group_by("shard", maintain_order=True):
            shard, end = str(name), start + len(of_shard)
            for first in range(start, end, _TOGETHER) if shard not in done else ():
                part = of_shard.slice(first - start, _TOGETHER)
                decoded = threads.map(decoder, _read(pool, shard, part))
                for place, key in enumerate(part["key"]):
                    try:
                        whole, thumbs[first + place] = next(decoded)
                    except ImageError as error:
                        raise _changed(pool, shard, key, error) from error
                    if pictures is not None:
                        pictures[first + place] = whole
                on_rows(len(part))
            thumbs.flush()
            if pictures is not None:
                pictures.flush()
            listed.write(f"{shard}\n")
            listed.flush()
            start = end


def _read(pool: Pool, shard: str, rows: pl.DataFrame) -> Iterator[bytes]:
    blobs = pool.read_images(shard, rows.select(IMAGE_COLUMNS).to_arrow())
    for key, blob in zip(rows["key"], blobs, strict=True):
        if isinstance(blob, PoolError):
            raise _changed(pool, shard, key, blob) from blob
        yield blob


def _changed(pool: Pool, shard: str, key: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"{pool.settings.path}, shard {shard}, key {key}: {error}. The file changed after it was read. Remedy: "
        "clip-select run"
    )


def _array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """Open an array of a shape, writable; one that is missing or has another shape is made, of zeros."""
    if path.exists():
        found = np.lib.format.open_memmap(path, mode="r+")
        if found.shape == shape and found.dtype == dtype:
            return found
    path.with_name(DECODED).unlink(missing_ok=True)
    made = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:  # a disk that is full is an error here; later it would end the process
        os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return made


@dataclass(frozen=True)
class TaskImages:
    """The images of a task.

    Attributes:
        name: the task: a target, or `retrieval`.
        digests: SHA-256 of each image's bytes, as hexadecimal digits.
        thumbs: float16 [m, 768].
        texts: the class of each image; for `retrieval`, its caption.
        skipped: images that cannot be decoded.
    """

    name: str
    digests: list[str]
    thumbs: np.ndarray
    texts: list[str]
    skipped: int

    @property
    def classes(self) -> list[str]:
        """The class names, sorted."""
        return sorted(set(self.texts))


def decode_task(
    name: str, images: Iterable[tuple[bytes, str]], folder: Path, decoder: Decoder, max_pixels: int
) -> TaskImages:
    """Decode a task's images; write `tasks/<name>.npy` and `tasks/<name>.json` where the decoder has a size.

    Raises:
        EvaluationError: no image can be decoded.
    """
    import hashlib

    digests, texts, thumbs, pictures, skipped = [], [], [], [], 0
    for data, text in images:
        try:
            whole, thumb = decoder(data, max_pixels)
        except ImageError:
            skipped += 1
            continue
        digests.append(hashlib.sha256(data).hexdigest())
        texts.append(text)
        thumbs.append(thumb)
        pictures.append(whole)
    if not digests:
        raise EvaluationError(f"tasks.{name}: none of its {skipped} images can be decoded. Remedy: replace the files")
    if decoder.size is not None:
        (folder / "tasks").mkdir(exist_ok=True)
        np.save(folder / "tasks" / f"{name}.npy", np.stack(pictures))  # type: ignore[arg-type]
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(texts))
    return TaskImages(name, digests, np.stack(thumbs), texts, skipped)
