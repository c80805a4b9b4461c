"""A small CoCa with random weights, its inputs, and a float64 oracle of nucleus sampling."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.pool_factory import TINY_CONFIG, uid, write_clip

if TYPE_CHECKING:
    import torch

TOWER = {"width": 16, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 49408}


COCA_CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            **TINY_CONFIG["model_cfg"]["vision_cfg"],
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TOWER, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TOWER, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "preprocess_cfg": TINY_CONFIG["preprocess_cfg"],
}


SPEECH = {"captions": 3, "max_tokens": 6, "min_tokens": 2}


UIDS = [uid("described", number) for number in range(4)]


@pytest.fixture(scope="session")
def tiny_coca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a CoCa with random weights whose captions vary: 60 tokens and the end token are likely."""
    import torch

    folder = write_clip(tmp_path_factory.mktemp("tiny_coca"), COCA_CONFIG)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    projection = torch.full((16, 49408), -9.0)
    projection[:, 1000:1060] = torch.randn(16, 60, generator=generator)
    projection[:, 49407] = 0.5 * torch.randn(16, generator=generator)
    projection[-1, :] = -30.0
    projection[-1, [*range(1000, 1060), 49407]] = 0.0
    projection[-1, 49407] = 8.0
    state["text_decoder.text_projection"] = projection
    state["text_decoder.ln_final.weight"][-1] = 0.0
    state["text_decoder.ln_final.bias"][-1] = 1.0
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def pixels(n: int) -> "torch.Tensor":
    """Return n random images, float32 [n, 3, 32, 32], the same in every call."""
    import torch

    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def nucleus_token(logits: np.ndarray, uniform: float, top_p: float) -> int:
    """Return the token that a uniform number in [0, 1) picks from the nucleus, computed in float64.

    Args:
        logits: [vocabulary].
        uniform: the random number.
        top_p: probability that the nucleus has to reach.
    """
    wide = np.exp(logits.astype(np.float64) - logits.max())
    wide /= wide.sum()
    order = np.argsort(-wide, kind="stable")
    nucleus, mass = [], 0.0
    for token in order:
        nucleus.append(token)
        mass += wide[token]
        if mass >= top_p:
            break
    reached = 0.0
    for token in nucleus:
        reached += wide[token]
        if reached > uniform * mass:
            return int(token)
    return int(nucleus[-1])
