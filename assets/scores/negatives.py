"""`negatives/<encoder>`: the reference negatives, K draws of B pool rows that every row is scored against.

The estimator `random_partitions` completes its batches in small shards from them.

They are drawn once and kept: a shard that arrives later is scored against the same draws, so no other score changes.
They are drawn again when a setting or the encoder changes, when the pool had fewer than B rows and has grown, when it
has grown by the factor `redraw_at_growth`, or on demand (the job `redraw_negatives`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.checks import Check, Finding, Tables
from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.results import NotReady, Result
from assets.base.standard_checks import uid_records, unit_norm
from assets.base.unpartitioned import unpartitioned
from assets.pool.embeddings import embedding_parameters, embeddings
from assets.scores.draws import SCHEMA, draw
from assets.scores.drift import drift, growth
from assets.scores.neg_clip_loss_settings import NegClipLossSettings, configured
from resources.lake.files import Stored


def _settings(asset: Declared) -> NegClipLossSettings:
    return configured(asset.settings)[asset.names["encoder"]]


def _draws_complete(tables: Tables) -> Finding:
    table = tables.read(columns=["draw", "rank", "f0", "f1"])
    number, rank, uids = table["draw"].to_numpy(), table["rank"].to_numpy(), uid_records(table)
    draws = int(number.max(initial=-1)) + 1
    size = len(number) // max(draws, 1)
    figures = {"draws": draws, "batch_size": size}
    complete = (
        size > 0
        and len(number) == draws * size
        and (number == np.repeat(np.arange(draws), size)).all()
        and (rank == np.tile(np.arange(size), draws)).all()
    )
    if not complete:
        return Finding(False, figures, f"{len(number)} rows are not {draws} draws of equal size in order")
    for place in range(draws):
        if len(np.unique(uids[place * size : (place + 1) * size])) != size:
            return Finding(False, figures, f"draw {place} has a uid twice")
    return Finding(True, figures)


DRAWS_COMPLETE = Check(
    "draws_complete", "All draws have the same size, and each has a uid at most once.", _draws_complete
)


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    return {
        **embedding_parameters(context, asset),
        "embeddings_version": embeddings.code_version,
        "batch_size": settings.batch_size,
        "draws": settings.draws,
        "seed": settings.seed,
    }


def _embedded(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    encoder, settings = asset.declared.names["encoder"], _settings(asset.declared)
    found = embedded_shards(snapshot, f"embeddings/{encoder}")
    total = len(snapshot.listing)
    if not found or len(found) < settings.coverage * total:
        raise NotReady(
            f"{len(found)} of the pool's {total} shards have embeddings/{encoder}, and negatives drawn now would "
            f"represent those alone. Remedy: materialize embeddings/{encoder} for the others first, or lower "
            f"scores.neg_clip_loss.{encoder}.coverage (now {settings.coverage})"
        )
    return found


def _keeps(asset: Declared, stored: Stored, snapshot: Snapshot) -> bool:
    settings = _settings(asset)
    if stored.summary["batch_size"] != settings.batch_size:
        return False
    return settings.redraw_at_growth is None or growth(asset, stored, snapshot) < settings.redraw_at_growth


def _stays(asset: Declared, stored: Stored) -> bool:
    settings = _settings(asset)
    return stored.summary["batch_size"] == settings.batch_size and settings.redraw_at_growth is None


@unpartitioned(
    key="negatives/{encoder}",
    deps=[Dep("embeddings/{encoder}", recorded=False)],
    columns=SCHEMA,
    checks=[lambda _: DRAWS_COMPLETE, unit_norm("image", "text"), drift],
    code_version="1",
    group_name="negatives",
    kinds={"arrow"},
    pool="gpu",
    description=lambda asset: (
        f"Reference negatives for negCLIPLoss by encoder `{asset.names['encoder']}`: {_settings(asset).draws} draws of "
        f"{_settings(asset).batch_size} rows, chosen by a keyed hash of the uid. Kept while shards arrive; to draw "
        "again, launch the job `redraw_negatives`."
    ),
    parameters=_parameters,
    inputs=_embedded,
    keeps=_keeps,
    stays=_stays,
)
def negatives(step: Step) -> Result:
    """Draw the reference negatives from the shards that have embeddings."""
    settings = _settings(step.asset.declared)
    key = f"embeddings/{step.names['encoder']}"
    return draw(
        step.snapshot,
        key,
        embedded_shards(step.snapshot, key),
        draws=settings.draws,
        batch_size=settings.batch_size,
        seed=settings.seed,
        spread=step.map,
    )
