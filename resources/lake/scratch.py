"""The folder that a long computation works in, beside the result that it writes, so that it can be resumed.

Here: the folder, its state, its arrays and its parts. Not here: their meaning (the assets define it), nor results,
which are never written in place (`resources.lake.files`).
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from resources.lake.files import Lake, LakeError
from resources.lake.owners import create_temporary, token

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZEROS = bytes(1 << 20)
_STATE = "state.json"
_ARRAYS = "arrays"  # of a remote lake: the folder of the arrays' copies
CHECKPOINT_SECONDS = 60

Arrays = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]
"""Dtype and shape of each array, by the name of its file."""


class WorkFolder:
    """A folder of the lake with a state, arrays that are written through memory, and parts.

    The state is one JSON object in `state.json`. It is replaced atomically and after the arrays are flushed, so it
    never claims more than the arrays hold. A folder without a state has not begun.

    Of a remote lake, state and arrays are in a local scratch folder. A `save` copies them to the lake when the last
    copy is older than `CHECKPOINT_SECONDS`, the state last; another machine goes on from there.

    Args:
        lake: the lake.
        name: path of the folder in the lake, such as `dynamic_rounds/b32`.

    Attributes:
        state: the state as it was read or last saved; `{}` before `begin`.
    """

    def __init__(self, lake: Lake, name: str) -> None:
        self.lake = lake
        self.name = name
        self._open: dict[str, np.memmap] = {}
        self._copied = -math.inf
        self._work, self._saves = "", 0
        self._shared: set[str] = set()
        if not lake.is_local:
            self._restore()
        self.state: dict[str, Any] = self.read_state()

    @property
    def url(self) -> str:
        """The folder's path in the lake's file system."""
        return f"{self.lake.root}/{self.name}"

    @property
    def path(self) -> Path:
        """The folder of the arrays, a local path."""
        return self.lake.scratch_folder / self.name

    # State

    def read_state(self) -> dict[str, Any]:
        """Read the state that is stored now, `{}` if there is none; `state` is not changed."""
        place = self.path / _STATE
        found = json.loads(place.read_bytes()) if place.exists() else {}
        if self.lake.is_local or not found:
            return dict(found)
        self._work, self._saves = found["work"], found["saves"]
        return dict(found["state"])

    def _restore(self) -> None:
        """Make the scratch folder hold what the lake has, unless it goes on from that."""
        place = f"{self.url}/{_STATE}"
        kept = json.loads(self.lake.store.read(place)) if self.lake.exists(place) else None
        mine = json.loads((self.path / _STATE).read_bytes()) if (self.path / _STATE).exists() else None
        if kept is None or (mine is not None and mine["work"] == kept["work"] and mine["saves"] >= kept["saves"]):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for entry in self.lake.store.files(f"{self.url}/{_ARRAYS}"):
            shutil.copyfile(self.lake.store.local(entry.location), self.path / entry.name)
        (self.path / _STATE).write_text(json.dumps(kept), encoding="utf-8")

    def is_of(self, provenance: str) -> bool:
        """Return whether the state holds this digest of a provenance."""
        return bool(self.state.get("provenance") == provenance)

    def is_complete(self, names: Collection[str]) -> bool:
        """Return whether the work has begun and all of these files are there."""
        return bool(self.state) and all((self.path / name).exists() for name in names)

    def begin(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Start over: remove the stored state, set a new one, and make arrays of zeros.

        The new state is stored by the first `save`, when the arrays have been filled.

        Args:
            state: the new state.
            arrays: arrays to make.

        Raises:
            LakeError: there is no room for the arrays.
        """
        self.lake.store.delete(f"{self.url}/{_STATE}")
        (self.path / _STATE).unlink(missing_ok=True)
        self._work, self._saves = token(), 0
        self._open, self._shared = {}, set()
        self.state = dict(state)
        reserve(self.path, {name: math.prod(shape) * np.dtype(kind).itemsize for name, (kind, shape) in arrays.items()})

    def save(self, **changes: Any) -> None:
        """Flush all arrays, then store the state with some fields changed."""
        self.state |= changes
        self.flush()
        if self.lake.is_local:
            self.lake.put(f"{self.url}/{_STATE}", json.dumps(self.state).encode())
        else:
            self._save_remote()

    def _save_remote(self) -> None:
        place = self.path / _STATE
        self._saves += 1
        text = json.dumps({"work": self._work, "saves": self._saves, "state": self.state})
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = create_temporary(self.path, f".{_STATE}.", ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
        if time.monotonic() - self._copied < CHECKPOINT_SECONDS:
            return
        for path in sorted(self.path.iterdir()):
            if path.name not in (_STATE, *self._shared) and not path.name.startswith("."):
                self.lake.store.put(self._copy(path.name), path)
        self.lake.put(f"{self.url}/{_STATE}", text.encode())
        self._copied = time.monotonic()

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

    def share(self, name: str) -> str:
        """Return where other machines read an array that is complete; of a remote lake a URL, copied there once."""
        if self.lake.is_local:
            return str(self.path / name)
        if name not in self._shared:
            self.flush()
            self.lake.store.put(self._copy(name), self.path / name)
            self._shared.add(name)
        return self._copy(name)

    def _copy(self, name: str) -> str:
        return f"{self.url}/{_ARRAYS}/{name}"

    def flush(self) -> None:
        """Write the arrays that are open for writing to disk."""
        for opened in self._open.values():
            opened.flush()

    def remove(self, name: str) -> None:
        """Remove the file of an array that is no longer needed."""
        self._open.pop(name, None)
        (self.path / name).unlink(missing_ok=True)
        if not self.lake.is_local:
            self._shared.discard(name)
            self.lake.store.delete(self._copy(name))

    # Parts

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local temporary file that becomes the part `name` when the block ends without an error."""
        with self.lake.replacing(f"{self.url}/{name}") as temporary:
            yield temporary

    def parts(self, prefix: str = "") -> list[str]:
        """Return the locations of the parts whose names start with `prefix`, sorted, for `lake.store`."""
        listed = [entry.location for entry in self.lake.store.files(self.url)]
        names = {path: path.rsplit("/", 1)[-1] for path in listed}
        return [path for path, name in names.items() if name != _STATE and name[0] != "." and name.startswith(prefix)]

    def remove_parts(self, prefix: str) -> None:
        """Remove the parts whose names start with `prefix`."""
        for part in self.parts(prefix):
            self.lake.store.delete(part)

    # The folder as a whole

    def clear(self) -> None:
        """Remove the folder, if there is one."""
        self.lake.store.delete_folder(self.url)
        if not self.lake.is_local and self.path.exists():
            shutil.rmtree(self.path)
        self.state, self._open = {}, {}

    def remove_siblings(self, keep: Collection[str]) -> None:
        """Remove the folders beside this one, except those of the names in `keep`."""
        for folder in self.path.parent.glob("*/"):
            if folder.name != self.path.name and folder.name not in keep:
                shutil.rmtree(folder)
        if not self.lake.is_local:
            parent = self.url.rpartition("/")[0]
            for name in self.lake.store.folders(parent):
                if name != self.path.name and name not in keep:
                    self.lake.store.delete_folder(f"{parent}/{name}")


def shared_file(lake: Lake, location: str) -> Path:
    """Return a local path of an array whose location `WorkFolder.share` returned, on any machine."""
    return lake.local(location) if "://" in location else Path(location)


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
