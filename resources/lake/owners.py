"""The writers of temporary files: names that no two writers share, and whether a name's writer has ended.

A process id alone does not identify a writer: two containers that share a folder may have the same ids. A token also
holds a hash of the machine's start and of the process-id namespace, within which an id has one process at a time. It
ends with a random part, because threads of one process may write the same file. A temporary file is created
exclusively, so a writer whose name exists already takes another one.

A file is abandoned if its writer was a process of this namespace and has ended, or if the writer is unknown and the
file has not changed for a day.
"""

import os
import secrets
import socket
import time
from functools import cache
from pathlib import Path

from core.hashing import digest

STRAY_AFTER_SECONDS = 24 * 3600
"""Age since its last change at which a temporary file of an unknown writer counts as abandoned."""


_BOOT_ID, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


def create_temporary(folder: Path, prefix: str, suffix: str, *, is_folder: bool = False) -> Path:
    """Create an empty temporary file or folder that no other writer has, and return its path.

    Args:
        folder: where.
        prefix: of its name, before the token.
        suffix: of its name, after the token.
        is_folder: create a folder.
    """
    while True:
        path = folder / f"{prefix}{token()}{suffix}"
        try:
            if is_folder:
                path.mkdir()
            else:
                path.touch(exist_ok=False)  # O_EXCL
        except FileExistsError:
            continue
        return path


def token() -> str:
    """Return a token: `<place>-<process id>-<random>`, without dots."""
    return f"{_place()}-{os.getpid()}-{secrets.token_hex(8)}"


def is_ended(written_by: str) -> bool:
    """Check whether a token's process was one of this machine, and has ended."""
    place, _, rest = written_by.partition("-")
    pid = rest.partition("-")[0]
    return place == _place() and pid.isdigit() and not _is_running(int(pid))


def is_abandoned(path: Path, written_by: str) -> bool:
    """Check whether a temporary file has no writer any more.

    Args:
        path: the file; its time of modification counts where the writer is unknown.
        written_by: the token in its name.
    """
    if is_ended(written_by):
        return True
    try:
        return time.time() - path.stat().st_mtime > STRAY_AFTER_SECONDS
    except FileNotFoundError:
        return False  # finished or removed meanwhile


@cache
def _place() -> str:
    """Return a hash of what process ids are unique in: the machine since its start, and the namespace of the ids.

    Where the system does not state both, the place is random: the writer is then unknown to every other process.
    """
    try:
        parts = [_BOOT_ID.read_text(encoding="ascii").strip(), os.readlink(_NAMESPACE)]
    except OSError:
        return secrets.token_hex(6)
    return digest([socket.gethostname(), *parts])[:12]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
