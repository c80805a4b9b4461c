"""Soft cap sampling (arXiv 2503.08805): draw rows by their value; every draw makes a row less likely.

NumPy only. Here: the draws. Not here: the rows that enter, and what becomes of the copies.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from selection.scores.negatives import keyed_hash

_ROWS = 1 << 18  # a thread handles at once
# First number of a draw in the keyed hash. Draws of negatives count from 0, so equal seeds give independent draws.
_APART = 1 << 63


def soft_cap_sample(
    values: NDArray[np.float64],
    f0: NDArray[np.uint64],
    f1: NDArray[np.uint64],
    *,
    samples: int,
    batch: int,
    penalty: float,
    temperature: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Draw samples; a row may be drawn in several rounds.

    Round r draws min(batch, remaining draws, n) rows without replacement, one after the other with probabilities
    proportional to exp((value_i − penalty · c_i) / τ), where c_i counts the draws of row i in earlier rounds. This is
    the same as taking the largest (value_i − penalty · c_i) / τ + g_i with independent standard Gumbel g_i (Yellott
    1977). The g_i come from a keyed hash of (seed, r, uid), so the result does not depend on the order of rows or the
    number of threads.

    Args:
        values: Finite float64 of shape [n]; n at least 1.
        f0: First halves of the uids, uint64 of shape [n].
        f1: Second halves.
        samples: Number of draws, at least 1.
        batch: Draws of a round, at least 1.
        penalty: Subtracted from a row's value for each earlier draw.
        temperature: τ, above 0.
        seed: Any integer.

    Returns:
        Number of draws of each row, int64 of shape [n]; the sum is `samples`.

    Raises:
        ValueError: There are no rows, shapes differ, a value is not finite, or an argument is out of its range.
    """
    n = len(values)
    if not n or not (values.shape == f0.shape == f1.shape == (n,)) or not np.isfinite(values).all():
        raise ValueError(
            f"values, f0 and f1 are finite arrays of one length above 0, not {values.shape} and {f0.shape}"
        )
    if samples < 1 or batch < 1 or temperature <= 0:
        raise ValueError(f"samples, batch and temperature are above 0, not {samples}, {batch} and {temperature}")
    with np.errstate(over="ignore"):
        logits, step = values / temperature, penalty / temperature
    if not np.isfinite(logits).all() or not np.isfinite(step):
        raise ValueError(f"temperature {temperature!r} is too small for such values and penalty: a quotient overflows")
    copies, keys = np.zeros(n, np.int64), np.empty(n)
    spans = [slice(start, start + _ROWS) for start in range(0, n, _ROWS)]
    drawn, round_ = 0, 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while drawn < samples:
            take = min(batch, samples - drawn, n)

            def fill(at: slice, draw: int = _APART + round_) -> None:
                keys[at] = logits[at] - step * copies[at] + _gumbel(seed, draw, f0[at], f1[at])

            list(threads.map(fill, spans))
            copies[_largest(keys, take, f0, f1)] += 1
            drawn, round_ = drawn + take, round_ + 1
    return copies


def _gumbel(seed: int, draw: int, f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return standard Gumbel numbers −log(−log u); u is the middle of one of 2⁵² equal parts of [0, 1]."""
    places = (keyed_hash(seed, draw, f0, f1) >> np.uint64(12)).astype(np.float64)
    return -np.log(-np.log((places + 0.5) * 2.0**-52))


def _largest(keys: NDArray[np.float64], take: int, f0: NDArray[np.uint64], f1: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the indices of the `take` largest keys; smaller uids win ties."""
    last = np.partition(keys, len(keys) - take)[len(keys) - take]
    above, equal = np.flatnonzero(keys > last), np.flatnonzero(keys == last)
    by_uid = equal[np.lexsort((f1[equal], f0[equal]))]
    return np.concatenate([above, by_uid[: take - len(above)]])
