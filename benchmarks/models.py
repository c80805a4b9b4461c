"""open_clip models with random weights, which do not change the speed, and the time of their passes and their input.

Called by `encoding` and `gpu.encoders`. Needs torch and open_clip alone.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resources.models.clip_models import LoadedModel, image_size
from resources.models.decoding import Prepare, RowsItem

CAPTION = "a caption of ordinary length, number {}, of nothing"


@dataclass(frozen=True)
class Forward:
    """A model on a device, and the input of one forward pass."""

    model: LoadedModel
    pixels: torch.Tensor
    tokens: torch.Tensor

    def seconds(self) -> float:
        """Time one pass over ready tensors."""
        start = time.perf_counter()
        self.model.encode(self.pixels, self.tokens)
        wait(self.model.device)
        return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a model with random weights, in the form that `local-dir:` loads.

    Args:
        folder: does not exist.
        config: the model's, as `open_clip.get_model_config` returns it.
    """
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(
        {name: tensor.half().contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def save_named_model(folder: Path, name: str) -> Path:
    """Write one of open_clip's models with random weights to the folder of its name, and return that folder.

    Raises:
        ValueError: open_clip has no such model.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no model {name}. Remedy: one of open_clip.list_models()")
    return save_model(folder / name, config)


def forward(model: LoadedModel, batch: int) -> Forward:
    """Put one batch of input on a model's device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, *image_size(model.model), generator=generator)
    tokens = model.tokenizer([CAPTION.format(1)] * batch)
    return Forward(model, pixels.to(model.device, model.dtype), tokens.to(model.device))


def prepared_per_second(prepare: Prepare, items: Iterable[RowsItem], repeats: int = 3) -> tuple[float, float]:
    """Return the samples that one decoding process prepares per second, and the captions that it tokenises.

    Based on processor time, so that other work on the machine does not count.
    """
    (tokenizer,) = prepare.tokenizers
    captions = [caption for item in items for caption in item.rows["caption"].to_pylist()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a decoding process
    try:
        decoding, tokenising = [], []
        for _ in range(repeats):
            start = time.process_time()
            for item in items:
                if (error := prepare[item].error) is not None:
                    raise RuntimeError(error)
            decoding.append(time.process_time() - start)
            start = time.process_time()
            tokenizer(captions)
            tokenising.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return len(captions) / median(decoding), len(captions) / median(tokenising)
