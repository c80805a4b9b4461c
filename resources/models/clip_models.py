"""CLIP models of open_clip: their files, their own temperature, and loading them.

Here: one model from a name, the hub or a folder, ready to run. Not here: batches and shards
(`resources.models.encoders`). torch and open_clip are imported inside functions, so that this module loads at once.
It runs without pyarrow and pydantic, as `resources.models.decoding` does.
"""

import difflib
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from resources.model_locations import HF_HUB, LOCAL_DIR
from resources.models import decoding
from resources.models.decoding import EncoderError
from resources.models.model_folders import check_weights, digests
from resources.storage.hash_cache import cached_sha256

if TYPE_CHECKING:
    import torch

    from resources.settings import EncoderSettings

_CONFIG = "open_clip_config.json"
AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with its preprocessing.

    Attributes:
        model: open_clip's.
        encode_image: its method, or the compiled one.
        encode_text: the same.
        look: its preprocessing of images.
        look_key: equal for two encoders with the same preprocessing.
        tokenizer: from captions to int64 [n, context length].
        tokenizer_key: equal for two encoders with the same tokens.
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
        """Return float16 embeddings of unit norm on the device: of images, and of tokens or None."""
        import torch

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        products = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), products:
            pixels = images.to(self.device, self.dtype, non_blocking=True, memory_format=layout)
            image = _unit(self.encode_image(pixels))
            if tokens is None:
                return image, None
            return image, _unit(self.encode_text(tokens.to(self.device, non_blocking=True)))

    def class_texts(self, classes: Sequence[str], templates: Sequence[str]) -> "torch.Tensor":
        """Return the text embeddings of classes, float32 [classes, d] of unit norm, on the device."""
        import torch
        from torch.nn import functional

        def encode_text(tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            del normalize
            return functional.normalize(self.encode_text(tokens).float(), dim=-1)

        products = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.no_grad(), products:
            tower = SimpleNamespace(encode_text=encode_text)
            texts: torch.Tensor = class_texts(tower, self.tokenizer, classes, templates, self.device).float()
        return texts


def class_texts(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], device: Any) -> Any:
    """Return open_clip's zero-shot classifier: for each class the mean of its captions' embeddings.

    Args:
        model: has open_clip's `encode_text`.
        tokenizer: the model's.
        classes: labels, in which _ stands for a space.
        templates: captions of a class, with {} for its name.
        device: of the model.

    Returns:
        Of unit norm, [classes, d], on the device.
    """
    import open_clip

    names = [label.replace("_", " ") for label in classes]
    return open_clip.build_zero_shot_classifier(
        model, tokenizer, names, list(templates), num_classes_per_batch=10, device=device
    ).T


class ClipModel:
    """One model, not loaded yet.

    Args:
        owner: its user, for the start of error messages ("encoder b32").
        settings: its model, and where and how it runs.
    """

    def __init__(self, owner: str, settings: "EncoderSettings") -> None:
        self.owner = owner
        self.settings = settings

    def identity(self) -> dict[str, Any]:
        """Return what decides this model's embeddings, as JSON values for the provenance; the model is not loaded.

        Weights are identified by values that cannot change: the hash of a local file, the hash that the hub keeps, or
        open_clip's pretrained tag.

        Raises:
            EncoderError: there is no such model, or its files are missing.
        """
        identity: dict[str, Any] = {"precision": self.settings.precision}
        if self.settings.decode != "exact":  # embeddings from before there was a choice are exact
            identity["decode"] = self.settings.decode
        return identity | self._weights

    @cached_property
    def _weights(self) -> dict[str, Any]:
        model = self.settings.model
        assert model is not None
        if model.startswith(LOCAL_DIR):
            return {"files": digests(self.owner, self._local_folder())}
        if model.startswith(HF_HUB):
            return {"model": model, "files": self._hub_files()}
        import open_clip

        self._check_known()
        tag = self.settings.pretrained
        assert tag is not None
        if Path(tag).is_file():
            check_weights(self.owner, Path(tag))
            return {"model": model, "files": {"weights": cached_sha256(Path(tag))}}
        config = open_clip.get_pretrained_cfg(_plain(model), tag)
        preprocess = {
            key: config[key] for key in ("mean", "std", "interpolation", "resize_mode", "quick_gelu") if key in config
        }
        return {"model": model, "pretrained": tag, "preprocess": json.loads(json.dumps(preprocess))}

    @cached_property
    def temperature(self) -> float:
        """τ: the model's own 1/exp(logit_scale).

        Raises:
            EncoderError: the model cannot be loaded.
        """
        model = self.settings.model
        assert model is not None  # otherwise the settings require a temperature
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

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, loaded once.

        Raises:
            EncoderError: there is no such model, or it cannot be loaded.
        """
        if self.settings.model is None:
            raise EncoderError(
                f"{self.owner} only reads precomputed embeddings, and this needs its model. "
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
                # open_clip only warns when a tag needs another activation than the model's name implies (ViT-B-32
                # with openai), and the embeddings would be subtly wrong
                options["force_quick_gelu"] = True
        device = torch_device(self.owner, self.settings.device)
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
            # a ViT has one convolution, for its patches, and does not get faster
            channels_last = sum(isinstance(part, torch.nn.Conv2d) for part in model.visual.modules()) > 1
        if channels_last:
            model.visual.to(memory_format=torch.channels_last)
        encode_image, encode_text = model.encode_image, model.encode_text
        if self.settings.compile:
            encode_image, encode_text = torch.compile(encode_image), torch.compile(encode_text)
        draft = max(image_size(model)) if self.settings.decode == "draft" else None
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
                f"{self.owner}: the folder {folder} does not exist. Set `model` to "
                f"{LOCAL_DIR}<folder> that holds {_CONFIG} and open_clip_model.safetensors; a "
                "relative path starts at the config file."
            )
        weights = [path for end in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{end}")]
        missing = [_CONFIG] if not (folder / _CONFIG).is_file() else []
        missing += ["open_clip_model.safetensors"] if not weights else []
        if missing:
            raise EncoderError(
                f"{self.owner}: {folder} lacks {' and '.join(missing)}. Copy the whole "
                "model folder there, as open_clip saves it."
            )
        return folder

    def _check_known(self) -> None:
        """Check that open_clip has the model's name and its pretrained tag."""
        import open_clip

        assert self.settings.model is not None
        name, tag = _plain(self.settings.model), self.settings.pretrained
        if name not in open_clip.list_models():
            raise EncoderError(
                f"{self.owner}: open_clip has no model {self.settings.model!r}"
                f"{_near(name, open_clip.list_models())}. Name one of open_clip.list_models(), or "
                f"use {HF_HUB}<id> or {LOCAL_DIR}<folder>."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag is None:
            raise EncoderError(
                f"{self.owner}: {name} without `pretrained` would have random weights. Set "
                f"pretrained to a weights file or one of: {', '.join(tags) or 'none known'}."
            )
        if not open_clip.is_pretrained_cfg(name, tag) and not Path(tag).is_file():
            raise EncoderError(
                f"{self.owner}: {name} has no pretrained tag {tag!r}, nor is there such a "
                f"file{_near(tag, tags)}. Set pretrained to one of: {', '.join(tags) or 'none'}."
            )

    def _hub_files(self) -> dict[str, str]:
        """Return the content hashes of config and weights, after which the hub's cache names its files."""
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
        blobs = {path: path.resolve() for path in paths}
        return {path.name: blob.name if "blobs" in blob.parts else cached_sha256(path) for path, blob in blobs.items()}

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
        return EncoderError(f"{self.owner}: cannot load {which}: {first}. {remedy}")


def torch_device(owner: str, wanted: str) -> "torch.device":
    """Return the device for a setting.

    Args:
        owner: its user, for the start of the error message.
        wanted: auto, cpu, cuda or cuda:<index>.

    Raises:
        EncoderError: there is no such device.
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


def image_size(model: Any) -> tuple[int, int]:
    """Return height and width of a model's input in pixels."""
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
