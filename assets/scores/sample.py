"""A sample of the pool's rows by keyed hash, for assets that are trained or computed from part of the pool."""

from collections.abc import Iterator, Sequence

import numpy as np

from resources.lake.files import Lake


def sample_rows(lake: Lake, source: str, shards: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Choose rows of some shards.

    Args:
        lake: the lake.
        source: key of the asset whose rows are sampled, such as `embeddings/b32`.
        shards: names of shards.
        size: number of rows; all rows, if there are fewer.
        seed: chooses the rows.

    Returns:
        `CANDIDATE` records [n]: uid, the position in `shards` of the row's shard, and its position in that shard; in
        an order that only the uids decide.
    """
    from selection.scores.negatives import candidates, merge

    def drawn() -> Iterator[np.ndarray]:
        for number, shard in enumerate(shards):
            uids = lake.read(source, shard, ["f0", "f1"])
            f0, f1 = uids["f0"].to_numpy(), uids["f1"].to_numpy()
            yield candidates(f0, f1, draws=1, size=size, seed=seed, shard=number)

    (chosen,) = merge(drawn(), size)
    return np.asarray(chosen)
