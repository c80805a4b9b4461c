"""Vectors of an asset with one file per shard: of a shard, and rows chosen by shard and position."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from resources.lake.ahead import read_ahead
from resources.lake.files import Lake
from resources.lake.sealed import Vectors

Spread = Callable[[Iterable[tuple[str, np.ndarray]]], Iterator[list[np.ndarray]]]
"""Reads rows of shards, in order."""


class ShardVectors(Mapping[str, Vectors]):
    """One column of vectors by shard. Files stay open once they are, so that each of their blocks is verified once.

    Args:
        lake: The lake.
        asset: Key of the asset, such as `embeddings/b32`.
        column: Its column of vectors.
    """

    def __init__(self, lake: Lake, asset: str, column: str) -> None:
        self._lake, self._asset, self._column = lake, asset, column
        self._open: dict[str, Vectors] = {}

    def __getitem__(self, shard: str) -> Vectors:
        """Open a shard's vectors.

        Raises:
            LakeError: there is no such file, or it is damaged.
        """
        if shard not in self._open:
            (self._open[shard],) = self._lake.vectors(self._asset, shard, columns=[self._column])
        return self._open[shard]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lake.shards(self._asset))

    def __len__(self) -> int:
        return len(self._lake.shards(self._asset))


def gather(
    lake: Lake,
    asset: str,
    columns: Sequence[str],
    shards: Sequence[str],
    shard_numbers: np.ndarray,
    rows: np.ndarray,
    *,
    spread: Spread | None = None,
) -> list[np.ndarray]:
    """Read chosen rows of vector columns. Each shard is opened once, and only if it has a chosen row.

    Args:
        lake: The lake.
        asset: Key of the asset, such as `embeddings/b32`.
        columns: Its columns of vectors, such as `image` and `text`.
        shards: Names of shards, at least one.
        shard_numbers: Position in `shards` of each chosen row's shard, integers `[n]`.
        rows: Position of each chosen row in its shard, integers `[n]`.
        spread: Yields `read_rows(lake, asset, columns, shard, rows)` of each pair of a shard and rows, in order, such
            as by several workers; by default here.

    Returns:
        For each column float16 `[n, d]`, in the order of `rows`.

    Raises:
        ValueError: There are no shards.
        IndexError: A shard or a row does not exist.
        LakeError: A shard has no file, or it is damaged where a chosen row is.
    """
    if not len(shards):
        raise ValueError(f"{asset}: no shards to gather rows from")
    order = np.argsort(shard_numbers, kind="stable")
    numbers, starts = np.unique(shard_numbers[order], return_index=True)
    # Without chosen rows, the first shard still gives the width d.
    parts = list(zip(numbers, np.split(order, starts[1:]), strict=True)) if len(order) else [(0, order)]
    chosen = [(shards[number], rows[places]) for number, places in parts]
    read = spread(chosen) if spread else _read_here(lake, asset, columns, chosen)
    found: list[np.ndarray] = []
    for (_, places), arrays in zip(parts, read, strict=True):
        found = found or [np.empty((len(rows), array.shape[1]), np.float16) for array in arrays]
        for out, array in zip(found, arrays, strict=True):
            out[places] = array
    return found


def _read_here(
    lake: Lake, asset: str, columns: Sequence[str], chosen: Sequence[tuple[str, np.ndarray]]
) -> Iterator[list[np.ndarray]]:
    ahead = read_ahead(lake, [[(asset, shard)] for shard, _ in chosen])
    for (shard, rows), _ in zip(chosen, ahead, strict=True):
        yield read_rows(lake, asset, columns, shard, rows)


def read_rows(lake: Lake, asset: str, columns: Sequence[str], shard: str, rows: np.ndarray) -> list[np.ndarray]:
    """Read chosen rows of one shard: for each column float16 `[n, d]`."""
    return [vectors[rows] for vectors in lake.vectors(asset, shard, columns=columns)]
