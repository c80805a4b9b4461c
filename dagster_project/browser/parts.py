"""Parts of a pool: whole shards in the order of a keyed hash, for questions that all rows would answer too slowly.

Here: which shards, how their counts are scaled to the pool, and the sentence that states it. Not here: the questions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.hashing import digest

SEARCHED, JUDGED = 2_000_000, 1_000_000
"""Rows that are searched, and rows on which recipes are judged, at most."""


@dataclass(frozen=True)
class Part:
    """Shards that stand for a pool.

    Attributes:
        shards: their names.
        rows: of these shards.
        total: rows of the pool.
        of: number of the pool's shards.
    """

    shards: tuple[str, ...]
    rows: int
    total: int
    of: int

    @property
    def is_whole(self) -> bool:
        """Whether the part is the pool."""
        return self.rows == self.total

    @property
    def scale(self) -> float:
        """Rows of the pool for each row of the part."""
        return self.total / self.rows if self.rows else 1.0

    def note(self, done: str, scaled: str = "") -> str:
        """Return one sentence about what was done to the part, such as `Searched`, and about its counts."""
        if self.is_whole:
            return f"{done} all {self.total:,} rows."
        how = f"; {scaled}" if scaled else ""
        return f"{done} {self.rows:,} of {self.total:,} rows: whole shards, in the order of a keyed hash{how}."

    def error(self, counted: Sequence[int], known: Sequence[int], total: float) -> int:
        """Return two standard errors of a count of the pool that is estimated as total · Σ counted / Σ known.

        The ratio estimator of cluster sampling, whose clusters are shards drawn without replacement (Cochran,
        *Sampling Techniques*, 6.3).

        Args:
            counted: the rows of each shard of the part that are counted.
            known: of the same shards, rows whose number in the pool is known.
            total: that number.

        Returns:
            0 where it can't be estimated, from fewer than two shards.
        """
        m, mean = len(counted), sum(known) / max(1, len(known))
        if m < 2 or not mean:
            return 0
        ratio = sum(counted) / sum(known)
        residuals = sum((k - ratio * n) ** 2 for k, n in zip(counted, known, strict=True))
        return round(2 * total / mean * math.sqrt(max(0.0, 1 - m / self.of) * residuals / (m * (m - 1))))

    def random_error(self, counted: float) -> int:
        """Return two standard errors of scale · counted, as if rows were drawn at random and not by shards.

        Args:
            counted: k, or of k of n rows whose number in the pool is known, k · (n - k) / n.
        """
        return round(2 * self.scale * math.sqrt(counted * (1 - self.rows / self.total)))


def first_part(sizes: Mapping[str, int], rows: int, first: str | None = None) -> Part:
    """Return the first shards in the order of a keyed hash: at least one with rows, and no more than fit.

    Args:
        sizes: rows of each shard of the pool.
        rows: of the part at most.
        first: a shard that comes before the others.
    """
    taken: list[str] = []
    count = 0
    for shard in sorted(sizes, key=lambda name: (name != first, shard_order(name))):
        if count and count + sizes[shard] > rows:
            break
        taken.append(shard)
        count += sizes[shard]
    return Part(tuple(taken), count, sum(sizes.values()), len(sizes))


def shard_order(shard: str) -> str:
    """Return a keyed hash of a shard's name; in its order, the first shards are a sample of the pool."""
    return digest({"browse": shard})
