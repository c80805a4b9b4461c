"""The samples of an arm of an evaluation.

NumPy only. Here: which samples, by keyed hash. Not here: their pictures, and the order of training.
"""

import numpy as np
from numpy.typing import NDArray

from selection.scores.negatives import keyed_hash


def hash_order(
    f0: NDArray[np.uint64], f1: NDArray[np.uint64], copies: NDArray[np.int64], *, seed: int
) -> NDArray[np.int64]:
    """Compute the order in which samples are drawn from rows, without replacement.

    The first n samples are a uniform draw of n, for every n. They do not depend on the order of the rows. Two arms that
    share rows draw them alike.

    Args:
        f0: uint64 [n], the uids.
        f1: uint64 [n].
        copies: int64 [n], how often the arm has each row.
        seed: seed of the draw.

    Returns:
        int64 [sum of copies], row numbers.
    """
    rows = np.repeat(np.arange(len(f0)), copies)
    copy = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    hashes = np.empty(len(rows), np.uint64)
    for number in np.unique(copy):
        at = copy == number
        hashes[at] = keyed_hash(seed, int(number), f0[rows[at]], f1[rows[at]])
    return rows[np.lexsort((f1[rows], f0[rows], hashes))]
