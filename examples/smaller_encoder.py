"""A cheaper encoder from a CLIP with a convolutional trunk: `python -m examples.smaller_encoder MODEL INTO`.

The weights are the same, and images are resized to fewer pixels. INTO is a `local-dir:` folder.
"""

import argparse
import json
import shutil
from pathlib import Path

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_smaller_encoder(model: Path, into: Path, pixels: int) -> None:
    """Write the encoder.

    Args:
        model: folder of a CLIP with a timm trunk that takes images of any size, as open_clip saves it.
        into: folder to write.
        pixels: width and height of its images.
    """
    config = json.loads((model / CONFIG).read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = pixels
    config["preprocess_cfg"]["size"] = pixels
    into.mkdir(parents=True, exist_ok=True)
    (into / CONFIG).write_text(json.dumps(config, indent=2))
    shutil.copyfile(model / WEIGHTS, into / WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write an encoder with the same weights for smaller images.")
    parser.add_argument("model", type=Path, help="folder of a CLIP with a timm trunk")
    parser.add_argument("into", type=Path, help="folder to write")
    parser.add_argument("--pixels", type=int, default=128, help="width and height of its images")
    arguments = parser.parse_args()
    write_smaller_encoder(arguments.model, arguments.into, arguments.pixels)
