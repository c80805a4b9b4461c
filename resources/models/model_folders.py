"""Models stored as a folder of files: a user's own, or one in the hub's cache.

Here: finding the folder, and a permanent identity of its contents. Not here: loading models.
"""

import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from resources.model_locations import LOCAL_DIR
from resources.models.decoding import EncoderError
from resources.storage.hash_cache import cached_sha256

_OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "coreml/*"]
# transformers' names of weights in one file or several; it prefers these
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_GIT_LFS = b"version https://git-lfs"
_PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


class ModelFolder:
    """The folder of one model.

    Args:
        owner: its user, for the start of error messages ("text encoder minilm").
        model: hub id, or local-dir: with a path.
        sign: a file that every such folder has.
        kind: the kind of model, for the remedy.
        files: files used of a model of the hub, apart from transformers' weights; by default its whole repository.
    """

    def __init__(self, owner: str, model: str, sign: str, kind: str, files: Sequence[str] = ()) -> None:
        self.owner = owner
        self.model = model
        self.sign = sign
        self.kind = kind
        self.files = files

    @cached_property
    def path(self) -> Path:
        """The folder; files that the hub's cache lacks are downloaded, once.

        Raises:
            EncoderError: it is missing, or not such a folder.
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
            if not _there(folder, _SAFETENSORS):  # by its commit, without asking the hub for the newest
                snapshot_download(self.model, revision=folder.name, allow_patterns=_PICKLED)
        except Exception as error:
            raise self.cannot_load(error) from error
        return folder

    @cached_property
    def weights(self) -> dict[str, Any]:
        """The identity of the files, as JSON values: the hash of each, or the hub's revision if all are used.

        Raises:
            EncoderError: see `path`; or the hub has no weights of this model.
        """
        if self.model.startswith(LOCAL_DIR):
            return {"files": digests(self.owner, self.path)}
        if not self.files:
            return {"model": self.model, "revision": self.path.name}  # the folder is named after the commit
        weights = _there(self.path, _SAFETENSORS) or _there(self.path, _PICKLED)
        if not weights:
            raise self.cannot_load(FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin"))
        used = _there(self.path, self.files) + weights
        return {"model": self.model, "files": {path.name: _blob_sha256(path) for path in used}}

    def cannot_load(self, error: Exception) -> EncoderError:
        """Return the error of a model that cannot be loaded."""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = f"check the name and the connection, or use {LOCAL_DIR}<folder>"
        if self.model.startswith(LOCAL_DIR):
            remedy = "check the files in that folder"
        return EncoderError(f"{self.owner}: cannot load {self.model}: {first}. Remedy: {remedy}")


def _there(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _blob_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in the hub's cache: for a large file, the name of the blob that it links to.

    Only one link is followed: behind a second one the cache may keep files of several models under other names.
    """
    if path.is_symlink():
        blob = path.readlink()
        if blob.parent.name == "blobs" and len(blob.name) == 64:
            return blob.name
    return cached_sha256(path)


def digests(owner: str, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and below, by relative path; hidden files are left out.

    Raises:
        EncoderError: a file of weights is incomplete.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for path in paths:
        check_weights(owner, path)
    return {str(path.relative_to(folder)): cached_sha256(path) for path in paths}


def check_weights(owner: str, path: Path) -> None:
    """Check that a file of weights is whole, by its first and last bytes; other files pass.

    Args:
        owner: its user, for the start of the error message.
        path: the file.

    Raises:
        EncoderError: it is empty, cut, or only a pointer to the file in Git LFS.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        return
    with open(path, "rb") as file:
        begin = file.read(len(_GIT_LFS))
    if begin == _GIT_LFS:
        raise EncoderError(f"{owner}: {path} is a pointer to a file in Git LFS. Remedy: `git lfs pull` in its folder")
    whole = bool(begin)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np"):
                pass
        except SafetensorError:
            whole = False
    elif begin.startswith(b"PK"):  # torch's format since version 1.6; its list of contents comes last
        whole = zipfile.is_zipfile(path)
    if not whole:
        raise EncoderError(f"{owner}: {path} is damaged or incomplete. Remedy: copy or download it again")
