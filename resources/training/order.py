"""The order in which a training run sees its samples: the same for all arms of one size and one seed."""

import numpy as np
from numpy.typing import NDArray


def training_order(samples: int, start: int, stop: int, *, seed: int) -> NDArray[np.int64]:
    """Compute the samples at positions `start` to `stop` of a training run.

    A run goes through all samples in random order, then through all in another order, and so on. A position's sample
    depends on the seed and the number of samples alone, so a resumed run continues with the same samples.

    Args:
        samples: number of samples n, at least 1.
        start: first position, from 0.
        stop: position after the last.
        seed: seed of the run; runs that are paired across arms share it.

    Returns:
        int64 [stop − start], from 0 to n − 1.
    """
    parts = [np.empty(0, np.int64)]
    for epoch in range(start // samples, -(-stop // samples)):
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        first = epoch * samples
        parts.append(order[max(start - first, 0) : stop - first])
    return np.concatenate(parts)
