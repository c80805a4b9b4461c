"""Near duplicates by an encoder: `duplicate_search/<encoder>`, and `near_duplicates/<encoder>` from it.

The similarity of a row to a higher-scoring one depends on every higher-scoring row, so the search is one unpartitioned
asset. A score like any other then holds each row's result, shard by shard, as for NormSim_2-D
(`docs/decisions/0007-dynamic-norm-sim.md`).

A search works on files beside its result: arrays over all rows, and `state.json`, which is replaced after every block.
An interrupted search resumes after the last complete block. Each provenance has a folder of its own,
`<lake>/duplicate_search/<encoder>/<16 digits>/`, so a score reads the search that its provenance names, also while
another one runs.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.columns import Column
from assets.base.context import Context, Snapshot
from assets.base.freshness import newest_version, shard_inputs
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Result
from assets.base.score_kind import (
    ScoreKind,
    Scores,
    recorded_entries,
    require_encoders,
    require_no_cycle,
    require_recipe,
)
from assets.base.score_tables import device, score_stats
from assets.base.settings import Name, OfSubset, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import NORM_TOLERANCE, rows_aligned, within_bounds
from assets.base.unpartitioned import unpartitioned
from assets.scores.search_files import SearchFiles, compare_pair
from core.hashing import digest
from core.names import suggestion
from resources.lake.files import LakeError

LIMITS = tuple(percent / 100 for percent in range(100))
SUMMARY_LIMITS = (0.9, 0.95, 0.99)
SEARCH = pa.schema(
    [pa.field("limit", pa.float64(), nullable=False), pa.field("above", pa.int64(), nullable=False)],
)


class NearDuplicateSettings(OfSubset):
    """How one encoder's near duplicates are found (`docs/methods/near_duplicates.md`).

    Attributes:
        best: the score, named as in recipes, by which the better of two rows is the one with the larger value.
    """

    best: str


def configured(settings: ProjectSettings) -> Mapping[str, NearDuplicateSettings]:
    """Return the settings by encoder."""
    found: Mapping[str, NearDuplicateSettings] = settings.scores.near_duplicates
    return found


def _settings(asset: Declared) -> NearDuplicateSettings:
    return configured(asset.settings)[asset.names["encoder"]]


def _best_asset(asset: Declared) -> str:
    """Return the key of the asset that holds the score that orders rows."""
    return Scores(asset.settings).by_name[_settings(asset).best].asset


def _deps(asset: Declared) -> Sequence[Dep]:
    of = _settings(asset).of
    deps = [Dep("embeddings/{encoder}", recorded=False), Dep(_best_asset(asset), recorded=False)]
    return [*deps, *([Dep(of)] if of is not None else [])]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    return {"of": settings.of, "best": settings.best}


def _complete_shards(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    """Return the embeddings' fingerprints of shards that also have the ordering score, and one of all those scores."""
    source, best = f"embeddings/{asset.declared.names['encoder']}", _best_asset(asset.declared)
    found = {}
    for name in sorted(snapshot.listing):
        with contextlib.suppress(NotReady):
            found[name] = shard_inputs(snapshot, name, [source, best], asset.assets)
    if not found:
        raise NotReady(f"no shard has both {source} and {best}, up to date. Remedy: materialize them first")
    inputs = {name: read[source] for name, read in found.items()}
    inputs[best] = digest({name: read[best] for name, read in found.items()})
    return inputs


def _search_description(asset: Declared) -> str:
    settings = _settings(asset)
    return (
        f"Finds, for every image of {settings.of or 'the pool'}, the most similar one with a higher `{settings.best}`, "
        f"by encoder `{asset.names['encoder']}`. The table counts near duplicates at each similarity threshold. "
        "Interrupted searches resume after the last complete block."
    )


@unpartitioned(
    key="duplicate_search/{encoder}",
    deps=_deps,
    columns=SEARCH,
    checks=[],
    code_version="2",
    group_name="near_duplicates",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description=_search_description,
    parameters=_parameters,
    inputs=_complete_shards,
    operations=lambda asset, amount: (  # every pair once
        float(amount.rows) ** 2 * amount.dimensions if _settings(asset).of is None else None
    ),
)
def duplicate_search(step: Step) -> Result:
    """Search the most similar higher-scoring image of every image."""
    from selection.scores.near_duplicates import nearest_before

    wanted = step.wanted[None]
    work = _files(step, wanted.digest())
    if not work.exists():
        stored = step.stored(step.asset.key)
        work.remove_others(stored.fingerprint if stored is not None else "")
        of = _settings(step.asset.declared).of
        work.begin(wanted, None if of is None else newest_version(step.snapshot, step.asset.assets[of]))
    if not work.is_complete():
        step.expect(work.state["rows"] - work.state["done"])
        vectors = work.vectors()
        location = step.shared(work.folder, "vectors")
        found = nearest_before(
            vectors,
            device=device(),
            done=work.state["done"],
            compute=lambda pairs: step.map(compare_pair, ((location, vectors.shape, pair) for pair in pairs)),
        )
        for at, value, better in found:
            work.add(at, value, better)
            step.progress(len(value))
    rising = np.sort(work.value)
    above = len(rising) - np.searchsorted(rising, np.array(LIMITS), side="right")
    work.remove_vectors()
    counts = {f"above/{limit}": int(above[LIMITS.index(limit)]) for limit in SUMMARY_LIMITS}
    return Result(
        pa.table([pa.array(LIMITS), pa.array(above)], schema=SEARCH), {"rows_compared": len(rising), **counts}
    )


def _files(step: Step, search: str) -> SearchFiles:
    """Return the files of the search whose provenance has this digest."""
    encoder = step.names["encoder"]
    settings = configured(step.context.settings)[encoder]
    place = Scores(step.context.settings).places([settings.best])[settings.best]
    return SearchFiles(step.context.lake, encoder, search, of=settings.of, best=settings.best, place=place)


def _search_knows_the_shard(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    key = f"duplicate_search/{asset.declared.names['encoder']}"
    stored = snapshot.context.lake.stored(key)
    if stored is None or shard not in stored.provenance.inputs:
        raise NotReady(f"{key} was computed without shard {shard}. Remedy: materialize its inputs first")
    return {}


@partitioned(
    key="near_duplicates/{encoder}",
    deps=["embeddings/{encoder}", "duplicate_search/{encoder}"],
    columns=[
        Column(
            name="near_duplicate",
            type=pa.float32(),
            description="Largest cosine of the image and one with a higher score; -1 for the highest.",
            direction=None,
            bounds=(-((1 + NORM_TOLERANCE) ** 2), (1 + NORM_TOLERANCE) ** 2),
            nullable=True,
        ),
        Column(
            name="near_duplicate_of",
            type=pa.string(),
            description="The uid of that row.",
            direction=None,
            bounds=None,
            nullable=True,
            explains="in_favour_of",
        ),
    ],
    checks=[rows_aligned, within_bounds],
    code_version="2",
    group_name="near_duplicates",
    kinds={"parquet"},
    description=lambda asset: (
        f"Near duplicates by encoder `{asset.names['encoder']}`: the largest cosine of a row's image and that of a row "
        f"with a higher `{_settings(asset).best}` (-1 for the highest), and the uid of that row. NULL for rows outside "
        "of `of`. Smaller is better."
    ),
    inputs=_search_knows_the_shard,
)
def near_duplicates(shard: Shard) -> Result:
    """Read the search's result for one shard."""
    step = shard.step
    work = _files(step, step.wanted[shard.name].inputs[f"duplicate_search/{step.names['encoder']}"])
    if not work.exists() or not work.is_complete():
        key = f"duplicate_search/{step.names['encoder']}"
        raise LakeError(
            f"{work.folder.path}: these are not the rows of the stored {key}. "
            f"Remedy: remove {shard.lake.path(key)}, and materialize it again"
        )
    rows = shard.read(step.asset.row_source, ["f0", "f1"])
    value, better = work.rows(shard.name)
    columns = [rows["f0"], rows["f1"], pa.array(value, from_pandas=True), pa.array(better, pa.string())]
    table = pa.table([pa.array([shard.name] * len(value), pa.string()), *columns], schema=step.asset.declared.schema)
    step.progress(len(value), shard.name)
    compared = value[~np.isnan(value)]
    return Result(table, {"rows_compared": len(compared), **score_stats("near_duplicate", compared)})


def _validate(settings: ProjectSettings) -> None:
    require_encoders(settings, "scores.near_duplicates", configured(settings))
    ordering = [
        name
        for name, score in Scores(settings).by_name.items()
        if score.column.is_number and score.kind is not NEAR_DUPLICATES
    ]
    for encoder, chosen in configured(settings).items():
        if chosen.best not in ordering:
            raise ValueError(
                f"scores.near_duplicates.{encoder}.best: there is no score {chosen.best!r} to order rows by; "
                f"{suggestion(chosen.best or '', ordering)}"
            )


def _validate_recipes(settings: ProjectSettings) -> None:
    scores = Scores(settings)
    for encoder, chosen in configured(settings).items():
        field, asset = f"scores.near_duplicates.{encoder}", f"near_duplicates/{encoder}"
        require_recipe(settings, f"{field}.of", chosen.recipe)
        require_no_cycle(settings, f"{field}.of", asset, chosen.recipe)
        for upstream in scores.with_upstream({scores.by_name[chosen.best].asset}):
            require_no_cycle(settings, f"{field}.best", asset, scores.starts_from(upstream))


def _made_from(asset: Declared) -> Collection[str]:
    return (_best_asset(asset),)


NEAR_DUPLICATES = ScoreKind(
    name="near_duplicates",
    asset=near_duplicates,
    settings=dict[Name, NearDuplicateSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"encoder": encoder} for encoder in configured(settings)],
    upstream=lambda settings: (duplicate_search.declare(settings, encoder=e) for e in configured(settings)),
    validate=_validate,
    validate_recipes=_validate_recipes,
    starts_from=lambda asset: _settings(asset).recipe,
    made_from=_made_from,
    recorded=lambda settings, wanted: recorded_entries(
        "near_duplicates", configured(settings), wanted, lambda encoder: [f"near_duplicates/{encoder}"]
    ),
)
