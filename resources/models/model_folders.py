"""Models that are a folder of files: a user's own, or one in the hub's cache.

Here: where the folder is, and what names its contents for good. Not here: what is in it, and what loads it.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.hashing import sha256
from resources.models.decoding import EncoderError
from resources.settings import LOCAL_DIR

_OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "coreml/*"]
# transformers' names of weights in one file or several; it loads these where both are there
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


class ModelFolder:
    """The folder of one model.

    Args:
        owner: what uses it, as errors begin ("text encoder minilm").
        model: hub id, or local-dir: with a path.
        sign: the file by which such a folder is known.
        kind: whose folder it must be, for the remedy.
        files: what is used of a model of the hub besides transformers' weights; without them its whole repository is.
    """

    def __init__(self, owner: str, model: str, sign: str, kind: str, files: Sequence[str] = ()) -> None:
        self.owner = owner
        self.model = model
        self.sign = sign
        self.kind = kind
        self.files = files

    @cached_property
    def path(self) -> Path:
        """Where it is; of a model of the hub, what the cache lacks is downloaded. The hub is asked once.

        Raises:
            EncoderError: it is not there, or not such a folder.
        """
        if self.model.startswith(LOCAL_DIR):
            folder = Path(self.model.removeprefix(LOCAL_DIR))
            if not (folder / self.sign).is_file():
                raise EncoderError(
                    f"{self.owner}: {folder} has no {self.sign}. Remedy: the folder of {self.kind}; a relative path "
                    "starts at the config file"
                )
            return folder
        from huggingface_hub import snapshot_download

        try:
            if not self.files:
                return Path(snapshot_download(self.model, ignore_patterns=_OTHER_FORMATS))
            folder = Path(snapshot_download(self.model, allow_patterns=[*self.files, *_SAFETENSORS]))
            if not _there(folder, _SAFETENSORS):  # by its commit, so that the hub need not say which is the newest
                snapshot_download(self.model, revision=folder.name, allow_patterns=_PICKLED)
        except Exception as error:
            raise self.cannot_load(error) from error
        return folder

    @cached_property
    def weights(self) -> dict[str, Any]:
        """What names the files for good, as JSON values: the hash of each, or the hub's revision where all are taken.

        Raises:
            EncoderError: see `path`; or the hub has no weights of this model.
        """
        if self.model.startswith(LOCAL_DIR):
            return {"files": digests(self.path)}
        if not self.files:
            return {"model": self.model, "revision": self.path.name}  # the hub's cache names the folder by the commit
        weights = _there(self.path, _SAFETENSORS) or _there(self.path, _PICKLED)
        if not weights:
            raise self.cannot_load(FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin"))
        used = _there(self.path, self.files) + weights
        return {"model": self.model, "files": {path.name: _cached_sha256(path) for path in used}}

    def cannot_load(self, error: Exception) -> EncoderError:
        """Give the error that says why the model cannot be loaded."""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = f"check the name and the connection, or use {LOCAL_DIR}<folder>"
        if self.model.startswith(LOCAL_DIR):
            remedy = "check the files in that folder"
        return EncoderError(f"{self.owner}: cannot load {self.model}: {first}. Remedy: {remedy}")


def _there(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _cached_sha256(path: Path) -> str:
    """Give the sha256 of a file in the hub's cache, which for a large one is the name of what the link leads to.

    One link is followed and no more: behind a second one the cache may keep files of several models, named otherwise.
    """
    if path.is_symlink():
        blob = path.readlink()
        if blob.parent.name == "blobs" and len(blob.name) == 64:
            return blob.name
    return sha256(path)


def digests(folder: Path) -> dict[str, str]:
    """Give the sha256 of each file in a folder and below, by relative path; hidden files do not count."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
