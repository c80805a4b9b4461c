"""The first synset of a word, from WordNet's database files (`index.noun`, `noun.exc` and so on).

Here: reading the files and removing endings, as WordNet's `morphy` does. The user provides the files.
"""

import hashlib
from functools import cached_property
from pathlib import Path

from core.errors import UserError
from core.hashing import sha256

PARTS = ("noun", "verb", "adj", "adv")
_ENDINGS = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


class WordNetError(UserError):
    """WordNet's files or a list of synsets cannot be read; the message names the file and the remedy."""


class WordNet:
    """WordNet's index.

    Args:
        folder: has `index.*` and `*.exc` of the four parts of speech, as WordNet's `dict` folder does.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._known: dict[str, int | None] = {}

    @property
    def files(self) -> list[Path]:
        """The files that are read.

        Raises:
            WordNetError: one is missing.
        """
        found = [self.folder / name for part in PARTS for name in (f"index.{part}", f"{part}.exc")]
        for path in found:
            if not path.is_file():
                raise WordNetError(
                    f"{path}: no such file. Remedy: set scores.captions.wordnet to WordNet's `dict` folder"
                )
        return found

    def first_synset(self, word: str) -> int | None:
        """Return the offset of a word's first synset, or None: nouns before verbs, adjectives, adverbs."""
        word = word.lower()
        if word not in self._known:
            offsets = (self._index[part].get(form) for part in PARTS for form in self._forms(word, part))
            self._known[word] = next((offset for offset in offsets if offset is not None), None)
        return self._known[word]

    def _forms(self, word: str, part: str) -> list[str]:
        """Return the indexed words that a word may be a form of: itself, then without one ending, then without more."""
        index, exceptions = self._index[part], self._exceptions[part]
        if word in exceptions:
            return [form for form in (word, *exceptions[word]) if form in index]
        forms = [word]
        found: list[str] = []
        while forms and not found:
            shorter = [
                form.removesuffix(old) + new for form in forms for old, new in _ENDINGS[part] if form.endswith(old)
            ]
            found = [form for form in ([word, *shorter] if forms == [word] else shorter) if form in index]
            forms = shorter
        return found

    @cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        """The offset of the first synset by part of speech and lemma."""
        _ = self.files
        found: dict[str, dict[str, int]] = {}
        for part in PARTS:
            path = self.folder / f"index.{part}"
            found[part] = {}
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.startswith(" "):
                    continue  # the licence
                fields = line.split()
                try:  # lemma, part, synsets, pointers, as many pointer symbols, senses, tagged senses, offsets
                    found[part][fields[0]] = int(fields[4 + int(fields[3]) + 2])
                except (IndexError, ValueError) as error:
                    raise WordNetError(f"{path}: not WordNet's index: {line[:60]!r}. Remedy: another folder") from error
        return found

    @cached_property
    def _exceptions(self) -> dict[str, dict[str, list[str]]]:
        """The lemmas of irregular forms by part of speech."""
        found: dict[str, dict[str, list[str]]] = {}
        for part in PARTS:
            lines = (self.folder / f"{part}.exc").read_text(encoding="utf-8").splitlines()
            found[part] = {form: lemmas for form, *lemmas in (line.split() for line in lines if line.strip())}
        return found


def read_synsets(path: str) -> frozenset[int]:
    """Read a list of synsets, one per line: `n02084071` as in ImageNet, or the offset alone.

    Raises:
        WordNetError: the file is missing or empty, or a line is no synset.
    """
    found = set()
    for line in existing(path).read_text(encoding="utf-8").split():
        try:
            found.add(int(line.lstrip("nvars")))
        except ValueError:
            raise WordNetError(f"{path}: {line!r} is no synset. Remedy: one per line, such as n02084071") from None
    if not found:
        raise WordNetError(f"{path}: this list of synsets is empty. Remedy: another list")
    return frozenset(found)


def existing(path: str) -> Path:
    """Return the path of a list of synsets.

    Raises:
        WordNetError: the file is missing.
    """
    if not Path(path).is_file():
        raise WordNetError(f"{path}: no such list of synsets. Remedy: correct scores.captions.synsets")
    return Path(path)


def digest(paths: list[Path]) -> str:
    """Return a SHA-256 of files' contents: that of their digests, one after the other."""
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in paths)).hexdigest()
