"""Imported hyperbolic embeddings: one .npz per shard, and a reference set.

Here: reading them in the order of the pool's rows. Not here: computing HYPE from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.uids import UID_DTYPE, parse_uids
from resources.inputs.external import ExternalError
from resources.settings import HypeSettings
from resources.storage import files
from resources.storage.arrays import array_names, open_array

Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def shard_file(settings: HypeSettings, shard: str) -> files.Listed:
    """Return a shard's .npz as listed.

    Raises:
        ExternalError: it is missing.
    """
    return _stat(f"{settings.path.rstrip('/')}/{shard}.npz")


def reference_file(settings: HypeSettings) -> files.Listed:
    """Return the reference set's .npz as listed.

    Raises:
        ExternalError: it is missing.
    """
    return _stat(settings.reference)


def read_shard(settings: HypeSettings, shard: str, pool: Mapping[str, np.ndarray[Any, Any]], samples: int) -> Pair:
    """Read the spatial parts of a shard's images and captions, in the order of its rows.

    An .npz with f0 and f1, or with uid, is joined by them; without these it has a row for each sample seen in the
    shard, in its order.

    Args:
        settings: paths and names of arrays.
        shard: the shard.
        pool: f0, f1 and source_row of its rows, each [n].
        samples: rows and rejects of the shard together.

    Returns:
        Image and text, each [n, d].

    Raises:
        ExternalError: a row has no embedding, or NaN or infinity; or the arrays do not fit each other.
        ArrayError: an array is missing or damaged.
    """
    url = shard_file(settings, shard).url
    image, text = _pair(settings, url)
    words = _words(url, array_names(url))
    if words is not None:
        if len(words) != len(image):
            raise ExternalError(f"{url}: {len(words)} uids and {len(image)} embeddings. Remedy: write it again")
        places = _places(url, words, pool)
    elif len(image) == samples:
        places = pool["source_row"]
    else:
        raise ExternalError(
            f"{url}: {len(image)} rows, and {samples} samples were seen in the shard. Remedy: a row for each, in the "
            "shard's order, or an array uid (or f0 and f1) beside them"
        )
    image, text = image[places], text[places]
    _refuse_infinite(url, image, text)
    return image, text


def read_reference(settings: HypeSettings) -> Pair:
    """Read the reference set: spatial parts of images [m, d] and of captions [k, d].

    Raises:
        ExternalError: it is empty, or has NaN or infinity.
        ArrayError: an array is missing or damaged.
    """
    image, text = _pair(settings, settings.reference, same_rows=False)
    if not len(image) or not len(text):
        raise ExternalError(f"{settings.reference}: no row. Remedy: some thousands of images and captions")
    _refuse_infinite(settings.reference, image, text)
    return image, text


def _stat(url: str) -> files.Listed:
    try:
        return files.stat(url)
    except FileNotFoundError as error:
        raise ExternalError(f"{url}: no such file. Remedy: put it there, or correct scores.hype") from error


def _array(url: str, name: str) -> np.ndarray[Any, Any]:
    with open_array(url, name) as stream:
        return stream.all()


def _pair(settings: HypeSettings, url: str, *, same_rows: bool = True) -> Pair:
    image, text = _array(url, settings.image), _array(url, settings.text)
    fit = image.ndim == text.ndim == 2 and image.shape[1] == text.shape[1]
    if not fit or image.dtype.kind != "f" or text.dtype.kind != "f" or (same_rows and len(image) != len(text)):
        raise ExternalError(
            f"{url}: {settings.image} is {image.dtype} {image.shape}, {settings.text} {text.dtype} {text.shape}. "
            "Remedy: floating-point spatial parts, a row each, of one width"
        )
    return image, text


def _words(url: str, names: Sequence[str]) -> np.ndarray[Any, Any] | None:
    if {"f0", "f1"} <= set(names):
        f0, f1 = _array(url, "f0"), _array(url, "f1")
    elif "uid" in names:
        texts = _array(url, "uid").tolist()
        try:
            f0, f1 = parse_uids([text.decode() if isinstance(text, bytes) else text for text in texts])
        except (ValueError, TypeError) as error:
            raise ExternalError(f"{url}: uid: {error} Remedy: texts of 32 hexadecimal digits") from error
    else:
        return None
    return _records(f0, f1)


def _records(f0: np.ndarray[Any, Any], f1: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    words = np.empty(len(f0), UID_DTYPE)
    words["f0"], words["f1"] = f0, f1
    return words


def _places(
    url: str, words: np.ndarray[Any, Any], pool: Mapping[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    wanted = _records(pool["f0"], pool["f1"])
    order = np.lexsort((words["f1"], words["f0"]))
    found = order[np.searchsorted(words[order], wanted).clip(max=len(order) - 1)] if len(order) else order
    missing = np.flatnonzero(words[found] != wanted) if len(order) else np.arange(len(wanted))
    if len(missing):
        first = wanted[missing[0]]
        raise ExternalError(
            f"{url}: {len(missing)} of the shard's {len(wanted)} rows are not in it, the first is "
            f"{first['f0']:016x}{first['f1']:016x}. Remedy: embed them, or write the file again"
        )
    return found


def _refuse_infinite(url: str, *arrays: np.ndarray[Any, Any]) -> None:
    for array in arrays:
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise ExternalError(f"{url}: {len(bad)} rows have NaN or infinity. Remedy: embed them again")
