"""Rows of vectors chosen by shard and position, from an asset with one file per shard."""

from collections.abc import Sequence

import numpy as np

from resources.lake.files import Lake, column_to_vectors


def gather(
    lake: Lake,
    asset: str,
    columns: Sequence[str],
    shards: Sequence[str],
    shard_numbers: np.ndarray,
    rows: np.ndarray,
) -> list[np.ndarray]:
    """Read chosen rows of vector columns. Each shard is read once, and only if it has a chosen row.

    Args:
        lake: The lake.
        asset: Key of the asset, such as `embeddings/b32`.
        columns: Its columns of vectors, such as `image` and `text`.
        shards: Names of shards, at least one.
        shard_numbers: Position in `shards` of each chosen row's shard, integers `[n]`.
        rows: Position of each chosen row in its shard, integers `[n]`.

    Returns:
        For each column float16 `[n, d]`, in the order of `rows`.

    Raises:
        ValueError: There are no shards.
        IndexError: A shard or a row does not exist.
        LakeError: A shard has no file.
    """
    if not len(shards):
        raise ValueError(f"{asset}: no shards to gather rows from")
    order = np.argsort(shard_numbers, kind="stable")
    numbers, starts = np.unique(shard_numbers[order], return_index=True)
    # Without chosen rows, the first shard still gives the width d.
    parts = list(zip(numbers, np.split(order, starts[1:]), strict=True)) if len(order) else [(0, order)]
    found: list[np.ndarray] = []
    for number, places in parts:
        table = lake.read(asset, shards[number], list(columns))
        vectors = [column_to_vectors(table[column]) for column in columns]
        found = found or [np.empty((len(rows), v.shape[1]), v.dtype) for v in vectors]
        for out, v in zip(found, vectors, strict=True):
            out[places] = v[rows[places]]
    return found
