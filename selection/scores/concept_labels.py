"""Concepts of a sparse autoencoder in words: the rows that activate each most, and the words of their captions.

NumPy only. Here: which rows and which words. Not here: pictures and files.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[^\W\d_]{3,}")
_WORDS = 2  # of a label
_LEAST = 0.25  # share of a concept's rows that have a word of its label


def strongest_rows(index: NDArray[np.int32], value: NDArray[np.float16], most: int) -> dict[int, NDArray[np.int64]]:
    """Find the rows that activate each concept most.

    Args:
        index: Concepts of each row, [n, k].
        value: Their values, [n, k]; an entry of 0 has no effect.
        most: Rows of a concept, at most.

    Returns:
        Rows by concept, int64, the strongest first; of equal values the first row. Concepts without rows are left out.
    """
    entry = np.flatnonzero(value.ravel() > 0)
    concept, row, strength = index.ravel()[entry], entry // index.shape[1], value.ravel()[entry]
    order = np.lexsort((row, -strength.astype(np.float32), concept))
    concepts, first = np.unique(concept[order], return_index=True)
    return {
        int(which): rows[:most].astype(np.int64)
        for which, rows in zip(concepts, np.split(row[order], first[1:]), strict=True)
    }


def concept_labels(rows: Mapping[int, NDArray[np.int64]], captions: Mapping[int, str]) -> dict[int, str]:
    """Name concepts by the words that their rows' captions have more often than other captions.

    A word counts once a caption. It scores c · ln((c / n) / (C / N)), with c of the concept's n captions, and C of all
    N captions, that have it. The label is the two best words that a quarter of the captions have, but at least two;
    equal scores are in alphabetical order.

    Args:
        rows: Rows by concept.
        captions: Caption of each of these rows; rows without one are left out.

    Returns:
        Labels by concept, of one or two words; empty for a concept without such words.
    """
    words = {row: set(_WORD.findall(caption.lower())) for row, caption in captions.items()}
    everywhere = Counter(word for found in words.values() for word in found)
    return {
        which: " ".join(_best([words[r] for r in some if r in words], everywhere, len(words)))
        for which, some in rows.items()
    }


def _best(captions: Sequence[set[str]], everywhere: Counter[str], total: int) -> list[str]:
    counts = Counter(word for found in captions for word in found)
    least = max(2.0, _LEAST * len(captions))
    scored = {
        word: c * np.log(c / len(captions) / (everywhere[word] / total)) for word, c in counts.items() if c >= least
    }
    return sorted((word for word in scored if scored[word] > 0), key=lambda word: (-scored[word], word))[:_WORDS]
