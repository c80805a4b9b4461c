"""Size and floating-point operations of a CLIP model, from its architecture alone: no weights are read."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from resources.model_locations import HF_HUB, LOCAL_DIR
from resources.settings import EncoderSettings


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        dimensions: d, the length of its embeddings.
        image: floating-point operations for one image, two for each multiply-add; None where open_clip can't build the
            model without its weights or the network.
        text: the same for one caption.
    """

    dimensions: int
    image: float | None = None
    text: float | None = None


def model_size(settings: EncoderSettings) -> ModelSize | None:
    """Return the size of an encoder's model; None without a model, or where its configuration is not known.

    Imports torch and open_clip, which takes seconds.
    """
    return None if settings.model is None else _size(settings.model)


@cache
def _size(model: str) -> ModelSize | None:
    config = _architecture(model)
    if config is None:
        return None
    dimensions = int(config["embed_dim"])
    if "hf_model_name" in config["text_cfg"]:  # open_clip would download the text tower's configuration
        return ModelSize(dimensions)
    try:
        return ModelSize(dimensions, *_operations(config))
    except Exception:  # noqa: BLE001 - parts of other libraries; the rate of such a model is measured all the same
        return ModelSize(dimensions)


def _operations(config: dict[str, Any]) -> list[float]:
    """Count the operations for an image and for a caption, on tensors without data."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    known = {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if name in config}
    with torch.device("meta"):
        built = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**known).eval()
        size = built.visual.image_size
        pixels = torch.empty(1, 3, *((size, size) if isinstance(size, int) else size))
        tokens = torch.zeros(1, built.context_length, dtype=torch.long)
    counted = []
    for encode, given in ((built.encode_image, pixels), (built.encode_text, tokens)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(given)
        counted.append(float(counter.get_total_flops()))
    return counted


def _architecture(model: str) -> dict[str, Any] | None:
    """Return a model's part of open_clip's configuration; None where it is not on this machine."""
    if model.startswith(LOCAL_DIR):
        path = Path(model.removeprefix(LOCAL_DIR)) / "open_clip_config.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        return found
    if model.startswith(HF_HUB):
        return None
    import open_clip

    return open_clip.get_model_config(model.replace("/", "-"))
