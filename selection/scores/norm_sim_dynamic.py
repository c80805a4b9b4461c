"""NormSim_2-D: a set that prunes itself by its own second moment (arXiv 2405.19547); vision embeddings only.

Here: the rounds, which score the current set, find exactly which rows leave, and update the second moment. Not here:
where rows are stored, and how a caller resumes an interrupted run.

Memory does not grow with the number of rows: it holds a chunk of embeddings, three d × d matrices and a histogram. The
state of each row (the round in which it left, its last score) is in arrays of the caller, which may be memory-mapped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selection.scores.norm_sim import moment_factor, norm_sim_from_factor
from selection.similarity.streaming import resident

CHUNK_ROWS = 16_384
GROUP_ROWS = 262_144  # of parts that are computed together; each group's moment is three d × d matrices
_DIGIT = 16  # bits that a pass of the radix search decides
_GRID = 2.0**24  # every float16 is an integer multiple of 1 / _GRID
_LOW = 2.0**12  # splits such an integer into 2¹² · high + low


@dataclass(frozen=True)
class Part:
    """A part of the set's rows, such as a shard; all arrays are in the same order.

    Attributes:
        vectors: returns the float16 image embeddings `[n, d]`, possibly memory-mapped.
        uids: returns f0 and f1, uint64 `[n]`.
        left: int32 `[n]`, read and written: 0 for a row outside the starting set, r for a row that left in round r,
            and number of rounds + 1 for a row still in the set.
        score: float32 `[n]`, written: the row's NormSim_2 to the set of its last round, or, for rows that stay, to
            the final set.
    """

    vectors: Callable[[], NDArray[np.float16]]
    uids: Callable[[], tuple[NDArray[np.uint64], NDArray[np.uint64]]]
    left: NDArray[np.int32]
    score: NDArray[np.float32]


Group = list[tuple[NDArray[np.float16], NDArray[np.int64]]]
"""Vectors `[n, d]` of some parts, and the chosen rows of each."""

Spread = Callable[..., Iterator[Any]]
"""Called as `spread(function, groups, *shared)`, with groups of (number of the part, chosen rows).

Yields `function(group, device, *shared)` of each, in order, such as by several workers; `group` has the vectors in
place of the numbers.
"""


class Round(NamedTuple):
    """The result of one round.

    Attributes:
        round: its number, from 1.
        entered: number of rows before the round.
        left: number of rows that left.
        threshold: the largest score among them.
        tie_f0, tie_f1: the smallest uid that left, where rows with that score left only in part.
    """

    round: int
    entered: int
    left: int
    threshold: float
    tie_f0: int | None
    tie_f1: int | None


@torch.no_grad()
def dynamic_rounds(
    parts: Sequence[Part],
    *,
    keep: int,
    rounds: int,
    device: torch.device,
    done: Sequence[Round] = (),
    on_rows: Callable[[int], None] | None = None,
    spread: Spread | None = None,
) -> Iterator[Round]:
    """Prune a set to `keep` rows: each round drops the rows with the smallest v_iᵀ M v_i, M = Σ v vᵀ over the set.

    A round drops ceil((|S_0| − keep) / rounds) rows, the last round the remainder. Of equal scores the larger uid
    leaves first. Scores are sqrt(v_iᵀ M v_i) in float32, with an error of about 1e-6 of the largest possible score. M
    is exact: subtracting the rows that left gives the same bits as summing the rows that stay.

    Args:
        parts: the rows.
        keep: number of rows to keep.
        rounds: number of rounds.
        device: computes the scores.
        done: completed rounds of an interrupted run, from the first, to resume after. Changes of `left` by later
            rounds are undone.
        on_rows: called with the number of rows that are scored.
        spread: computes groups of parts; by default here.

    Yields:
        The result of each round, once `left` holds all of it.

    Raises:
        ValueError: `keep` or `rounds` is not positive, or the set has fewer than `keep` rows.
    """
    if keep < 1 or rounds < 1:
        raise ValueError(f"keep and rounds must be positive, not {keep} and {rounds}")
    within = rounds + 1
    for part in parts:
        part.left[part.left > len(done)] = within
    size = sum(int((part.left == within).sum()) for part in parts)
    start = done[0].entered if done else size
    if start < keep:
        raise ValueError(f"the set has {start} rows, fewer than the {keep} to keep. Remedy: set a smaller keep")
    spread = spread or _here(parts, device)
    moment = ExactMoment(parts[0].vectors().shape[1], device)
    for sums in spread(group_moment, _groups(parts, within)):
        moment.add_sums(sums)
    for number in range(len(done) + 1, rounds + 1):
        leaving = min(-(-(start - keep) // rounds), size - keep)
        if not leaving:
            break
        _score(parts, within, moment, spread, on_rows)
        bits, tie = _cut(parts, within, leaving)
        for part in parts:
            part.left[_going(part, within, bits, tie)] = number
        for sums in spread(group_moment, _groups(parts, number)):
            moment.add_sums(sums, sign=-1)
        threshold = float(np.array([bits], np.uint32).view(np.float32)[0])
        yield Round(number, size, leaving, threshold, *(tie or (None, None)))
        size -= leaving
    _score(parts, within, moment, spread, on_rows)


class ExactMoment:
    """Σ v vᵀ of float16 vectors, without rounding.

    A float16 is an integer multiple of 2⁻²⁴. Split into 2¹² · high + low, products of such integers are small: float64
    sums those of a chunk exactly, int64 those of 2³⁸ rows. So no bit depends on the order of rows or the number of
    threads, and subtracting a row removes it exactly.

    Args:
        width: d.
        device: holds the sums.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.device = device
        self._high, self._mixed, self._low = torch.zeros(3, width, width, dtype=torch.int64, device=device)

    def add(self, image: Tensor, sign: int = 1) -> None:
        """Add the rows of float16 [m, d] with norms near 1; sign −1 subtracts them."""
        if image.dtype != torch.float16:
            raise ValueError(f"image must be float16, not {image.dtype}")
        for rows in image.split(CHUNK_ROWS):
            whole = rows.double() * _GRID
            high = (whole / _LOW).floor_()
            low = whole - high * _LOW
            # Vᵀ V of V = 2¹² H + L needs HᵀH, HᵀL and LᵀL; LᵀH is the transpose of HᵀL.
            for total, left, right in ((self._high, high, high), (self._mixed, high, low), (self._low, low, low)):
                total.add_((left.T @ right).long(), alpha=sign)

    def sums(self) -> NDArray[np.int64]:
        """Return the sums, `[3, d, d]`: exact, so that those of groups of rows can be added in any order."""
        return torch.stack([self._high, self._mixed, self._low]).cpu().numpy()

    def add_sums(self, sums: NDArray[np.int64], sign: int = 1) -> None:
        """Add the `sums` of other rows; sign −1 subtracts them."""
        for total, some in zip((self._high, self._mixed, self._low), torch.from_numpy(sums), strict=True):
            total.add_(some.to(self.device), alpha=sign)

    def value(self) -> Tensor:
        """Return the moment, float64 [d, d]."""
        mixed = self._mixed + self._mixed.T
        return (self._high.double() * _LOW**2 + mixed.double() * _LOW + self._low.double()) / _GRID**2


def _chunks(
    vectors: NDArray[np.float16], rows: NDArray[np.int64], device: torch.device
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield the given rows in chunks: their indices, and float16 [m, d] on the device."""

    def read(at: slice) -> list[Tensor]:
        return [torch.from_numpy(vectors[rows[at]])]

    for at, (image,) in resident(len(rows), CHUNK_ROWS, device, read):
        yield rows[at], image


def _here(parts: Sequence[Part], device: torch.device) -> Spread:
    """Return a function that computes groups of parts one after the other."""

    def spread(function: Callable[..., Any], groups: Iterator[Any], *shared: Any) -> Iterator[Any]:
        for group in groups:
            yield function([(parts[number].vectors(), rows) for number, rows in group], device, *shared)

    return spread


def _groups(parts: Sequence[Part], within: int) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """Yield the rows whose `left` is `within`, in groups of neighbouring parts."""
    group: list[tuple[int, NDArray[np.int64]]] = []
    size = 0
    for number, part in enumerate(parts):
        rows = np.flatnonzero(part.left == within)
        if len(rows):
            group.append((number, rows))
            size += len(rows)
        if size >= GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


@torch.no_grad()
def group_moment(group: Group, device: torch.device) -> NDArray[np.int64]:
    """Return the exact sums of the second moment of a group's rows, `[3, d, d]`."""
    moment = ExactMoment(group[0][0].shape[1], device)
    for vectors, rows in group:
        for _, image in _chunks(vectors, rows, device):
            moment.add(image)
    return moment.sums()


@torch.no_grad()
def group_scores(group: Group, device: torch.device, factor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return NormSim_2 of the rows of each part of a group, for the factor `[d, d]` of a second moment."""
    triangle = torch.from_numpy(factor).to(device)
    found = []
    for vectors, rows in group:
        score = [norm_sim_from_factor(image, triangle).cpu().numpy() for _, image in _chunks(vectors, rows, device)]
        found.append(np.concatenate(score))
    return found


def _score(
    parts: Sequence[Part], within: int, moment: ExactMoment, spread: Spread, on_rows: Callable[[int], None] | None
) -> None:
    factor = moment_factor(moment.value()).cpu().numpy()
    found = spread(group_scores, _groups(parts, within), factor)
    for group, scores in zip(_groups(parts, within), found, strict=True):
        for (number, rows), score in zip(group, scores, strict=True):
            parts[number].score[rows] = score
        if on_rows is not None:
            on_rows(sum(len(rows) for _, rows in group))


# Which rows leave: a radix search for the exact place of the cut in the order (rising score, falling uid). It needs the
# memory of one histogram, however many rows there are and however many of them are equal.

Tie = tuple[int, int]


def _cut(parts: Sequence[Part], within: int, leaving: int) -> tuple[int, Tie | None]:
    """Return the score's bits of the last row that leaves and, if rows with that score leave only in part, its uid."""
    bits, below, equal = _nth(lambda: (_bits(part, part.left == within) for part in parts), 32, leaving)
    if below + equal == leaving:
        return bits, None
    downwards = leaving - below  # rows to drop among the equal ones; ~ turns falling uids into rising numbers
    f0, more, _ = _nth(lambda: (~_tied(part, within, bits)[0] for part in parts), 64, downwards)
    f1, _, _ = _nth(lambda: (~w1[~w0 == f0] for w0, w1 in _all_tied(parts, within, bits)), 64, downwards - more)
    top = 2**64 - 1
    return bits, (top - f0, top - f1)


def _going(part: Part, within: int, bits: int, tie: Tie | None) -> NDArray[np.int64]:
    rows = np.flatnonzero(part.left == within)
    scores = _bits(part, rows)
    if tie is None:
        return rows[scores <= bits]
    f0, f1 = (words[rows] for words in part.uids())
    above = (f0 > tie[0]) | ((f0 == tie[0]) & (f1 >= tie[1]))
    return rows[(scores < bits) | ((scores == bits) & above)]


def _nth(words: Callable[[], Iterator[NDArray]], width: int, wanted: int) -> tuple[int, int, int]:
    """Find the `wanted`-th smallest of unsigned numbers, from its highest digit down.

    Args:
        words: yields the numbers in parts; called once per digit.
        width: their bits.
        wanted: the place, from 1.

    Returns:
        The number, how many are smaller, and how many are equal.
    """
    value, below, equal = 0, 0, 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for some in words():
            wide = some.astype(np.uint64)
            # Count the next digit of the numbers that agree with `value` in all higher digits.
            if shift < width - _DIGIT:
                wide = wide[wide >> np.uint64(shift + _DIGIT) == value]
            digits = (wide >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        ends = counts.cumsum()
        digit = int(np.searchsorted(ends, wanted - below))
        below, equal = below + int(ends[digit] - counts[digit]), int(counts[digit])
        value = value << _DIGIT | digit
    return value, below, equal


def _bits(part: Part, rows: NDArray) -> NDArray[np.uint32]:
    """Return scores as integers in the same order: the bits of non-negative float32 sort like the floats."""
    return np.asarray(part.score[rows]).view(np.uint32)


def _tied(part: Part, within: int, bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    rows = np.flatnonzero(part.left == within)
    rows = rows[_bits(part, rows) == bits]
    if not len(rows):
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    f0, f1 = part.uids()
    return f0[rows], f1[rows]


def _all_tied(parts: Sequence[Part], within: int, bits: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    return (_tied(part, within, bits) for part in parts)
