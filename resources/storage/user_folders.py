"""The project's folders in a user's home, by the XDG base directory specification."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder of what can be deleted at any time: in `XDG_CACHE_HOME`, else in `~/.cache`."""
    return _folder("XDG_CACHE_HOME", ".cache")


def user_state() -> Path:
    """Return the folder of what must not be lost: in `XDG_STATE_HOME`, else in `~/.local/state`."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "clip-data-selection"
