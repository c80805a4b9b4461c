"""CLIP encoders through open_clip: one model, decoding processes beside it, unit-norm fp16 out.

Images go through open_clip's own evaluation transform, unchanged: EXIF orientation is not applied
and transparency is dropped. What a worker process does is in `resources.decoding`. torch and
open_clip are imported inside functions, so that this module loads at once.
"""

import contextlib
import difflib
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from resources import decoding
from resources.decoding import EncoderError
from resources.pools import Pool, PoolError
from resources.settings import HF_HUB, LOCAL_DIR, EncoderSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Embeddings", "Encoder", "EncoderError", "ImageEmbeddings"]

_CONFIG = "open_clip_config.json"


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embeddings of one shard, row for row the table given.

    Attributes:
        image: float16 [n, d], unit norm.
        text: float16 [n, d], unit norm.
        seconds: from the first batch to the last, decoding included.
    """

    image: np.ndarray
    text: np.ndarray
    seconds: float


@dataclass(frozen=True, slots=True)
class ImageEmbeddings:
    """Embeddings of images that came with a name.

    Attributes:
        image: float16 [n, d], unit norm.
        kept: int64 [n], the position of each among the images given.
        faults: name and reason of each image that is not there.
    """

    image: np.ndarray
    kept: np.ndarray
    faults: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with what prepares its input."""

    model: Any
    transform: Any
    tokenizer: Any
    device: "torch.device"
    dtype: "torch.dtype"
    channels_last: bool

    def encode(self, images: "torch.Tensor", tokens: "torch.Tensor | None") -> Any:
        """float16 unit-norm embeddings on the device: of images, and of tokens where given."""
        import torch

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.inference_mode():
            pixels = images.to(self.device, self.dtype, non_blocking=True, memory_format=layout)
            image = _unit(self.model.encode_image(pixels))
            if tokens is None:
                return image, None
            return image, _unit(self.model.encode_text(tokens.to(self.device, non_blocking=True)))


class Encoder:
    """One encoder of a project.

    Args:
        name: what the project calls it.
        settings: its model, or the embeddings to read.
    """

    def __init__(self, name: str, settings: EncoderSettings) -> None:
        self.name = name
        self.settings = settings

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
        return identity | self._weights

    @cached_property
    def _weights(self) -> dict[str, Any]:
        model = self.settings.model
        assert model is not None
        if model.startswith(LOCAL_DIR):
            folder = self._local_folder()
            return {
                "files": {
                    str(path.relative_to(folder)): _sha256(path)
                    for path in sorted(folder.rglob("*"))
                    if path.is_file() and not path.name.startswith(".")
                }
            }
        if model.startswith(HF_HUB):
            return {"model": model, "files": self._hub_files()}
        import open_clip

        self._check_known()
        tag = self.settings.pretrained
        assert tag is not None
        if Path(tag).is_file():
            return {"model": model, "files": {"weights": _sha256(Path(tag))}}
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
        if self.settings.precomputed is not None:
            yield from self._read_pool(shards, pool, on_rows)
            return
        import torch

        model = self.loaded
        work = decoding.ShardWork(shards, pool, self.settings.batch_size)
        batches = self._decode(work)
        with contextlib.closing(batches):
            for name in shards:
                started = time.perf_counter()
                image: Any = None
                text: Any = None
                error: EncoderError | None = None
                done = 0
                while True:
                    batch = next(batches)
                    if batch.error is not None:
                        error = error or EncoderError(f"encoder {self.name}: {batch.error}")
                    elif error is None and batch.images is not None:
                        u, t = model.encode(batch.images, batch.tokens)
                        if image is None:
                            image = torch.empty(batch.total, u.shape[1], dtype=u.dtype, device=u.device)
                            text = torch.empty_like(image)
                        image[done : done + len(u)] = u
                        text[done : done + len(u)] = t
                    done += batch.rows
                    if on_rows is not None and batch.rows:
                        on_rows(batch.rows)
                    if batch.last:
                        break
                if error is not None:
                    yield name, error
                    continue
                if image is None:
                    image = text = torch.empty(0, self.dimension, dtype=torch.float16)
                seconds = time.perf_counter() - started
                yield name, Embeddings(image.cpu().numpy(), text.cpu().numpy(), seconds)

    def _read_pool(
        self,
        shards: Mapping[str, pa.Table],
        pool: Pool,
        on_rows: Callable[[int], None] | None,
    ) -> Iterator[tuple[str, Embeddings | EncoderError]]:
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
        model = self.loaded
        blocks = [np.empty((0, self.dimension), np.float16)]
        kept: list[int] = []
        faults: list[tuple[str, str]] = []
        seen = 0
        work = decoding.ImageWork(images, self.settings.batch_size, max_pixels)
        batches = self._decode(work)
        with contextlib.closing(batches):
            for batch in batches:
                faults += batch.faults
                if batch.images is not None:
                    blocks.append(model.encode(batch.images, None)[0].cpu().numpy())
                    kept += [seen + position for position in batch.kept]
                seen += batch.rows
                if on_rows is not None:
                    on_rows(batch.rows)
        return ImageEmbeddings(np.concatenate(blocks), np.array(kept, np.int64), faults)

    def _decode(self, work: Iterable[Any]) -> Generator[decoding.Batch, None, None]:
        """Run work items through the decoding processes, in order."""
        model = self.loaded
        workers = self.settings.workers
        prepare = decoding.Prepare(model.transform, model.tokenizer)
        return decoding.run(prepare, work, workers, pin=model.device.type == "cuda")

    @cached_property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        import torch

        model = self.loaded
        size = model.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(model.encode(torch.zeros(1, 3, height, width), None)[0].shape[1])

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
        device = self._device()
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                name,
                pretrained=tag,
                precision=self.settings.precision,
                device=device,
                pretrained_text=False,
                **options,
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise self._cannot_load(error) from error
        model.eval()
        convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in model.visual.modules())
        channels_last = convolutions > 1  # a ViT has one, for its patches, and gains nothing
        if channels_last:
            model.visual.to(memory_format=torch.channels_last)
        dtype = open_clip.get_input_dtype(self.settings.precision) or torch.float32
        return LoadedModel(model, transform, tokenizer, device, dtype, channels_last)

    def _device(self) -> "torch.device":
        import torch

        wanted = self.settings.device
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(wanted)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise EncoderError(
                f"encoder {self.name}: the device {wanted} is not there (torch sees "
                f"{torch.cuda.device_count()} CUDA devices). Set device to auto or cpu."
            )
        return device

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
        return {path.name: path.resolve().name if "blobs" in path.resolve().parts else _sha256(path) for path in paths}

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


def _plain(model: str) -> str:
    return model.replace("/", "-")


def _near(name: str, known: Sequence[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(by_lower[other] for other in near)}?)" if near else ""


def _unit(embeddings: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.nn.functional.normalize(embeddings.float(), dim=-1).half()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
