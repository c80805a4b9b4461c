"""The folder that a long computation works in, beside the result that it writes, so that it can be resumed.

Here: the folder, its state, its arrays and its parts. Not here: their meaning (the assets define it), nor results,
which are never written in place (`resources.lake.files`).
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from resources.lake.files import Lake, LakeError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZEROS = bytes(1 << 20)
_STATE = "state.json"

Arrays = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]
"""Dtype and shape of each array, by the name of its file."""


class WorkFolder:
    """A folder of the lake with a state, arrays that are written through memory, and parts.

    The state is one JSON object in `state.json`. It is replaced atomically and after the arrays are flushed, so it
    never claims more than the arrays hold. A folder without a state has not begun.

    Args:
        lake: the lake.
        name: path of the folder in the lake, such as `dynamic_rounds/b32`.

    Attributes:
        state: the state as it was read or last saved; `{}` before `begin`.
    """

    def __init__(self, lake: Lake, name: str) -> None:
        self.lake = lake
        self.name = name
        self.state: dict[str, Any] = self.read_state()
        self._open: dict[str, np.memmap] = {}

    @property
    def url(self) -> str:
        """The folder's path in the lake's file system."""
        return f"{self.lake.root}/{self.name}"

    @property
    def path(self) -> Path:
        """The folder as a local path, which arrays need.

        Raises:
            LakeError: the lake is not in a local folder.
        """
        return self.lake.local_root() / self.name

    # State

    def read_state(self) -> dict[str, Any]:
        """Read the state that is stored now, `{}` if there is none; `state` is not changed."""
        place = f"{self.url}/{_STATE}"
        return json.loads(self.lake.fs.cat_file(place)) if self.lake.fs.exists(place) else {}

    def is_of(self, provenance: str) -> bool:
        """Return whether the state holds this digest of a provenance."""
        return bool(self.state.get("provenance") == provenance)

    def is_complete(self, names: Collection[str]) -> bool:
        """Return whether the work has begun and all of these files are there."""
        return bool(self.state) and all(self.lake.fs.exists(f"{self.url}/{name}") for name in names)

    def begin(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Start over: remove the stored state, set a new one, and make arrays of zeros.

        The new state is stored by the first `save`, when the arrays have been filled.

        Args:
            state: the new state.
            arrays: arrays to make.

        Raises:
            LakeError: there is no room for the arrays.
        """
        (self.path / _STATE).unlink(missing_ok=True)
        self._open = {}
        self.state = dict(state)
        reserve(self.path, {name: math.prod(shape) * np.dtype(kind).itemsize for name, (kind, shape) in arrays.items()})

    def save(self, **changes: Any) -> None:
        """Flush all arrays, then store the state with some fields changed."""
        self.state |= changes
        self.flush()
        with self.lake.replacing(f"{self.url}/{_STATE}") as temporary:
            temporary.write_text(json.dumps(self.state), encoding="utf-8")

    # Arrays

    def array(
        self,
        name: str,
        dtype: DTypeLike,
        shape: tuple[int, ...] | None = None,
        mode: Literal["r", "r+"] = "r",
    ) -> np.memmap:
        """Map an array of the folder into memory.

        Args:
            name: its file.
            dtype: its dtype.
            shape: its shape; by default one axis, as long as the file.
            mode: "r+" for writing; `save` and `flush` then write it to disk. The array stays open, and the same one
                is returned again.
        """
        if mode == "r":
            return np.memmap(self.path / name, dtype, mode=mode, shape=shape)
        if name not in self._open:
            self._open[name] = np.memmap(self.path / name, dtype, mode=mode, shape=shape)
        return self._open[name]

    def flush(self) -> None:
        """Write the arrays that are open for writing to disk."""
        for opened in self._open.values():
            opened.flush()

    def remove(self, name: str) -> None:
        """Remove the file of an array that is no longer needed."""
        self._open.pop(name, None)
        (self.path / name).unlink(missing_ok=True)

    # Parts

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local temporary file that becomes the part `name` when the block ends without an error."""
        with self.lake.replacing(f"{self.url}/{name}") as temporary:
            yield temporary

    def parts(self, prefix: str = "") -> list[str]:
        """Return the paths of the parts whose names start with `prefix`, sorted, for `lake.fs`."""
        if not self.lake.fs.exists(self.url):
            return []
        listed = sorted(self.lake.fs.ls(self.url, detail=False, refresh=True))
        names = {path: path.rsplit("/", 1)[-1] for path in listed}
        return [path for path, name in names.items() if name != _STATE and name[0] != "." and name.startswith(prefix)]

    # The folder as a whole

    def clear(self) -> None:
        """Remove the folder, if there is one."""
        if self.lake.fs.exists(self.url):
            self.lake.fs.rm(self.url, recursive=True)
        self.state, self._open = {}, {}

    def remove_siblings(self, keep: Collection[str]) -> None:
        """Remove the folders beside this one, except those of the names in `keep`."""
        for folder in self.path.parent.glob("*/"):
            if folder.name != self.path.name and folder.name not in keep:
                shutil.rmtree(folder)


def reserve(folder: Path, sizes: Mapping[str, int]) -> None:
    """Make files of zeros that have all their bytes on the disk, so that they can be written to through memory.

    A sparse file gets its bytes as they are written; if the disk is full then, the process is killed (SIGBUS).

    Args:
        folder: where; it is made.
        sizes: of each file in bytes, by name. A process that has an old file of that name open keeps it.

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
