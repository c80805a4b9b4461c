"""Weights that are cut, empty or only a pointer are found without loading or reading all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from resources.models.decoding import EncoderError
from resources.models.model_folders import check_weights


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    path = tmp_path / "open_clip_model.safetensors"
    save_file({"logit_scale": np.zeros(100, np.float32)}, path)
    return path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save({"logit_scale": torch.zeros(100)}, path)
    return path


def test_whole_weights_and_other_files_pass(safetensors: Path, pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"")
    for path in (safetensors, pickled, tmp_path / "config.json"):
        check_weights("encoder b32", path)


@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
@pytest.mark.parametrize("kept", [0, 50, -10])
def test_weights_that_a_download_cut_are_named_with_the_remedy(
    kind: str, kept: int, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EncoderError, match=rf"encoder b32: .*{path.name} is damaged or incomplete\. Remedy: copy"):
        check_weights("encoder b32", path)


def test_a_pointer_of_git_lfs_is_named_as_such(safetensors: Path) -> None:
    safetensors.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(EncoderError, match=r"pointer to a file in Git LFS\. Remedy: `git lfs pull`"):
        check_weights("encoder b32", safetensors)
