"""Decoding processes: the work items they get, reading and preprocessing, and the batches they return.

Work items are small (rows of a table, or the bytes of a few images) and created one by one on request, so neither
images nor tables pile up. An item has rows of one shard, and results keep the order of the items. Each worker process
loads this module.

Only `ShardWork` needs pyarrow, and nothing pydantic, so that `benchmarks.gpu` runs where they are not installed.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from resources.pools.errors import PoolError
from resources.storage import images

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from resources.pools.base import Pool

MAX_CAPTION = 2500
"""Characters of a caption that are tokenized: 32 for each of CLIP's 77 tokens, which English text never reaches."""

_AHEAD = 2  # batches each process prepares ahead, so that the model does not wait for a slow one
# imported once in the server that worker processes are forked from
_PRELOAD = ["torch", "torchvision.transforms", "open_clip", "PIL.JpegImagePlugin", "resources.pools.base", __name__]


class EncoderError(UserError, RuntimeError):
    """An encoder cannot be loaded, or a shard not embedded; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class RowsItem:
    """Rows of one shard, whose images the pool reads.

    Attributes:
        shard: its name.
        rows: `key`, `caption` and what `Pool.read_images` needs.
        total: rows of the shard.
        last: whether these are its last.
    """

    shard: str
    rows: "pa.Table"
    total: int
    last: bool


@dataclass(frozen=True, slots=True)
class ImagesItem:
    """Named images."""

    names: list[str]
    blobs: list[bytes]
    max_pixels: int


@dataclass(frozen=True, slots=True)
class FailedItem:
    """A shard whose table could not be read."""

    error: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The result of a work item.

    Attributes:
        rows: number of rows or images in the item.
        images: float32 [b, 3, height, width] for each preprocessing; none if there is no image.
        tokens: int64 [b, context length] for each tokenizer; none for images alone.
        kept: position in the item of each image in `images`.
        faults: name and reason of the others.
        error: why the item failed, or None.
        total: rows of the shard.
        last: whether this is the shard's last item.
    """

    rows: int
    images: "Sequence[torch.Tensor]" = ()
    tokens: "Sequence[torch.Tensor]" = ()
    kept: list[int] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    error: str | None = None
    total: int = 0
    last: bool = True

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        import dataclasses

        return dataclasses.replace(
            self,
            images=[tensor.pin_memory() for tensor in self.images],
            tokens=[tensor.pin_memory() for tensor in self.tokens],
        )


class ShardWork:
    """Work items of many shards, in order; each shard's table is loaded when it is needed."""

    def __init__(self, shards: "Mapping[str, pa.Table]", batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[RowsItem | FailedItem]:
        import pyarrow as pa

        from resources.pools.base import IMAGE_COLUMNS

        for shard in self.shards:
            try:
                rows = self.shards[shard].select([*IMAGE_COLUMNS, "caption"])
            except (PoolError, OSError, pa.ArrowException) as error:
                yield FailedItem(f"{shard}: {error}")
                continue
            total = rows.num_rows
            for start in range(0, max(total, 1), self.batch_size):
                # A copy: pickling a slice would send the shard's whole table.
                part = rows.take(pa.array(range(start, min(start + self.batch_size, total)), pa.int64()))
                yield RowsItem(shard, part, total, start + self.batch_size >= total)


class ImageWork:
    """Work items of named images."""

    def __init__(self, named: Iterable[tuple[str, bytes]], batch_size: int, max_pixels: int) -> None:
        self.named = named
        self.batch_size = batch_size
        self.max_pixels = max_pixels

    def __iter__(self) -> Iterator[ImagesItem]:
        names: list[str] = []
        blobs: list[bytes] = []
        for name, blob in self.named:
            names.append(name)
            blobs.append(blob)
            if len(names) == self.batch_size:
                yield ImagesItem(names, blobs, self.max_pixels)
                names, blobs = [], []
        if names:
            yield ImagesItem(names, blobs, self.max_pixels)


@dataclass(frozen=True, slots=True)
class Look:
    """An encoder's preprocessing of an image.

    Attributes:
        transform: the model's own, from an image to float32 [3, height, width].
        draft: see `images.picture`.
    """

    transform: Any
    draft: int | None = None


class Prepare:
    """Turns work items into batches. For torch's DataLoader it is the dataset, and the items are indices.

    Each image is decoded once per `draft`, whatever the number of looks.

    Args:
        looks: preprocessing of images.
        tokenizers: from captions to tokens.
        pool: reads the images of `RowsItem`.
    """

    def __init__(self, looks: Sequence[Look], tokenizers: Sequence[Any] = (), pool: "Pool | None" = None) -> None:
        self.looks = looks
        self.tokenizers = tokenizers
        self.pool = pool

    def __getitem__(self, item: RowsItem | ImagesItem | FailedItem) -> Batch:
        if isinstance(item, FailedItem):
            return Batch(0, error=item.error)
        if isinstance(item, ImagesItem):
            return self._images(item)
        return self._rows(item)

    def _tensors(self, blob: bytes, max_pixels: int | None) -> "list[torch.Tensor]":
        """Return the image preprocessed for each look."""
        pictures = {draft: images.picture(blob, max_pixels, draft) for draft in {look.draft for look in self.looks}}
        try:
            return [look.transform(pictures[look.draft]) for look in self.looks]
        except Exception as error:  # hostile bytes raise almost anything in Pillow
            words = f"the model's preprocessing: {type(error).__name__}: {error}"
            raise images.ImageError("image_undecodable", words) from error

    def _images(self, item: ImagesItem) -> Batch:
        tensors, kept, faults = [], [], []
        for position, (name, blob) in enumerate(zip(item.names, item.blobs, strict=True)):
            try:
                tensors.append(self._tensors(blob, item.max_pixels))
                kept.append(position)
            except images.ImageError as fault:
                faults.append((name, str(fault)))
        return Batch(len(item.names), _stacked(tensors), (), kept, faults)

    def _rows(self, item: RowsItem) -> Batch:
        rows = item.rows.num_rows
        if rows == 0:
            return Batch(0, total=item.total, last=item.last)
        assert self.pool is not None
        remedy = "The file changed after it was read: materialize raw_pool again."
        try:
            blobs = self.pool.read_images(item.shard, item.rows)
        except PoolError as error:  # the pool has no images
            return Batch(rows, error=str(error), total=item.total, last=item.last)
        tensors = []
        for key, blob in zip(item.rows["key"].to_pylist(), blobs, strict=True):
            if isinstance(blob, PoolError):
                message = f"shard {item.shard}: {blob}. {remedy}"
                return Batch(rows, error=message, total=item.total, last=item.last)
            try:
                # The pool checked its size when it read the shard.
                tensors.append(self._tensors(blob, None))
            except images.ImageError as fault:
                message = f"shard {item.shard}, key {key} in {self.pool.settings.path}: {fault}. {remedy}"
                return Batch(rows, error=message, total=item.total, last=item.last)
        captions = [_bounded(caption) for caption in item.rows["caption"].to_pylist()]
        tokens = [tokenizer(captions) for tokenizer in self.tokenizers]
        return Batch(rows, _stacked(tensors), tokens, list(range(rows)), [], None, item.total, item.last)


def _bounded(caption: str) -> str:
    """Return the part of a caption that is tokenized.

    Byte pair encoding takes quadratic time in the length of a word. White space of longer captions is collapsed first,
    as CLIP's tokenizer does anyway.
    """
    return caption if len(caption) <= MAX_CAPTION else " ".join(caption.split())[:MAX_CAPTION]


def _stacked(tensors: "list[list[torch.Tensor]]") -> "list[torch.Tensor]":
    """Stack images, each preprocessed for all looks, to one tensor per look."""
    import torch

    return [torch.stack(by_image) for by_image in zip(*tensors, strict=True)]


def _as_is(batch: Any) -> Any:
    return batch


def end_with_main(_: int) -> None:
    """End this worker process when the main one ends, even if that one is killed.

    torch watches the parent, which is the server that workers are forked from and which lives as long as a worker.
    """
    import multiprocessing
    import os
    import threading

    main = multiprocessing.parent_process()
    assert main is not None

    def watch() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_server() -> None:
    """Start the server that workers are forked from, with SIGINT blocked, which workers inherit.

    Ctrl-C reaches all processes of a terminal. The main process alone answers it, and ends the workers.
    """
    import signal
    from multiprocessing import forkserver

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(prepare: Prepare, work: Iterable[Any], workers: int, *, pin: bool) -> Generator[Batch, None, None]:
    """Turn work items into batches, in order, in `workers` processes (0: in this one).

    The processes are forked from a server without threads, because this process may have some (a Dagster process serves
    gRPC). They end when the iterator is closed.
    """
    import multiprocessing

    import torch.utils.data

    options: dict[str, Any] = {}
    if workers > 0:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        _start_server()
        options = {
            "multiprocessing_context": context,
            "prefetch_factor": _AHEAD,
            "worker_init_fn": end_with_main,
        }
    loader: Any = torch.utils.data.DataLoader(
        prepare,  # type: ignore[arg-type]
        batch_size=None,
        sampler=work,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        **options,
    )
    yield from loader
