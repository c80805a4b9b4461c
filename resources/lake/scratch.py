"""Files that a long computation works on in place, beside the result that it will write.

Here: their bytes. Not here: what is in them (the assets know), nor results, which are never written in place
(`resources.lake.files`).
"""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from resources.lake.files import LakeError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZEROS = bytes(1 << 20)


def reserve(folder: Path, sizes: Mapping[str, int]) -> None:
    """Make files of zeros that have all their bytes on the disk, so that they can be written to through memory.

    A file that merely says how long it is gets its bytes as they are written; where the disk is full then, the process
    is killed (SIGBUS).

    Args:
        folder: where; it is made.
        sizes: of each file in bytes, by name; whoever has a file of that name open keeps the old one.

    Raises:
        LakeError: there is no room; none of the files is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, size in sizes.items():
            (folder / name).unlink(missing_ok=True)
            with open(folder / name, "wb") as file:
                _reserve(file.fileno(), size)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        for name in sizes:
            (folder / name).unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        raise LakeError(
            f"{folder}: no room for {sum(sizes.values()):,} bytes ({error.strerror}; {free:,} are free on that disk). "
            "Remedy: make room there, or move the lake to a larger disk"
        ) from error


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        if size:
            os.posix_fallocate(file, 0, size)
        return
    while size:  # macOS
        size -= os.write(file, _ZEROS[:size])
