"""The token of `clip-select browse`: one for each user, in a file that only the user can read."""

import contextlib
import os
import secrets
from pathlib import Path

from core.errors import UserError
from resources.storage.user_folders import user_state

TOKEN_FILE = "browse-token"


class TokenError(UserError):
    """The token's file can't be used; the message has the remedy."""


def stored_token(folder: Path | None = None) -> str:
    """Return the user's token, which stays the same between starts; the first start makes it.

    Args:
        folder: of the file, which only its owner can read; by default the user's state folder.

    Raises:
        TokenError: it can't be written or read, or others can read it.
    """
    path = (folder or user_state()) / TOKEN_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            made = path.with_name(f"{TOKEN_FILE}.{secrets.token_hex(8)}")
            with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(made, path)
            made.unlink()
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise TokenError(f"{path}: {error}. Remedy: set XDG_STATE_HOME to a folder that is writable") from error
    if path.stat().st_mode & 0o077:
        raise TokenError(f"{path}: other users can read the token. Remedy: delete the file; the next start makes one")
    if len(token) < 32:
        raise TokenError(f"{path}: no token. Remedy: delete the file; the next start makes one")
    return token
