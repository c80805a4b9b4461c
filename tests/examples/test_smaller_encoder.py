"""The cheap encoder of the cascade examples: the same weights for smaller images."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from examples.smaller_encoder import POSITIONS, WEIGHTS, write_smaller_encoder
from resources.models.encoders import Encoder
from resources.settings import EncoderSettings
from tests.support.pool_factory import picture

DEMO = Path(__file__).resolve().parents[2] / "examples/demo/encoder"


def test_the_demos_encoder_takes_images_of_half_the_size(tmp_path: Path) -> None:
    write_smaller_encoder(DEMO, tmp_path, 32)
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path, DEMO))
    grid = theirs[POSITIONS][1:].astype(np.float64)
    np.testing.assert_allclose(ours[POSITIONS], [theirs[POSITIONS][0], grid.mean(0)], atol=1e-3)
    assert all((ours[name] == theirs[name]).all() for name in theirs if name != POSITIONS)
    encoder = Encoder("small", EncoderSettings(model=f"local-dir:{tmp_path}", workers=0))
    found = encoder.embed_images([("one", picture(1))])
    assert found.image.shape == (1, 32)
    assert found.faults == []
