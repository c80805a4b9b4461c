"""CLIP encoders: shards, targets and single batches to float16 embeddings of unit norm.

Images are converted to RGB (`resources.storage.images`) and go through open_clip's own evaluation transform, unchanged:
EXIF orientation is not applied. Encoders that embed the same shards in one run share the reading, the decoding and,
where their tokenizers agree, the tokens. Loading a model is in `resources.models.clip_models`, the work of a decoding
process in `resources.models.decoding`. torch is imported inside functions, so that this module loads at once.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from resources.models import decoding
from resources.models.clip_models import ClipModel, LoadedModel, image_size
from resources.models.decoding import EncoderError
from resources.pools.base import Pool, PoolError
from resources.settings import EncoderSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Embeddings", "Encoder", "EncoderError", "ImageEmbeddings", "embed_together"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embeddings of one shard, row-aligned with the given table.

    Attributes:
        image: float16 [n, d], unit norm.
        text: float16 [n, d], unit norm.
        seconds: from the first batch to the last, including decoding.
        notes: remarks for the user, one sentence each.
    """

    image: np.ndarray
    text: np.ndarray
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ImageEmbeddings:
    """Embeddings of named images.

    Attributes:
        image: float16 [n, d], unit norm.
        kept: int64 [n], the position of each among the given images.
        faults: name and reason of each image that cannot be decoded.
        notes: remarks for the user, one sentence each.
    """

    image: np.ndarray
    kept: np.ndarray
    faults: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


class Encoder:
    """One encoder of a project.

    Args:
        name: its name in the project.
        settings: its model, or the embeddings to read.

    Attributes:
        rows_at_once: samples per forward pass: the batch size, or less after the memory did not hold it.
    """

    def __init__(self, name: str, settings: EncoderSettings) -> None:
        self.name = name
        self.settings = settings
        self.rows_at_once = settings.batch_size
        self._model = ClipModel(f"encoder {name}", settings)

    def identity(self) -> dict[str, Any]:
        """Return what decides this encoder's embeddings, as JSON values for the provenance; the model is not loaded.

        Raises:
            EncoderError: there is no such model, or its files are missing.
        """
        settings = self.settings
        identity: dict[str, Any] = {}
        if settings.precomputed is not None:
            keys = settings.precomputed
            identity["precomputed"] = keys if isinstance(keys, str) else keys.model_dump()
        if settings.model is None:
            return identity
        return identity | self._model.identity()

    def temperature(self) -> float:
        """Return τ: the setting, else the model's own 1/exp(logit_scale).

        Raises:
            EncoderError: the model cannot be loaded.
        """
        if self.settings.temperature is not None:
            return self.settings.temperature
        return self._model.temperature

    def embed_pool(
        self,
        shards: Mapping[str, pa.Table],
        pool: Pool,
        on_rows: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[str, Embeddings | EncoderError]]:
        """Embed shards one after the other, with one model and one set of decoding processes.

        Args:
            shards: name to raw_pool rows, all or some of the shard. The mapping may load a table on access; one or two
                are held at a time.
            pool: reads the images.
            on_rows: called with the number of rows just embedded.

        Yields:
            Each shard's name, in order, with its embeddings, or with its error, which does not affect the others.

        Raises:
            EncoderError: the model itself cannot be loaded.
        """
        together = embed_together([self], shards, pool, on_rows)
        with contextlib.closing(together):
            for name, (found,) in together:
                yield name, found

    def read_pool(
        self,
        shards: Mapping[str, pa.Table],
        pool: Pool,
        on_rows: Callable[[int], None] | None,
    ) -> Iterator[tuple[str, Embeddings | EncoderError]]:
        """Read the embeddings that the pool carries. See `embed_pool`."""
        for name in shards:
            started = time.perf_counter()
            try:
                rows = shards[name]
                image, text = pool.embeddings(name, rows, self.name)
            except PoolError as error:
                yield name, EncoderError(f"encoder {self.name}: {error}")
                continue
            if on_rows is not None:
                on_rows(len(image))
            yield name, Embeddings(image, text, time.perf_counter() - started)

    def embed_images(
        self,
        images: Iterable[tuple[str, bytes]],
        *,
        max_pixels: int = 50_000_000,
        on_rows: Callable[[int], None] | None = None,
    ) -> ImageEmbeddings:
        """Embed named images, such as a target's.

        Args:
            images: name and bytes; read as the model needs them.
            max_pixels: width times height; a larger image is a fault.
            on_rows: called with the number of images just embedded.

        Returns:
            The embeddings of all images that can be decoded, and the faults of the others.

        Raises:
            EncoderError: the encoder has no model, or it cannot be loaded.
        """
        blocks = [np.empty((0, self.dimension), np.float16)]
        kept: list[int] = []
        faults: list[tuple[str, str]] = []
        notes: list[str] = []
        seen = 0
        work = decoding.ImageWork(images, self.settings.batch_size, max_pixels)
        batches = decoding.run(
            decoding.Prepare([self.loaded.look]), work, self.settings.workers, pin=self.loaded.device.type == "cuda"
        )
        with contextlib.closing(batches):
            for batch in batches:
                faults += batch.faults
                for pixels in batch.images:
                    blocks.append(self.encode(pixels, None, notes)[0].cpu().numpy())
                    kept += [seen + position for position in batch.kept]
                seen += batch.rows
                if on_rows is not None:
                    on_rows(batch.rows)
        return ImageEmbeddings(np.concatenate(blocks), np.array(kept, np.int64), faults, notes)

    def encode(self, images: "torch.Tensor", tokens: "torch.Tensor | None", notes: list[str]) -> Any:
        """Embed a batch, in as many forward passes as the memory requires.

        When a pass runs out of memory, its rows are halved for this and all later batches, so a batch size that is too
        large costs a few passes and never a shard. A row's embedding does not depend on the other rows, up to rounding
        (`docs/own-pool.md`).

        Args:
            images: float32 [n, 3, height, width].
            tokens: int64 [n, context length], or None for images alone.
            notes: list to which a sentence is added if the rows had to be halved.

        Returns:
            float16 [n, d] of unit norm on the device: of the images, and of the tokens or None.

        Raises:
            EncoderError: the memory does not hold a single row.
        """
        import torch

        parts: list[Any] = []
        start = 0
        while start < len(images):
            rows = slice(start, start + self.rows_at_once)
            found = self._try(images[rows], None if tokens is None else tokens[rows])
            if found is None:
                self._halve(len(images[rows]), notes)
            else:
                parts.append(found)
                start = rows.stop
        if len(parts) == 1:
            return parts[0]
        image, text = zip(*parts, strict=True)
        return torch.cat(image), None if tokens is None else torch.cat(text)

    def _try(self, images: "torch.Tensor", tokens: "torch.Tensor | None") -> Any:
        """Run one forward pass; return None if the memory does not hold it."""
        import torch

        try:
            return self.loaded.encode(images, tokens)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                return None  # outside this block, where the error no longer holds the tensors of its frames
            if self.settings.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise EncoderError(
                    f"encoder {self.name}: torch.compile failed: {str(error).strip().splitlines()[0]}. Install a C++ "
                    "compiler, or set compile to false."
                ) from error
            raise

    def _halve(self, rows: int, notes: list[str]) -> None:
        """Halve the rows per forward pass."""
        import torch

        device = self.loaded.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            raise EncoderError(
                f"encoder {self.name}: {device} ran out of memory with one sample a forward pass. Free memory there, "
                "set precision to bf16, or device to cpu."
            )
        self.rows_at_once = rows // 2
        note = (
            f"{device} ran out of memory with {rows} samples a forward pass; {self.rows_at_once} are taken from here "
            "on, with the same embeddings"
        )
        notes.append(note)
        _log.warning("encoder %s: %s", self.name, note)

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded once.

        Raises:
            EncoderError: there is no such model, or it cannot be loaded.
        """
        return self._model.loaded

    @cached_property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        import torch

        model = self.loaded
        return int(model.encode(torch.zeros(1, 3, *image_size(model.model)), None)[0].shape[1])


def embed_together(
    encoders: Sequence[Encoder],
    shards: Mapping[str, pa.Table],
    pool: Pool,
    on_rows: Callable[[int], None] | None = None,
) -> Generator[tuple[str, list[Embeddings | EncoderError]], None, None]:
    """Embed shards with several encoders in one pass over the images.

    Bytes are read and decoded once, and pixels or tokens that two encoders share are prepared once, by the first
    encoder's workers. Each model runs in batches of its own size, so no bit of an encoder's embeddings depends on the
    other encoders.

    Args:
        encoders: each with a model, or a single one whose embeddings the pool carries.
        shards: see `Encoder.embed_pool`.
        pool: reads the images.
        on_rows: called with the number of rows just embedded by all.

    Yields:
        Each shard's name, in order, with the embeddings or the error of each encoder.

    Raises:
        EncoderError: a model cannot be loaded.
    """
    if encoders[0].settings.precomputed is not None:
        (only,) = encoders
        for name, found in only.read_pool(shards, pool, on_rows):
            yield name, [found]
        return
    models = [encoder.loaded for encoder in encoders]
    looks = {model.look_key: model.look for model in models}
    tokenizers = {model.tokenizer_key: model.tokenizer for model in models}
    look_of = [list(looks).index(model.look_key) for model in models]
    tokenizer_of = [list(tokenizers).index(model.tokenizer_key) for model in models]
    prepare = decoding.Prepare(list(looks.values()), list(tokenizers.values()), pool)
    work = decoding.ShardWork(shards, encoders[0].settings.batch_size)
    pin = any(model.device.type == "cuda" for model in models)
    batches = decoding.run(prepare, work, encoders[0].settings.workers, pin=pin)
    with contextlib.closing(batches):
        for name in shards:
            filling = [_Filling(encoder) for encoder in encoders]
            started = time.perf_counter()
            while True:
                batch = next(batches)
                for one, look, tokenizer in zip(filling, look_of, tokenizer_of, strict=True):
                    if batch.error is not None:
                        one.fail(EncoderError(f"encoder {one.encoder.name}: {batch.error}"))
                    elif batch.images:
                        one.add(batch.images[look], batch.tokens[tokenizer], batch.total)
                if on_rows is not None and batch.rows:
                    on_rows(batch.rows)
                if batch.last:
                    break
            yield name, [one.result(time.perf_counter() - started) for one in filling]


class _Filling:
    """One encoder's embeddings of one shard while batches arrive, on the device."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.notes: list[str] = []
        self.error: EncoderError | None = None
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.image: Any = None
        self.text: Any = None

    def fail(self, error: EncoderError) -> None:
        """Stop embedding the shard; the first error is kept."""
        self.error = self.error or error

    def add(self, images: "torch.Tensor", tokens: "torch.Tensor", total: int) -> None:
        """Add the next rows of `total`, and embed as many as fill batches of the encoder's own size."""
        import torch

        if self.error is not None:
            return
        self.waiting.append((images, tokens))
        size = self.encoder.settings.batch_size
        there = sum(len(pixels) for pixels, _ in self.waiting)
        ready = there if self.done + there == total else there // size * size
        if ready == 0:
            return
        if len(self.waiting) > 1:
            images, tokens = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = [(images[ready:], tokens[ready:])] if ready < there else []
        for start in range(0, ready, size):
            rows = slice(start, min(start + size, ready))
            try:
                self._embed(images[rows], tokens[rows], total)
            except EncoderError as error:
                self.fail(error)
                return

    def _embed(self, images: "torch.Tensor", tokens: "torch.Tensor", total: int) -> None:
        import torch

        image, text = self.encoder.encode(images, tokens, self.notes)
        if self.image is None:
            self.image = torch.empty(total, image.shape[1], dtype=image.dtype, device=image.device)
            self.text = torch.empty_like(self.image)
        self.image[self.done : self.done + len(image)] = image
        self.text[self.done : self.done + len(text)] = text
        self.done += len(image)

    def result(self, seconds: float) -> Embeddings | EncoderError:
        """Return the shard's embeddings or its error."""
        if self.error is not None:
            return self.error
        if self.image is None:
            none = np.empty((0, self.encoder.dimension), np.float16)
            return Embeddings(none, none, seconds, self.notes)
        return Embeddings(self.image.cpu().numpy(), self.text.cpu().numpy(), seconds, self.notes)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is a lack of memory, of the accelerator or the system."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error)
    return any(sign in words for sign in ("DefaultCPUAllocator", "not enough memory", "STATUS_ALLOC_FAILED"))
