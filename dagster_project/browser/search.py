"""Search by text or by example: exact cosines over the stored embeddings, within a budget of rows and seconds."""

import time
from dataclasses import dataclass

import numpy as np

from dagster_project.browser.parts import SEARCHED, Part, first_part
from dagster_project.browser.queries import BrowseError, Place, Query, Table
from resources.models.decoding import EncoderError
from resources.models.text_encoders import TextEncoder
from resources.settings import TextEncoderSettings

SECONDS = 5.0
BLOCK = 16_384


@dataclass(frozen=True)
class Found:
    """The nearest rows, nearest first, with their cosines; and the part of the pool that was searched."""

    places: list[Place]
    cosines: list[float]
    part: Part


def encoders(table: Table) -> list[str]:
    """List the encoders that have embeddings in the lake, of all rows and not only of a subset's (`of`)."""
    settings, lake = table.context.settings, table.context.lake
    return [name for name, model in settings.encoders.items() if model.of is None and lake.shards(f"embeddings/{name}")]


def of_text(table: Table, encoder: str, text: str) -> np.ndarray:
    """Return the embedding of a text by an encoder's text tower, float32 [d].

    Raises:
        BrowseError: the encoder has no model here.
    """
    try:
        settings = TextEncoderSettings(encoder=encoder)
        return TextEncoder(encoder, settings, table.context.models.encoder(encoder)).encode([text])[0]
    except (EncoderError, ValueError) as error:
        raise BrowseError(str(error)) from error


def of_row(table: Table, encoder: str, place: Place, side: str) -> np.ndarray:
    """Return the embedding of a row's image or caption (`side`: image or text), float32 [d]."""
    (vectors,) = table.context.lake.vectors(f"embeddings/{encoder}", place.shard, columns=[side])
    return np.asarray(vectors[place.row : place.row + 1], np.float32)[0]


def nearest(
    table: Table,
    encoder: str,
    query: np.ndarray,
    side: str,
    *,
    among: Query | None = None,
    count: int = 120,
    rows: int = SEARCHED,
    seconds: float = SECONDS,
) -> Found:
    """Find the rows whose image or caption is nearest to a vector.

    Args:
        table: the project's rows.
        encoder: whose embeddings are searched.
        query: float32 [d], unit norm.
        side: `image` or `text`.
        among: the rows to find; by default all.
        count: rows to return at most.
        rows: rows to search at most; at least one shard is searched.
        seconds: after which no further shard is started.
    """
    lake, asset = table.context.lake, f"embeddings/{encoder}"
    sizes = table.sizes([asset])
    best: list[tuple[float, str, int]] = []
    searched, start = 0, time.monotonic()
    for shard in first_part(sizes, rows).shards:
        if searched and time.monotonic() - start > seconds:
            break
        size = sizes[shard]
        wanted = None if among is None else among.rows_of(shard)
        (vectors,) = lake.vectors(asset, shard, columns=[side])
        for first in range(0, size, BLOCK):
            cosines = np.asarray(vectors[first : first + BLOCK], np.float32) @ query
            numbers = np.arange(first, first + len(cosines))
            if wanted is not None:
                numbers = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(cosines))]
            values = cosines[numbers - first]
            top = np.argsort(-values, kind="stable")[:count]
            best += [(-float(values[at]), shard, int(numbers[at])) for at in top]
        best = sorted(best)[:count]
        searched += size
    places = [Place(shard, row) for _, shard, row in best]
    return Found(places, [-cosine for cosine, _, _ in best], first_part(sizes, searched))
