"""Models that are a folder of files: a user's own, or one in the hub's cache.

Here: where the folder is, and what names its contents for good. Not here: what is in it, and what loads it.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from resources.decoding import EncoderError
from resources.settings import LOCAL_DIR

_OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "coreml/*"]


class ModelFolder:
    """The folder of one model.

    Args:
        owner: what uses it, as errors begin ("text encoder minilm").
        model: hub id, or local-dir: with a path.
        sign: the file by which such a folder is known.
        kind: whose folder it must be, for the remedy.
    """

    def __init__(self, owner: str, model: str, sign: str, kind: str) -> None:
        self.owner = owner
        self.model = model
        self.sign = sign
        self.kind = kind

    @cached_property
    def path(self) -> Path:
        """Where it is; a model of the hub is downloaded unless the cache has it.

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
            return Path(snapshot_download(self.model, ignore_patterns=_OTHER_FORMATS))
        except Exception as error:
            raise self.cannot_load(error) from error

    @cached_property
    def weights(self) -> dict[str, Any]:
        """What names the files for good, as JSON values: the hub's revision, or the hash of each.

        Raises:
            EncoderError: see `path`.
        """
        if not self.model.startswith(LOCAL_DIR):
            return {"model": self.model, "revision": self.path.name}  # the hub's cache names the folder by the commit
        return {"files": digests(self.path)}

    def cannot_load(self, error: Exception) -> EncoderError:
        """Give the error that says why the model cannot be loaded."""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return EncoderError(
            f"{self.owner}: cannot load {self.model}: {first}. Remedy: check the name and the connection, or use "
            f"{LOCAL_DIR}<folder>"
        )


def digests(folder: Path) -> dict[str, str]:
    """Give the sha256 of each file in a folder and below, by relative path; hidden files do not count."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def sha256(path: Path) -> str:
    """Give a file's sha256 as 64 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
