"""SHA-256 of files, bytes and JSON values."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO, cast


def sha256(path: Path) -> str:
    """Return a local file's SHA-256 as 64 hexadecimal characters."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of an open binary file, from its position to its end, as 64 hexadecimal characters."""
    return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form, as 64 hexadecimal characters."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
