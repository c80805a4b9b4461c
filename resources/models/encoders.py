"""CLIP encoders through open_clip: one model, decoding processes beside it, unit-norm fp16 out.

Images go through open_clip's own evaluation transform, unchanged: EXIF orientation is not applied
and transparency is dropped. Encoders that embed the same shards together share the reading, the
decoding and, where their tokenizers agree, the tokens. What a worker process does is in
`resources.models.decoding`. torch and open_clip are imported inside functions, so that this module loads
at once.
"""

import contextlib
import difflib
import hashlib
import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from core.hashing import sha256
from resources.models import decoding
from resources.models.decoding import EncoderError
from resources.models.model_folders import digests
from resources.pools.base import Pool, PoolError
from resources.settings import HF_HUB, LOCAL_DIR, EncoderSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Embeddings", "Encoder", "EncoderError", "ImageEmbeddings", "embed_together"]

_CONFIG = "open_clip_config.json"
AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embeddings of one shard, row for row the table given.

    Attributes:
        image: float16 [n, d], unit norm.
        text: float16 [n, d], unit norm.
        seconds: from the first batch to the last, decoding included.
        notes: what a person should know, one sentence each.
    """

    image: np.ndarray
    text: np.ndarray
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ImageEmbeddings:
    """Embeddings of images that came with a name.

    Attributes:
        image: float16 [n, d], unit norm.
        kept: int64 [n], the position of each among the images given.
        faults: name and reason of each image that is not there.
        notes: what a person should know, one sentence each.
    """

    image: np.ndarray
    kept: np.ndarray
    faults: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with what prepares its input.

    Attributes:
        model: open_clip's.
        encode_image: its method, or what torch.compile made of it.
        encode_text: the same.
        look: how it sees pictures.
        look_key: equal for two encoders that see a picture alike.
        tokenizer: from captions to int64 [n, context length].
        tokenizer_key: equal for two encoders whose tokens are the same.
        device: where it runs.
        dtype: of the pixels it takes.
        autocast: of the products inside, where that differs.
        channels_last: the memory format of the pixels it takes.
    """

    model: Any
    encode_image: Callable[..., Any]
    encode_text: Callable[..., Any]
    look: decoding.Look
    look_key: str
    tokenizer: Any
    tokenizer_key: str
    device: "torch.device"
    dtype: "torch.dtype"
    autocast: "torch.dtype | None"
    channels_last: bool

    def encode(self, images: "torch.Tensor", tokens: "torch.Tensor | None") -> Any:
        """float16 unit-norm embeddings on the device: of images, and of tokens where given."""
        import torch

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        products = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), products:
            pixels = images.to(self.device, self.dtype, non_blocking=True, memory_format=layout)
            image = _unit(self.encode_image(pixels))
            if tokens is None:
                return image, None
            return image, _unit(self.encode_text(tokens.to(self.device, non_blocking=True)))


class Encoder:
    """One encoder of a project.

    Args:
        name: what the project calls it.
        settings: its model, or the embeddings to read.

    Attributes:
        rows_at_once: samples a forward pass: the batch size, until the memory turned out not to hold it.
    """

    def __init__(self, name: str, settings: EncoderSettings) -> None:
        self.name = name
        self.settings = settings
        self.rows_at_once = settings.batch_size

    def identity(self) -> dict[str, Any]:
        """What decides this encoder's embeddings, for the provenance.

        Contains JSON values only. Weights are named by what cannot change: the hash of a local
        file, the hash that the hub keeps, or open_clip's pretrained tag. The model is not loaded.

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
        identity["precision"] = settings.precision
        if settings.decode != "exact":  # what was embedded before there was a choice is exact
            identity["decode"] = settings.decode
        return identity | self._weights

    @cached_property
    def _weights(self) -> dict[str, Any]:
        model = self.settings.model
        assert model is not None
        if model.startswith(LOCAL_DIR):
            return {"files": digests(self._local_folder())}
        if model.startswith(HF_HUB):
            return {"model": model, "files": self._hub_files()}
        import open_clip

        self._check_known()
        tag = self.settings.pretrained
        assert tag is not None
        if Path(tag).is_file():
            return {"model": model, "files": {"weights": sha256(Path(tag))}}
        config = open_clip.get_pretrained_cfg(_plain(model), tag)
        preprocess = {
            key: config[key] for key in ("mean", "std", "interpolation", "resize_mode", "quick_gelu") if key in config
        }
        return {"model": model, "pretrained": tag, "preprocess": json.loads(json.dumps(preprocess))}

    def temperature(self) -> float:
        """τ: the setting, else the model's own 1/exp(logit_scale).

        Raises:
            EncoderError: the model cannot be loaded.
        """
        if self.settings.temperature is not None:
            return self.settings.temperature
        return self._own_temperature

    @cached_property
    def _own_temperature(self) -> float:
        model = self.settings.model
        assert model is not None  # settings demand a temperature otherwise
        if model.startswith(LOCAL_DIR):
            from safetensors import SafetensorError, safe_open

            weights = self._local_folder() / "open_clip_model.safetensors"
            if weights.is_file():
                try:
                    with safe_open(str(weights), framework="np") as file:
                        return math.exp(-float(file.get_tensor("logit_scale")))
                except SafetensorError as error:
                    raise self._cannot_load(error) from error
        return math.exp(-float(self.loaded.model.logit_scale.detach()))

    def embed_pool(
        self,
        shards: Mapping[str, pa.Table],
        pool: Pool,
        on_rows: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[str, Embeddings | EncoderError]]:
        """Embed shards one after the other, with one model and one set of decoding processes.

        Args:
            shards: name to raw_pool rows, all or some of the shard. A mapping may load a table
                only when it is asked for it; one or two are held at a time.
            pool: where the bytes are.
            on_rows: called with the number of rows just done.

        Yields:
            Each shard's name, in order, with its embeddings, or with the error that this shard
            met; the others are not touched by it.

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
        """Embed images that come with a name, such as a target's.

        Args:
            images: name and bytes; read as the model needs them.
            max_pixels: a larger image is a fault.
            on_rows: called with the number of images just done.

        Returns:
            The embeddings of all that can be decoded, and the others by name.

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
        """Embed a batch, in as many forward passes as the memory makes necessary.

        When a pass runs out of memory, its rows are halved, for this batch and for all that follow: a batch size that
        is too large costs a few passes and never a shard. A row's embedding does not depend on the rows beside it, up
        to rounding (`docs/own-pool.md`).

        Args:
            images: float32 [n, 3, height, width].
            tokens: int64 [n, context length], or None for images alone.
            notes: is given a sentence if the rows had to be halved.

        Returns:
            float16 [n, d] of unit norm on the device: of the images, and of the tokens or None.

        Raises:
            EncoderError: a single row is too much.
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
        """One forward pass, or None when the memory does not hold it."""
        import torch

        try:
            return self.loaded.encode(images, tokens)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                return None  # the caller goes on when the error, and the tensors its frames hold, are gone
            if self.settings.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise EncoderError(
                    f"encoder {self.name}: torch.compile failed: {str(error).strip().splitlines()[0]}. Install a C++ "
                    "compiler, or set compile to false."
                ) from error
            raise

    def _halve(self, rows: int, notes: list[str]) -> None:
        """Make do with half of the rows that were too many."""
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

    @cached_property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        import torch

        model = self.loaded
        return int(model.encode(torch.zeros(1, 3, *_side(model.model)), None)[0].shape[1])

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, loaded once.

        Raises:
            EncoderError: naming the model and the remedy.
        """
        if self.settings.model is None:
            raise EncoderError(
                f"encoder {self.name} only reads precomputed embeddings, and this needs its model. "
                "Set the encoder's `model`, or give the target `features` for it."
            )
        import open_clip
        import torch

        name = self.settings.model
        tag = self.settings.pretrained
        options: dict[str, Any] = {}
        if name.startswith(LOCAL_DIR):
            self._local_folder()
        elif not name.startswith(HF_HUB):
            self._check_known()
            name = _plain(name)
            assert tag is not None
            config = open_clip.get_pretrained_cfg(name, tag)
            if config.get("quick_gelu"):
                # open_clip only warns when a tag needs another activation than the model's name
                # says (ViT-B-32 with openai), and the embeddings would be subtly wrong
                options["force_quick_gelu"] = True
        device = torch_device(f"encoder {self.name}", self.settings.device)
        precision: str = self.settings.precision
        autocast = getattr(torch, AUTOCAST[precision]) if precision in AUTOCAST else None
        if autocast is not None:
            precision = "fp32"  # of the weights
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                name,
                pretrained=tag,
                precision=precision,
                device=device,
                pretrained_text=False,
                **options,
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise self._cannot_load(error) from error
        model.eval()
        channels_last = self.settings.channels_last
        if channels_last is None:
            # a ViT has one convolution, for its patches, and gains nothing
            channels_last = sum(isinstance(part, torch.nn.Conv2d) for part in model.visual.modules()) > 1
        if channels_last:
            model.visual.to(memory_format=torch.channels_last)
        encode_image, encode_text = model.encode_image, model.encode_text
        if self.settings.compile:
            encode_image, encode_text = torch.compile(encode_image), torch.compile(encode_text)
        draft = max(_side(model)) if self.settings.decode == "draft" else None
        return LoadedModel(
            model,
            encode_image,
            encode_text,
            decoding.Look(transform, draft),
            json.dumps([open_clip.get_model_preprocess_cfg(model), draft], sort_keys=True),
            tokenizer,
            hashlib.sha256(pickle.dumps(tokenizer)).hexdigest(),
            device,
            open_clip.get_input_dtype(precision) or torch.float32,
            autocast,
            channels_last,
        )

    def _local_folder(self) -> Path:
        assert self.settings.model is not None
        folder = Path(self.settings.model.removeprefix(LOCAL_DIR))
        if not folder.is_dir():
            raise EncoderError(
                f"encoder {self.name}: the folder {folder} does not exist. Set `model` to "
                f"{LOCAL_DIR}<folder> that holds {_CONFIG} and open_clip_model.safetensors; a "
                "relative path starts at the config file."
            )
        weights = [path for end in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{end}")]
        missing = [_CONFIG] if not (folder / _CONFIG).is_file() else []
        missing += ["open_clip_model.safetensors"] if not weights else []
        if missing:
            raise EncoderError(
                f"encoder {self.name}: {folder} lacks {' and '.join(missing)}. Copy the whole "
                "model folder there, as open_clip saves it."
            )
        return folder

    def _check_known(self) -> None:
        """That the model's name and its pretrained tag are open_clip's."""
        import open_clip

        assert self.settings.model is not None
        name, tag = _plain(self.settings.model), self.settings.pretrained
        if name not in open_clip.list_models():
            raise EncoderError(
                f"encoder {self.name}: open_clip has no model {self.settings.model!r}"
                f"{_near(name, open_clip.list_models())}. Name one of open_clip.list_models(), or "
                f"use {HF_HUB}<id> or {LOCAL_DIR}<folder>."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag is None:
            raise EncoderError(
                f"encoder {self.name}: {name} without `pretrained` would have random weights. Set "
                f"pretrained to a weights file or one of: {', '.join(tags) or 'none known'}."
            )
        if not open_clip.is_pretrained_cfg(name, tag) and not Path(tag).is_file():
            raise EncoderError(
                f"encoder {self.name}: {name} has no pretrained tag {tag!r}, nor is there such a "
                f"file{_near(tag, tags)}. Set pretrained to one of: {', '.join(tags) or 'none'}."
            )

    def _hub_files(self) -> dict[str, str]:
        """Content hashes of the config and weights, which the hub's cache names its files by."""
        import open_clip.pretrained

        assert self.settings.model is not None
        repository = self.settings.model.removeprefix(HF_HUB)
        try:
            paths = [
                Path(open_clip.pretrained.download_pretrained_from_hf(repository, filename=_CONFIG)),
                Path(open_clip.pretrained.download_pretrained_from_hf(repository)),
            ]
        except Exception as error:
            raise self._cannot_load(error) from error
        return {path.name: path.resolve().name if "blobs" in path.resolve().parts else sha256(path) for path in paths}

    def _cannot_load(self, error: Exception) -> EncoderError:
        model, tag = self.settings.model, self.settings.pretrained
        which = f"{model} ({tag})" if tag else str(model)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if model is not None and model.startswith(LOCAL_DIR):
            remedy = "Check the files in that folder."
        else:
            remedy = (
                "Its weights come from the network: check the name and the connection (and that "
                "HF_HUB_OFFLINE is not set), or download them once into the cache, or use "
                f"{LOCAL_DIR}<folder>."
            )
        return EncoderError(f"encoder {self.name}: cannot load {which}: {first}. {remedy}")


def torch_device(owner: str, wanted: str) -> "torch.device":
    """Give the device that the settings name; `owner` begins the error.

    Raises:
        EncoderError: it is not there.
    """
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EncoderError(
            f"{owner}: the device {wanted} is not there (torch sees {torch.cuda.device_count()} CUDA devices). Set "
            "device to auto or cpu."
        )
    return device


def embed_together(
    encoders: Sequence[Encoder],
    shards: Mapping[str, pa.Table],
    pool: Pool,
    on_rows: Callable[[int], None] | None = None,
) -> Generator[tuple[str, list[Embeddings | EncoderError]], None, None]:
    """Embed shards with several encoders in one pass over the images.

    Bytes are read and decoded once; what two encoders prepare alike, pixels or tokens, is prepared once. The first
    encoder's workers do it. Each model runs in batches of its own size, so no bit of an encoder's embeddings depends
    on which others are there.

    Args:
        encoders: each with a model, or one alone whose embeddings the pool carries.
        shards: see `Encoder.embed_pool`.
        pool: where the bytes are.
        on_rows: called with the number of rows just done by all.

    Yields:
        Each shard's name, in order, with what each encoder made of it: embeddings or an error.

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
    """One encoder's embeddings of one shard while they come in, on the device."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.notes: list[str] = []
        self.error: EncoderError | None = None
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.image: Any = None
        self.text: Any = None

    def fail(self, error: EncoderError) -> None:
        """Give the shard up; the first error is the one that is told."""
        self.error = self.error or error

    def add(self, images: "torch.Tensor", tokens: "torch.Tensor", total: int) -> None:
        """Take the next rows of `total`, and embed as many as fill batches of the encoder's own size."""
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
        """Give the shard's embeddings, or the error that befell it."""
        if self.error is not None:
            return self.error
        if self.image is None:
            none = np.empty((0, self.encoder.dimension), np.float16)
            return Embeddings(none, none, seconds, self.notes)
        return Embeddings(self.image.cpu().numpy(), self.text.cpu().numpy(), seconds, self.notes)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, the accelerator's or the system's, is what was missing; the CPU's allocator says so in words."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error)
    return any(sign in words for sign in ("DefaultCPUAllocator", "not enough memory", "STATUS_ALLOC_FAILED"))


def _side(model: Any) -> tuple[int, int]:
    """Height and width of the pictures that a model takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _plain(model: str) -> str:
    return model.replace("/", "-")


def _near(name: str, known: Sequence[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(by_lower[other] for other in near)}?)" if near else ""


def _unit(embeddings: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.nn.functional.normalize(embeddings.float(), dim=-1).half()
