"""A cheaper encoder from a convolutional CLIP: `python -m examples.smaller_encoder MODEL INTO --pixels 128`.

Its images have fewer pixels, and its weights are the same; those of an attention pool's positions are averaged to the
smaller grid. INTO is a `local-dir:` folder.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
POSITIONS = "visual.attnpool.positional_embedding"
"""Weights of a ResNet's attention pool, `[1 + side², width]`: the mean, then each position of the last layer."""


def write_smaller_encoder(model: Path, into: Path, pixels: int) -> None:
    """Write the encoder.

    Args:
        model: folder of a CLIP whose image tower is a ResNet or a timm trunk of any image size, as open_clip saves it.
        into: folder to write.
        pixels: width and height of its images.
    """
    config = json.loads((model / CONFIG).read_text())
    vision = config["model_cfg"]["vision_cfg"]
    weights = load_file(model / WEIGHTS)
    if POSITIONS in weights:
        weights[POSITIONS] = _fewer_positions(weights[POSITIONS], pixels / vision["image_size"])
    vision["image_size"] = config["preprocess_cfg"]["size"] = pixels
    into.mkdir(parents=True, exist_ok=True)
    (into / CONFIG).write_text(json.dumps(config, indent=2))
    save_file(weights, into / WEIGHTS)


def _fewer_positions(positions: torch.Tensor, scale: float) -> torch.Tensor:
    mean, grid = positions[:1], positions[1:]
    side = math.isqrt(len(grid))
    square = grid.float().T.reshape(1, -1, side, side)
    fewer = torch.nn.functional.adaptive_avg_pool2d(square, max(1, round(side * scale)))
    return torch.cat([mean, fewer.flatten(2)[0].T.to(grid.dtype)]).contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write an encoder with the same weights for smaller images.")
    parser.add_argument("model", type=Path, help="folder of a convolutional CLIP")
    parser.add_argument("into", type=Path, help="folder to write")
    parser.add_argument("--pixels", type=int, default=128, help="width and height of its images")
    arguments = parser.parse_args()
    write_smaller_encoder(arguments.model, arguments.into, arguments.pixels)
