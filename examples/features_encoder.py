"""An encoder whose text side has learned nothing: `python -m examples.features_encoder MODEL INTO`.

The tier `heads` needs an encoder that no arm's scores come from. Where there is no second CLIP at hand, this makes one
from a CLIP with a timm trunk: its images are the features of the trunk, without the projection that was trained on
captions, and its captions are the mean of random word vectors. INTO is a `local-dir:` folder.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORDS = 512
"""Length of a word vector."""
SEED = 3003
START, END = 49406, 49407
"""CLIP's tokens around a caption, whose vectors are 0."""


def write_features_encoder(model: Path, into: Path) -> None:
    """Write the encoder.

    Args:
        model: folder of a CLIP with a timm trunk, as open_clip saves it.
        into: folder to write.
    """
    import open_clip

    config = json.loads((model / "open_clip_config.json").read_text())
    vision = config["model_cfg"]["vision_cfg"]
    trunk = {
        name: value
        for name, value in load_file(model / "open_clip_model.safetensors").items()
        if name.startswith("visual.trunk.")
    }
    vision["timm_proj"] = "none"
    length = config["model_cfg"]["text_cfg"]["context_length"]
    config["model_cfg"]["text_cfg"] = {
        "context_length": length,
        "vocab_size": 49408,
        "width": WORDS,
        "heads": 8,
        "layers": 1,
    }
    config["model_cfg"]["embed_dim"] = 1280
    into.mkdir(parents=True, exist_ok=True)
    (into / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(SEED)
    made = open_clip.create_model(f"local-dir:{into}", load_weights=False)
    state = made.state_dict() | {name: value.float() for name, value in trunk.items()}
    save_file(
        {name: value.half().contiguous() for name, value in (state | _mean_of_words(state)).items()},
        into / "open_clip_model.safetensors",
    )


def _mean_of_words(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a text tower that averages random word vectors: attention that is equal everywhere."""
    block = "transformer.resblocks.0"
    found = {name: torch.zeros_like(value) for name, value in state.items() if name.startswith(block)}
    found |= {f"{block}.{norm}.weight": torch.ones(WORDS) for norm in ("ln_1", "ln_2")}
    found[f"{block}.attn.in_proj_weight"][2 * WORDS :] = torch.eye(WORDS)
    found[f"{block}.attn.out_proj.weight"] = torch.eye(WORDS)
    words = torch.randn_like(state["token_embedding.weight"])
    words[[START, END]] = 0
    found["token_embedding.weight"] = words
    found["positional_embedding"] = torch.zeros_like(state["positional_embedding"])
    found["text_projection"] = torch.randn_like(state["text_projection"]) / WORDS**0.5
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write an encoder of trunk features and random word vectors.")
    parser.add_argument("model", type=Path, help="folder of a CLIP with a timm trunk")
    parser.add_argument("into", type=Path, help="folder to write")
    arguments = parser.parse_args()
    write_features_encoder(arguments.model, arguments.into)
