"""SIEVE (arXiv 2310.02110): how near a caption is to what a captioner says of its image.

    SIEVE(i) = max over k of cos( E(mask(alt_i)), E(mask(caption_k(image_i))) )

Here: which words are masked, and the maximum. Not here: the captioner and the sentence encoder E.
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
"""The paper's phrases that name the medium and not what is seen, in the order in which they are deleted."""

_PATTERNS = tuple(re.compile(r"\b" + phrase.replace(" ", r"\s+") + r"\b", re.I) for phrase in MEDIUM_PHRASES)
_WORD = re.compile(r"\w")


def mask(text: str) -> str:
    """Delete the medium phrases from a text, on word boundaries, so that "photograph" and "imagery" stay.

    One phrase after the other, each wherever it stands.

    Returns:
        What is left, its words parted by single spaces; "" where no letter and no digit is left.
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
        text_is_empty: whose text masking left nothing of, `[n]`; what stands in `text` there is not read.
        caption_is_empty: the same of the captions, `[n, k]`.

    Returns:
        SIEVE, float32 `[n]`, and which caption gave it, int64 `[n]`, the first of equal ones. A pair in which one side
        is empty counts 0.

    Raises:
        ValueError: shapes that don't fit, no caption, or an embedding that is not finite and should be read.
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
