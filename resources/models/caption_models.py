"""Models that describe images token by token: open_clip's CoCa and transformers' BLIP.

Here: loading each, its preprocessing, and the logits of the next token. Not here: sampling tokens
(`resources.models.captioners`). torch and the libraries are imported inside functions, so that this module loads at
once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from resources.models import decoding
from resources.models.clip_models import AUTOCAST, ClipModel, torch_device
from resources.models.decoding import EncoderError
from resources.models.model_folders import ModelFolder
from resources.settings import CaptionerSettings, EncoderSettings

if TYPE_CHECKING:
    import torch

    NextLogits = Callable[[torch.Tensor], torch.Tensor]

_BLIP = "BlipForConditionalGeneration"
_FILES = (  # apart from the weights; those that exist
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
_NAMELESS = 2  # tokens that a BLIP's tokenizer may lack: the start token, and one for its other tasks


@dataclass(frozen=True, slots=True)
class CaptionModel:
    """A model ready to describe images.

    Attributes:
        model: open_clip's or transformers' own.
        tokenizer: its own.
        encode: takes a prompt and returns its tokens, without start and end token.
        begin: takes pixels `[n, 3, height, width]` and a number k of captions. Returns a function from the tokens so
            far, int64 `[n k, any]`, which are the start token, the prompt and the generated ones, to the logits of the
            next token, float32 `[n k, vocabulary]`; it is called for one place after the other.
        start: the token before all captions.
        end: the token after them.
        banned_tokens: tokens that no caption in training has.
        longest: tokens that the model takes, including the start token.
        look: its preprocessing of images.
        device: where it runs.
        dtype: of the pixels it takes.
        autocast: of the products inside, where that differs.
        channels_last: the memory format of the pixels it takes.
    """

    model: Any
    tokenizer: Any
    encode: Callable[[str], list[int]]
    begin: "Callable[[torch.Tensor, int], NextLogits]"
    start: int
    end: int
    banned_tokens: list[int]
    longest: int
    look: decoding.Look
    device: "torch.device"
    dtype: "torch.dtype"
    autocast: "torch.dtype | None"
    channels_last: bool


class Coca:
    """A CoCa of open_clip.

    Args:
        name: the captioner's.
        settings: its model, and where and how it runs.
    """

    def __init__(self, name: str, settings: CaptionerSettings) -> None:
        self.name = name
        self.settings = settings
        shared = ("model", "pretrained", "precision", "decode", "batch_size", "device", "workers")
        self._clip = ClipModel(
            f"captioner {name}", EncoderSettings(**{field: getattr(settings, field) for field in shared})
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides its logits, as JSON values; the model is not loaded.

        Raises:
            EncoderError: there is no such model, or its files are missing.
        """
        return self._clip.identity()

    def load(self) -> CaptionModel:
        """Load it.

        Raises:
            EncoderError: it cannot be loaded, does not describe images, or not in this precision.
        """
        if self.settings.precision in ("bf16", "fp16"):  # some of its weights stay in single, and products fail
            raise EncoderError(
                f"captioner {self.name}: open_clip's CoCa does not run in {self.settings.precision}. Remedy: precision "
                f"amp_{self.settings.precision}"
            )
        loaded = self._clip.loaded
        model, tokenizer = loaded.model, loaded.tokenizer
        if not hasattr(model, "text_decoder") or not hasattr(tokenizer, "eot_token_id"):
            raise EncoderError(
                f"captioner {self.name}: {self.settings.model} does not describe images. Remedy: a CoCa with "
                "open_clip's own tokenizer, such as coca_ViT-L-14 with pretrained mscoco_finetuned_laion2b_s13b_b90k"
            )
        return CaptionModel(
            model,
            tokenizer,
            tokenizer.encode,
            partial(_begin_coca, model),
            tokenizer.sot_token_id,
            tokenizer.eot_token_id,
            [tokenizer.sot_token_id, model.pad_id],
            model.text_decoder.context_length,
            loaded.look,
            loaded.device,
            loaded.dtype,
            loaded.autocast,
            loaded.channels_last,
        )


def _begin_coca(model: Any, pixels: "torch.Tensor", captions: int) -> "NextLogits":
    seen = model._encode_image(pixels)[1].repeat_interleave(captions, dim=0)
    decoder = model.text_decoder

    def next_logits(generated: "torch.Tensor") -> "torch.Tensor":
        projection, decoder.text_projection = decoder.text_projection, None
        try:  # only the last place's logits are used
            hidden = decoder(seen, model._encode_text(generated)[1])[:, -1]
        finally:
            decoder.text_projection = projection
        return (hidden @ projection).float()

    return next_logits


class Blip:
    """A BLIP of transformers (arXiv 2201.12086), the paper's captioner.

    Args:
        name: the captioner's.
        settings: its model, and where and how it runs.
    """

    def __init__(self, name: str, settings: CaptionerSettings) -> None:
        self.name = name
        self.settings = settings
        self._folder = ModelFolder(
            f"captioner {name}",
            settings.model,
            "config.json",
            "a BLIP, as transformers' save_pretrained writes it",
            files=_FILES,
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides its logits, as JSON values; the model is not loaded.

        Raises:
            EncoderError: there is no such model, or its files are missing.
        """
        ways = {field: getattr(self.settings, field) for field in ("library", "precision", "decode")}
        return {**ways, **self._folder.weights}

    def load(self) -> CaptionModel:
        """Load it.

        Raises:
            EncoderError: transformers is missing, the model cannot be loaded, does not describe images, or does not fit
                into the device's memory.
        """
        import torch

        try:
            from transformers import BlipForConditionalGeneration, BlipProcessor
        except ImportError as error:
            raise EncoderError(
                f"captioner {self.name}: transformers is not installed. Remedy: pip install "
                "'clip-data-selection[blip]', or a CoCa of open_clip, which needs no extra"
            ) from error
        self._check_kind()
        settings = self.settings
        device = torch_device(f"captioner {self.name}", settings.device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = half.get(settings.precision, torch.float32)
        autocast = getattr(torch, AUTOCAST[settings.precision]) if settings.precision in AUTOCAST else None
        folder = str(self._folder.path)
        try:
            processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
            model, found = BlipForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:
            raise self._folder.cannot_load(error) from error
        if found["missing_keys"]:  # transformers fills them with random numbers
            raise self._wrong(f"its weights lack {min(found['missing_keys'])}")
        text, side = model.config.text_config, model.config.vision_config.image_size
        look = decoding.Look(partial(_pixels, processor.image_processor), side if settings.decode == "draft" else None)
        self._check_size(look, side)
        tokenizer = processor.tokenizer
        if tokenizer.sep_token_id != text.sep_token_id or not 0 <= text.vocab_size - len(tokenizer) <= _NAMELESS:
            # transformers makes one up where its files are missing
            raise self._wrong(f"its tokenizer, of {len(tokenizer)} tokens, is not that of its {text.vocab_size}")
        wordless = {text.bos_token_id, text.pad_token_id, *range(len(tokenizer), text.vocab_size)}
        banned_tokens = sorted((wordless | set(tokenizer.all_special_ids)) - {text.sep_token_id})
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"captioner {self.name}: {device} ran out of memory with the weights of {settings.model}. Remedy: free "
                "memory there, precision bf16, or device cpu"
            ) from error
        return CaptionModel(
            model,
            tokenizer,
            partial(tokenizer.encode, add_special_tokens=False),
            partial(_begin_blip, model),
            text.bos_token_id,
            text.sep_token_id,
            banned_tokens,
            text.max_position_embeddings,
            look,
            device,
            dtype,
            autocast,
            channels_last=False,
        )

    def _check_kind(self) -> None:
        """Check that the model is a BLIP for captions: those for answers or matching load too, and write nonsense."""
        config = self._folder.path / "config.json"
        try:
            kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["no architecture"]
        except (OSError, ValueError, AttributeError) as error:
            raise self._wrong(f"{config} is not a model's configuration") from error
        if _BLIP not in kinds:
            raise self._wrong(f"its config.json names {', '.join(map(str, kinds))}")

    def _check_size(self, look: decoding.Look, side: int) -> None:
        """Check that images of any shape are resized to the one size that the model takes."""
        from PIL import Image

        shape = list(look.transform(Image.new("RGB", (2 * side, side))).shape)
        if shape != [3, side, side]:
            raise self._wrong(f"its processor gives pixels of {shape}, and the model takes {[3, side, side]}")

    def _wrong(self, why: str) -> EncoderError:
        return EncoderError(
            f"captioner {self.name}: {self.settings.model} does not describe images: {why}. Remedy: a {_BLIP} as it "
            "was saved, such as Salesforce/blip-image-captioning-base"
        )


def _pixels(processor: Any, picture: Any) -> "torch.Tensor":
    """Preprocess one image to float32 `[3, height, width]`; sent to the decoding processes."""
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def _begin_blip(model: Any, pixels: "torch.Tensor", captions: int) -> "NextLogits":
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    kept = None  # keys and values of image and tokens; without the image's a batch takes 10 times as long

    def next_logits(generated: "torch.Tensor") -> "torch.Tensor":
        nonlocal kept
        begins = kept is None  # all captions of an image still hold the same tokens
        found = model.text_decoder(
            input_ids=generated[::captions] if begins else generated[:, -1:],
            encoder_hidden_states=seen,
            past_key_values=kept,
            use_cache=True,
        )
        logits = found.logits[:, -1].float()
        if begins:
            kept = found.past_key_values
            kept.batch_repeat_interleave(captions)
            logits = logits.repeat_interleave(captions, dim=0)
        return logits

    return next_logits
