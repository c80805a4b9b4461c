"""The writers of temporary files: names that no two writers share, and whether a name's writer has ended.

A process id alone does not identify a writer: two containers that share a folder may have the same ids. A token also
holds the machine and the process-id namespace, and a random part, because threads of one process may write the same
file.
"""

import os
import secrets
import socket
import time
from functools import cache
from pathlib import Path

from core.hashing import digest

STRAY_AFTER_SECONDS = 24 * 3600
"""Age at which a temporary file of an unknown writer counts as abandoned. Writers change their files all the time."""


def token() -> str:
    """Return a name for a new temporary file: `<place>-<process id>-<random>`, without dots."""
    return f"{_place()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_abandoned(path: Path, written_by: str) -> bool:
    """Check whether a temporary file has no writer any more.

    Args:
        path: the file; its time of modification counts where the writer is unknown.
        written_by: the token in its name.
    """
    place, _, rest = written_by.partition("-")
    pid = rest.partition("-")[0]
    if place == _place() and pid.isdigit() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - path.stat().st_mtime > STRAY_AFTER_SECONDS
    except FileNotFoundError:
        return False  # finished or removed meanwhile


@cache
def _place() -> str:
    """Return a hash of what process ids are unique in: the machine since its start, and the namespace of the ids."""
    parts = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(source)
        if path.exists():
            parts.append(os.readlink(path) if path.is_symlink() else path.read_text(encoding="ascii").strip())
    return digest(parts)[:12]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
