"""New webdataset tars that hold chosen samples of an old one, byte for byte.

Here: keys of copies, and writing. Not here: grouping members into samples (`resources.storage.tar_samples`), and which
samples are selected.
"""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
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
    """

    source_key: str
    key: str
    copy: int


def copies(chosen: Iterable[tuple[str, int]]) -> list[Copy]:
    """Assign a key to every copy of a sample: `key`, then `key_1`, `key_2`, ..., skipping keys of other samples.

    Args:
        chosen: keys, each once, and the number of copies.
    """
    wanted = [(key, times) for key, times in chosen if times]
    taken = {key for key, _ in wanted}
    written = []
    for source_key, times in wanted:
        written.append(Copy(source_key, source_key, 0))
        number = 0
        for copy in range(1, times):
            number += 1
            while (key := f"{source_key}_{number}") in taken:
                number += 1
            taken.add(key)
            written.append(Copy(source_key, key, copy))
    return written


def write_tar(path: Path, view: memoryview, found: Mapping[str, Sequence[Member]], wanted: Iterable[Copy]) -> None:
    """Write a tar. The same samples give the same bytes: owner, mode and time are fixed.

    Args:
        path: the new tar.
        view: the source tar's bytes.
        found: its members by key.
        wanted: copies to write, in this order.
    """
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for copy in wanted:
            for member in found[copy.source_key]:
                _, suffix = split_name(member.name)
                info = tarfile.TarInfo(f"{copy.key}.{suffix}")
                info.size = member.size
                tar.addfile(info, io.BytesIO(view[member.offset : member.offset + member.size]))
