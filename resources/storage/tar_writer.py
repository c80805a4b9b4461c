"""New webdataset tars that hold chosen samples of an old one, byte for byte.

Here: keys of copies, and writing. Not here: grouping members into samples (`resources.storage.tar_samples`), and which
samples are selected.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from resources.storage.tar_samples import split_name
from resources.storage.tars import Member


@dataclass(frozen=True)
class Copy:
    """A sample to write.

    Attributes:
        source_key: its key in the source tar.
        key: its key in the new tar: the same, but for the second and later copies of a sample.
        copy: 0 for the first copy.
        row: its number among the chosen samples.
    """

    source_key: str
    key: str
    copy: int
    row: int = 0


def copies(chosen: Iterable[tuple[str, int]]) -> list[Copy]:
    """Assign a key to every copy of a sample: `key`, then `key_1`, `key_2`, ..., skipping keys of other samples.

    Args:
        chosen: keys and the number of copies. A key that comes again, in another tar, counts as a copy.
    """
    wanted = [(row, key, times) for row, (key, times) in enumerate(chosen) if times]
    keys = {key for _, key, _ in wanted}
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    written = []
    for row, source_key, times in wanted:
        for copy in range(times):
            key, number = source_key, numbers.get(source_key, 0)
            while key in taken or (number and key in keys):
                number += 1
                key = f"{source_key}_{number}"
            numbers[source_key] = number
            taken.add(key)
            written.append(Copy(source_key, key, copy, row))
    return written


@contextmanager
def new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a new tar for `copy_samples`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        yield tar


def copy_samples(
    tar: tarfile.TarFile, view: memoryview, found: Mapping[str, Sequence[Member]], wanted: Iterable[Copy]
) -> None:
    """Copy samples to a tar. The same samples give the same bytes: owner, mode and time are fixed.

    Args:
        tar: the new tar.
        view: the source tar's bytes.
        found: its members by key.
        wanted: copies to write, in this order.
    """
    for copy in wanted:
        for member in found[copy.source_key]:
            _, suffix = split_name(member.name)
            info = tarfile.TarInfo(f"{copy.key}.{suffix}")
            info.size = member.size
            tar.addfile(info, io.BytesIO(view[member.offset : member.offset + member.size]))
