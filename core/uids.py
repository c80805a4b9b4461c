"""A sample's identity: the uid as text, as two numbers, and as DataComp's array.

Here: reading and writing uids. Not here: which sample has which uid.

A uid is 128 bits. As text it is 32 lower-case hexadecimal characters; in files and joins it is the
pair of unsigned 64-bit integers (f0, f1), f0 the first 16 digits. Both orders agree: sorting by
(f0, f1) sorts the texts.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

UID_DTYPE = np.dtype("u8,u8")
"""The dtype of a DataComp subset file: fields f0 and f1."""

_UID = re.compile(r"[0-9a-fA-F]{32}", re.ASCII)


def parse_uids(texts: Sequence[str]) -> tuple[Words, Words]:
    """Parse uids.

    Args:
        texts: n uids of 32 hexadecimal digits, upper or lower case.

    Returns:
        f0 and f1, each uint64 of shape [n], in the order given.

    Raises:
        ValueError: A text is not a uid; the message names the first such text and its position.
    """
    joined = "".join(texts)
    if len(joined) != 32 * len(texts) or any(len(text) != 32 for text in texts):
        raise _not_a_uid(texts)
    try:
        raw = bytes.fromhex(joined)
    except ValueError:
        raise _not_a_uid(texts) from None
    if len(raw) != 16 * len(texts):  # fromhex skips white space
        raise _not_a_uid(texts)
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0].copy(), words[:, 1].copy()


def format_uids(f0: Words, f1: Words) -> list[str]:
    """Format uids as 32 lower-case hexadecimal digits.

    Args:
        f0: First halves, uint64 of shape [n].
        f1: Second halves, uint64 of shape [n].

    Returns:
        n texts, in the order given.
    """
    digits = np.stack([f0, f1], axis=1).astype(">u8").tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def format_uid(f0: int, f1: int) -> str:
    """Format one uid as 32 lower-case hexadecimal digits."""
    return f"{f0:016x}{f1:016x}"


def subset_array(f0: Words, f1: Words) -> NDArray[np.void]:
    """Build the array that DataComp's resharder reads.

    The resharder searches by bisection, so an unsorted file loses samples. It writes a repeated uid as a repeated
    sample, so repeats are kept.

    Args:
        f0: First halves, uint64 of shape [n].
        f1: Second halves, uint64 of shape [n].

    Returns:
        A structured array of `UID_DTYPE` and shape [n], sorted by (f0, f1).
    """
    subset = np.empty(len(f0), dtype=UID_DTYPE)
    order = np.lexsort((f1, f0))
    subset["f0"], subset["f1"] = f0[order], f1[order]
    return subset


def subset_words(subset: NDArray[np.void]) -> tuple[Words, Words]:
    """Return f0 and f1 of a DataComp array, in the order of the array.

    Args:
        subset: A structured array of `UID_DTYPE` and shape [n], sorted or not.

    Returns:
        f0 and f1, each uint64 of shape [n].

    Raises:
        ValueError: The array has another dtype or shape.
    """
    if subset.dtype != UID_DTYPE or subset.ndim != 1:
        raise ValueError(
            f"A uid array has dtype u8,u8 (fields f0, f1) and one axis; this one has dtype "
            f"{subset.dtype} and shape {subset.shape}."
        )
    return subset["f0"].copy(), subset["f1"].copy()


def _not_a_uid(texts: Sequence[str]) -> ValueError:
    position, text = next((i, t) for i, t in enumerate(texts) if not _UID.fullmatch(t))
    return ValueError(f"{text!r} at position {position} is no uid: a uid is 32 hexadecimal digits.")


def first_places(uids: NDArray[np.void], wanted: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the places in `uids` of the first row of each uid that is wanted, ascending.

    Args:
        uids: `UID_DTYPE` records `[n]`.
        wanted: the same, `[m]`; those that are not in `uids` have no place.

    Returns:
        int64 of at most m places.
    """
    known, first = np.unique(uids, return_index=True)
    return np.sort(first[np.isin(known, wanted)]).astype(np.int64)
