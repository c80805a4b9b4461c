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
from typing import Any, Literal

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
from assets.base.score_tables import CHUNK_ROWS, device, score_stats
from assets.base.selection_table import rows_of
from assets.base.settings import Name, OfSubset, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import NORM_TOLERANCE, rows_aligned, within_bounds
from assets.base.unpartitioned import unpartitioned
from core.hashing import digest
from core.names import suggestion
from core.uids import format_uids
from resources.lake.files import LakeError, Provenance
from resources.lake.gather import ShardVectors
from resources.lake.scratch import Arrays, WorkFolder
from resources.lake.versions import Version, Versions

WINDOW_BYTES = 2 << 30  # of embeddings that are gathered at a time; they are written in any order
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
)
def duplicate_search(step: Step) -> Result:
    """Search the most similar higher-scoring image of every image."""
    from selection.scores.near_duplicates import nearest_before

    wanted = step.wanted[None]
    work = _Search(step, wanted.digest())
    if not work.exists():
        stored = step.stored(step.asset.key)
        work.remove_others(stored.fingerprint if stored is not None else "")
        of = _settings(step.asset.declared).of
        work.begin(wanted, None if of is None else newest_version(step.snapshot, step.asset.assets[of]))
    if not work.is_complete():
        step.expect(work.state["rows"] - work.state["done"])
        for at, value, better in nearest_before(work.vectors(), device=device(), done=work.state["done"]):
            work.add(at, value, better)
            step.progress(len(value))
    rising = np.sort(work.value)
    above = len(rising) - np.searchsorted(rising, np.array(LIMITS), side="right")
    work.remove_vectors()
    counts = {f"above/{limit}": int(above[LIMITS.index(limit)]) for limit in SUMMARY_LIMITS}
    return Result(
        pa.table([pa.array(LIMITS), pa.array(above)], schema=SEARCH), {"rows_compared": len(rising), **counts}
    )


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
    work = _Search(step, step.wanted[shard.name].inputs[f"duplicate_search/{step.names['encoder']}"])
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


class _Search:
    """The files that a search works on. A row's place is its position in the pool, its rank that in the order, from 0.

    The array `rank` has −1 for a row that is not compared, and −2 − r for one whose uid is that of the row of rank r.

    Args:
        step: of the search, or of the score.
        search: digest of the search's provenance.

    Attributes:
        folder: their folder. Its state holds, for each shard, the place of its first row and the number of its rows;
            the number of places and of compared rows; the embeddings' width; the numbers of rows gathered and done.
    """

    def __init__(self, step: Step, search: str) -> None:
        encoder = step.names["encoder"]
        self.lake = step.context.lake
        self.source = f"embeddings/{encoder}"
        self._images = ShardVectors(self.lake, self.source, "image")
        self.settings = configured(step.context.settings)[encoder]
        self.best = Scores(step.context.settings).places([self.settings.best])[self.settings.best]
        self.folder = WorkFolder(self.lake, f"duplicate_search/{encoder}/{search[:16]}")

    @property
    def state(self) -> dict[str, Any]:
        """The state of the search; empty before `begin`."""
        return self.folder.state

    def exists(self) -> bool:
        """Check whether the search has started, and all of its files exist."""
        if not self.state:
            return False
        return self.folder.is_complete(set(_arrays(self.state)) - ({"vectors"} if self.is_complete() else set()))

    def is_complete(self) -> bool:
        """Check whether all rows are compared."""
        return bool(self.state["done"] == self.state["rows"])

    def remove_others(self, stored: str) -> None:
        """Remove other searches' files, except those of the stored result, which scores may be reading."""
        self.folder.remove_siblings({stored[:16]})

    def begin(self, provenance: Provenance, subset: Version | None) -> None:
        """Create the files: which rows are compared, and in which order.

        Raises:
            ValueError: a row has no score to order it by, or there is no row.
            LakeError: there is no room for the files.
        """
        lake = self.lake
        shards: dict[str, list[int]] = {}
        places = 0
        for shard in provenance.inputs:
            if "/" not in shard:  # the others are the score and the subset
                stored = lake.stored(self.source, shard)
                assert stored is not None
                shards[shard] = [places, stored.rows]
                places += stored.rows
        manifest = None if subset is None else Versions(lake, subset.recipe).verified_path(subset)
        scores = {"best": self.best}
        with rows_of(lake, shards, manifest, scores, ["file_row_number"]) as (con, found):
            self._check_scores(con)
            starts = pa.table({"shard": list(shards), "start": [start for start, _ in shards.values()]})
            con.register("starts", starts)
            ((rows,),) = con.execute("SELECT count(*) FROM wanted").fetchall()
            if not rows:
                raise ValueError(
                    f"{self.settings.of or 'the pool'} has no row in the {len(shards)} shards that have both "
                    f"{self.source} and {scores['best'][0]}, so there is nothing to compare. "
                    "Remedy: materialize both for more shards"
                )
            width = self._images[next(iter(shards))].shape[1]
            state = {"shards": shards, "places": places, "rows": rows, "width": width, "gathered": 0, "done": 0}
            self.folder.begin(state, _arrays(state))
            rank, uid = self._array("rank", "r+"), self._array("uid", "r+")
            rank[:] = -1
            done = 0
            ordered = con.sql(
                "SELECT start + file_row_number AS place, f0, f1 FROM wanted JOIN starts USING (shard) "
                "ORDER BY best::DOUBLE DESC, f0, f1"
            )
            for batch in ordered.to_arrow_reader(CHUNK_ROWS):
                at = slice(done, done + batch.num_rows)
                rank[batch["place"].to_numpy()] = np.arange(at.start, at.stop)
                uid[at, 0], uid[at, 1] = batch["f0"].to_numpy(), batch["f1"].to_numpy()
                done = at.stop
            if found.duplicates:
                placed = "SELECT f0, f1, start + file_row_number AS place FROM {} JOIN starts USING (shard)"
                copies = con.execute(
                    f"SELECT copy.place, first.place AS of FROM ({placed.format('copies')}) AS copy "
                    f"JOIN ({placed.format('wanted')}) AS first USING (f0, f1)"
                ).fetchnumpy()
                rank[copies["place"]] = -2 - rank[copies["of"]]
        self.folder.save()

    def vectors(self) -> np.memmap:
        """Return the embeddings in order, float16 `[n, d]`; each window of them is gathered once.

        Raises:
            LakeError: one is not finite.
        """
        size = max(1, WINDOW_BYTES // (2 * self.state["width"]))
        for start in range(self.state["gathered"], self.state["rows"], size):
            stop = min(start + size, self.state["rows"])
            self._gather(start, stop)
            self.folder.save(gathered=stop)
        return self._array("vectors")

    def _gather(self, start: int, stop: int) -> None:
        """Gather the embeddings of ranks from `start` to before `stop`, going through the shards once."""
        found = self._array("vectors", "r+")
        for shard in self.state["shards"]:
            image, rank = self._images[shard], self._ranks(shard)
            inside = np.flatnonzero((rank >= start) & (rank < stop))
            for at in range(0, len(inside), CHUNK_ROWS):
                vectors = image[some := inside[at : at + CHUNK_ROWS]]
                wrong = np.flatnonzero(~np.isfinite(vectors.sum(1, dtype=np.float32)))
                for row in wrong[:1]:
                    (uid,) = self._uids(rank[some[row : row + 1]])
                    raise LakeError(
                        f"{self.lake.path(self.source, shard)}: the image embedding of uid {uid} holds NaN or "
                        f"infinity. Remedy: mend what it is made from, and materialize {self.source} of shard {shard}"
                    )
                found[rank[some]] = vectors

    def add(self, at: slice, value: np.ndarray, better: np.ndarray) -> None:
        """Record the result of some rows."""
        for name, found in (("value", value), ("better", better)):
            self._array(name, "r+")[at] = found
        self.folder.save(done=at.stop)

    def remove_vectors(self) -> None:
        """Remove the gathered embeddings, which only the search itself needs."""
        self.folder.remove("vectors")

    @property
    def value(self) -> np.ndarray:
        """The largest similarity of each row, float32 `[n]`, in order."""
        return self._array("value")

    def rows(self, shard: str) -> tuple[np.ndarray, list[str | None]]:
        """Return a shard's values, float32 `[n]`, NaN for a row that was not compared, and uids of the better rows.

        All rows with one uid get the same values: a recipe over fewer shards may select another one of them.
        """
        rank = self._ranks(shard)
        rank = np.where(rank < -1, -2 - rank, rank)
        compared = np.flatnonzero(rank >= 0)
        value = np.full(len(rank), np.nan, np.float32)
        value[compared] = self.value[rank[compared]]
        better = self._array("better")[rank[compared]]
        named = better >= 0
        uids: list[str | None] = [None] * len(rank)
        for row, uid in zip(compared[named].tolist(), self._uids(better[named]), strict=True):
            uids[row] = uid
        return value, uids

    def _uids(self, ranks: np.ndarray) -> list[str]:
        halves = np.asarray(self._array("uid")[ranks])
        return format_uids(halves[:, 0], halves[:, 1])

    def _ranks(self, shard: str) -> np.ndarray:
        start, rows = self.state["shards"][shard]
        return np.asarray(self._array("rank")[start : start + rows])

    def _check_scores(self, con: Any) -> None:
        unusable = "NOT coalesce(isfinite(best::DOUBLE), false)"
        wrong = con.execute(
            f"SELECT f0, f1, best, count(*) OVER () FROM wanted WHERE {unusable} ORDER BY f0, f1 LIMIT 1"
        ).fetchall()
        for f0, f1, best, count in wrong:
            (uid,) = format_uids(np.array([f0], np.uint64), np.array([f1], np.uint64))
            raise ValueError(
                f"{self.settings.best} is {'NULL' if best is None else best} for uid {uid} ({count} such rows in all), "
                "so it has no place in the order. Remedy: another score for `best`, or `of` a "
                "subset whose rows all have one"
            )

    def _array(self, name: str, mode: Literal["r", "r+"] = "r") -> np.memmap:
        dtype, shape = _arrays(self.state)[name]
        return self.folder.array(name, dtype, shape, mode)


def _arrays(state: Mapping[str, Any]) -> Arrays:
    """Return dtype and shape of each array of a search."""
    return {
        "rank": (np.int64, (state["places"],)),
        "uid": (np.uint64, (state["rows"], 2)),
        "value": (np.float32, (state["rows"],)),
        "better": (np.int64, (state["rows"],)),
        "vectors": (np.float16, (state["rows"], state["width"])),
    }
