"""Copies of remote files that are made while those before are worked on.

Here: the order of copying. Not here: the copies, and how much room they may take (`resources.storage.objects`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from resources.lake.files import Lake

Files = Sequence[tuple[str, str]]
"""Asset and shard of each file."""


def read_ahead(lake: Lake, groups: Sequence[Files]) -> Iterator[None]:
    """Yield once for each group of files, when it is at hand; the next group is copied while the caller works.

    Files of a local lake are always at hand. One that can't be copied is an error when it is read.
    """
    if lake.is_local or not groups:
        yield from (None for _ in groups)
        return
    with ThreadPoolExecutor(1) as pool:
        copied = pool.submit(_copy, lake, groups[0])
        for following in [*groups[1:], []]:
            copied.result()
            copied = pool.submit(_copy, lake, following)
            yield


def _copy(lake: Lake, files: Files) -> None:
    for asset, shard in files:
        with contextlib.suppress(OSError):
            lake.local(lake.path(asset, shard))
