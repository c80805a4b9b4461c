"""Similarities that a shard's metadata stores, compared with the embeddings beside it.

Both files of a shard are read by position. Where the metadata stores the cosine of the very embeddings that are read,
the two show whether their rows are in the same order. Not here: reading the files (`resources.pools.datacomp`).
"""

import re
from collections.abc import Sequence

import numpy as np

from resources.pools.base import PoolError

ROWS = 20_000
"""Rows that are compared at most."""
TOLERANCE = 0.02
"""Largest difference that is no contradiction: stored embeddings come within 0.003, float16 included."""
SHARE = 0.01
"""Share of the compared rows that may differ more; fewer odd values are no sign of another order."""
_NORM_TOLERANCE = 0.01
_IMAGE = re.compile(r"(.+)_img|oai-clip-vit-(.+)-image")
_TEXT = re.compile(r"(.+)_txt|oai-clip-vit-(.+)-text")


def score_column(image: str | None, text: str | None) -> str | None:
    """Return the column of `raw_pool` that holds the cosines of two arrays, by their names; None for other arrays."""
    found = [pattern.fullmatch(name or "") for pattern, name in ((_IMAGE, image), (_TEXT, text))]
    models = {match and (match[1] or match[2]) for match in found}
    model = models.pop()
    return f"clip_{model}_similarity_score" if model and not models else None


def sampled_rows(total: int) -> np.ndarray:
    """Return the rows to compare, int64 `[n]`, ascending: all, or `ROWS` chosen at random with a fixed seed."""
    if total <= ROWS:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, ROWS, replace=False))


def require_same_order(
    stored: np.ndarray, image: np.ndarray, text: np.ndarray, *, uids: Sequence[str | None], where: str, column: str
) -> None:
    """Check stored similarities against the cosines of the embeddings.

    Rows are left out where the stored value is NaN or no cosine, or an embedding is not of unit norm.

    Args:
        stored: the stored values `[n]`, float.
        image: image embeddings of the same rows `[n, d]`, float32.
        text: text embeddings `[n, d]`, float32.
        uids: the rows' uids as the metadata has them, for the message.
        where: the shard and its files, for the message.
        column: the stored column, for the message.

    Raises:
        PoolError: more than `SHARE` of the rows, and at least two, differ by more than `TOLERANCE`.
    """
    comparable = np.isfinite(stored) & (np.abs(stored) <= 1 + TOLERANCE)
    for vectors in (image, text):
        comparable &= np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _NORM_TOLERANCE
    rows = np.flatnonzero(comparable)
    cosines = np.einsum("nd,nd->n", image[rows], text[rows])
    off = np.abs(cosines - stored[rows])
    far = int((off > TOLERANCE).sum())
    if far < 2 or far <= SHARE * len(rows):  # a single row cannot be in another order
        return
    worst = int(off.argmax())
    raise PoolError(
        f"{where} contradict each other: in {far:,} of {len(rows):,} rows compared, {column} differs from the cosine "
        f"of the embeddings by more than {TOLERANCE}, most in uid {uids[rows[worst]]}: {column} is "
        f"{stored[rows[worst]]:.4f}, the cosine is {cosines[worst]:.4f}. Rows are matched by position, so the two "
        "files are probably in different orders, and none can be trusted. Download both again, or write them in one "
        "order; if the column is of another model, rename or remove it."
    )
