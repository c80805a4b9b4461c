"""SIEVE (arXiv 2310.02110): similarity of a text to captions generated from its image.

    SIEVE(i) = max over k of cos( E(mask(alt_i)), E(mask(caption_k(image_i))) )

Here: masking, and the maximum. Not here: the captioner and the text encoder E.
"""

import re

import numpy as np
from numpy.typing import NDArray

MEDIUM_PHRASES = (
    "an image of",
    "a photo of",
    "stock photo",
    "photo stock",
    "a photo",
    "an image",
    "image",
    "photo",
)
"""The paper's phrases for the medium, in the order in which they are deleted."""

_PATTERNS = tuple(re.compile(r"\b" + phrase.replace(" ", r"\s+") + r"\b", re.I) for phrase in MEDIUM_PHRASES)
_WORD = re.compile(r"\w")


def mask(text: str) -> str:
    """Delete the medium phrases from a text, on word boundaries, so that "photograph" and "imagery" stay.

    Phrases are deleted in the order of `MEDIUM_PHRASES`, each everywhere.

    Returns:
        The remaining words, separated by single spaces; "" if no letter or digit remains.
    """
    for pattern in _PATTERNS:
        text = pattern.sub(" ", text)
    return " ".join(text.split()) if _WORD.search(text) else ""


def sieve(
    text: NDArray[np.floating],
    captions: NDArray[np.floating],
    text_is_empty: NDArray[np.bool_],
    caption_is_empty: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Compare each text with the captions of its own image.

    Args:
        text: embeddings of the masked texts, unit norm, `[n, d]`.
        captions: embeddings of the masked captions, unit norm, `[n, k, d]`.
        text_is_empty: bool `[n]`, the masked text is empty; its row of `text` is not read.
        caption_is_empty: bool `[n, k]`, the same for captions.

    Returns:
        SIEVE, float32 `[n]`, and the index of the caption that attains it, int64 `[n]`, the first of equals. A pair
        with an empty side has cosine 0.

    Raises:
        ValueError: shapes do not fit, there is no caption, or an embedding that is read is not finite.
    """
    n, k = caption_is_empty.shape
    if k == 0 or text.shape[:1] != (n,) or captions.shape != (n, k, text.shape[-1]) or text_is_empty.shape != (n,):
        raise ValueError(
            f"text {text.shape}, captions {captions.shape}, text_is_empty {text_is_empty.shape} and caption_is_empty "
            f"{caption_is_empty.shape}: expected [n, d], [n, k, d], [n] and [n, k] with k ≥ 1"
        )
    cosine = np.einsum("nd,nkd->nk", text.astype(np.float32), captions.astype(np.float32))
    cosine = np.where(text_is_empty[:, None] | caption_is_empty, np.float32(0), cosine)
    if not np.isfinite(cosine).all():
        raise ValueError(f"text or captions: row {int(np.argwhere(~np.isfinite(cosine))[0][0])} is not finite")
    best = cosine.argmax(axis=1)
    return np.take_along_axis(cosine, best[:, None], axis=1)[:, 0], best
