"""Soft cap sampling without its shortcuts."""

import math

from selection.scores.negatives import keyed_hash


def draw_row_by_row(values, f0, f1, samples, batch, penalty, temperature, seed):
    """Return how often each row is drawn, in plain Python that sorts all rows in every round."""
    copies, left, round_ = [0] * len(values), samples, 0
    while left:
        keys = []
        for i, value in enumerate(values):
            bits = int(keyed_hash(seed, 2**63 + round_, f0[i : i + 1], f1[i : i + 1])[0]) >> 12
            gumbel = -math.log(-math.log((bits + 0.5) / 2**52))
            keys.append(((value - penalty * copies[i]) / temperature + gumbel, -int(f0[i]), -int(f1[i]), i))
        take = min(batch, left, len(values))
        for *_, i in sorted(keys, reverse=True)[:take]:
            copies[i] += 1
        left, round_ = left - take, round_ + 1
    return copies
