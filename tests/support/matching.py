"""Target distribution matching without its shortcuts."""

import math

import numpy as np

from selection.scores.negatives import keyed_hash

WEIGHTS = (0.0, 0.01, 0.99)


def thirds(values):
    """Return the bin of each value, 0 to 2; equal values share one."""
    falling = sorted(values, reverse=True)
    high, middle = (falling[math.ceil(len(falling) * third / 3) - 1] for third in (1, 2))
    return [(value >= high) + (value >= middle) for value in values]


def match_row_by_row(features, target, quality, uids, count, trade_off, epsilon=0.1, seed=0):
    """Return the positions of the selected rows in order, in plain Python.

    Args:
        features: of each row, z by concept.
        target: p, by concept.
        quality: the bin of each row.
        uids: (f0, f1) of each row.
        count: rows to select.
        trade_off: λ.
        epsilon: ε.
        seed: of the candidates.
    """
    left = sorted(range(len(uids)), key=lambda row: uids[row])
    draws = math.ceil(len(uids) / count * math.log(1 / epsilon))
    mass, counts, selected = {}, [0, 0, 0], []

    def gain(row):
        level = quality[row]
        parts = [
            target.get(i, 0) * (math.log(1 + mass.get(i, 0) + z) - math.log(1 + mass.get(i, 0)))
            for i, z in features[row].items()
        ]
        return trade_off * sum(parts) + (1 - trade_off) * WEIGHTS[level] * math.log(
            (2 + counts[level]) / (1 + counts[level])
        )

    for step in range(count):
        at = range(len(left))
        if len(left) > draws:
            numbers = np.arange(draws, dtype=np.uint64)
            hashes = keyed_hash(seed, 2**62, np.full(draws, step, np.uint64), numbers)
            at = sorted({int(h) % len(left) for h in hashes})
        best = max(at, key=lambda place: (round(gain(left[place]), 15), [-half for half in uids[left[place]]]))
        row = left[best]
        selected.append(row)
        for i, z in features[row].items():
            mass[i] = mass.get(i, 0) + z
        counts[quality[row]] += 1
        left[best] = left[-1]
        left.pop()
    return selected
