"""Suggestions for names that do not exist."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
    """Return up to three known names that resemble a name, the most similar first; case does not matter."""
    by_fold = {candidate.casefold(): candidate for candidate in known}
    return [by_fold[found] for found in difflib.get_close_matches(name.casefold(), by_fold, cutoff=cutoff)]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint for a name that does not exist: "did you mean …?", else the list of known names."""
    names = list(known)
    found = closest(name, names)
    return f"did you mean {' or '.join(found)}?" if found else f"known: {', '.join(sorted(names)) or 'none'}"
