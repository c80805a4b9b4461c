"""NormSim_2-D of an encoder (arXiv 2405.19547): `dynamic_rounds/<encoder>`, and `norm_sim_dynamic/<encoder>` from it.

The rounds depend on every row of the pool, so they are one unpartitioned asset. A score like any other then holds each
row's result, shard by shard. `docs/decisions/0007-dynamic-norm-sim.md` explains why there are two assets.

A run works on files beside its result, `<lake>/dynamic_rounds/<encoder>/`: two arrays over all rows, and `state.json`,
which is replaced after every round. An interrupted run resumes after the last complete round.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.checks import Tables
from assets.base.columns import Bounds, Column
from assets.base.context import Context, Snapshot
from assets.base.freshness import newest_version
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Result
from assets.base.score_kind import (
    ScoreKind,
    recorded_entries,
    require_encoders,
    require_no_cycle,
    require_recipe,
)
from assets.base.score_tables import device, score_stats
from assets.base.selection_table import rows_of
from assets.base.settings import Name, OfSubset, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import COSINE_TOLERANCE, rows_aligned, within_bounds
from assets.base.unpartitioned import unpartitioned
from resources.lake.files import LakeError, Provenance
from resources.lake.gather import ShardVectors
from resources.lake.scratch import WorkFolder
from resources.lake.versions import Version, Versions

ROUNDS = pa.schema(
    [
        pa.field("round", pa.int32(), nullable=False),
        pa.field("entered", pa.int64(), nullable=False),
        pa.field("left", pa.int64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("tie_f0", pa.uint64(), nullable=True),
        pa.field("tie_f1", pa.uint64(), nullable=True),
    ]
)


class NormSimDynamicSettings(OfSubset):
    """How one encoder's NormSim_2-D is computed (arXiv 2405.19547; `docs/methods/norm_sim_dynamic.md`).

    Attributes:
        keep: fraction that stays, of the pool or, with `of`, of the rows that its recipe started with.
        rounds: number of rounds over which the others are dropped; the paper uses 100 to 500.
    """

    keep: float = Field(gt=0, le=1, strict=True)
    rounds: int = Field(default=100, ge=1, le=100_000)


def configured(settings: ProjectSettings) -> Mapping[str, NormSimDynamicSettings]:
    """Return the settings by encoder."""
    found: Mapping[str, NormSimDynamicSettings] = settings.scores.norm_sim_dynamic
    return found


def _settings(asset: Declared) -> NormSimDynamicSettings:
    return configured(asset.settings)[asset.names["encoder"]]


def _deps(asset: Declared) -> Sequence[Dep]:
    of = _settings(asset).of
    return [Dep("embeddings/{encoder}", recorded=False), *([Dep(of)] if of is not None else [])]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset)
    return {"keep": settings.keep, "rounds": settings.rounds, "of": settings.of}


def _embedded(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    """Return the fingerprints of the shards whose embeddings are those of the pool's rows."""
    source, lake = f"embeddings/{asset.declared.names['encoder']}", snapshot.context.lake
    found = {}
    for name in sorted(snapshot.listing):
        pool, stored = lake.stored("raw_pool", name), lake.stored(source, name)
        if pool is not None and stored is not None and stored.provenance.inputs["raw_pool"] == pool.fingerprint:
            found[name] = stored.fingerprint
    if not found:
        raise NotReady(f"no shard has {source}. Remedy: materialize it first")
    return found


def _rounds_description(asset: Declared) -> str:
    settings = _settings(asset)
    return (
        f"The rounds of NormSim_2-D by encoder `{asset.names['encoder']}`: {settings.of or 'the pool'} is pruned to "
        f"{settings.keep!r} of the pool in {settings.rounds} rounds, each dropping the rows whose images are least "
        "similar to the remaining set. Interrupted runs resume after the last complete round."
    )


@unpartitioned(
    key="dynamic_rounds/{encoder}",
    deps=_deps,
    columns=ROUNDS,
    checks=[],
    code_version="1",
    group_name="norm_sim",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description=_rounds_description,
    parameters=_parameters,
    inputs=_embedded,
)
def dynamic_rounds(step: Step) -> Result:
    """Prune the set round by round."""
    from selection.scores.norm_sim_dynamic import dynamic_rounds as prune

    settings, wanted = _settings(step.asset.declared), step.wanted[None]
    work = _Rounds(step)
    if not work.is_of(wanted):
        work.begin(wanted, _subset(step))
    state = work.state
    step.expect(_rows_to_score(state["began_with"], state["keep"], settings.rounds, len(work.done())))
    for found in prune(
        work.parts(),
        keep=state["keep"],
        rounds=settings.rounds,
        device=device(),
        done=work.done(),
        on_rows=step.progress,
        spread=_spread(step, work),
    ):
        work.add(found)
    work.folder.flush()
    columns = list(zip(*work.done(), strict=True)) or [()] * len(ROUNDS)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, ROUNDS, strict=True)], schema=ROUNDS)
    summary = {"pool_rows": state["pool_rows"], "began_with": state["began_with"], "kept": state["keep"]}
    return Result(table, summary)


def _spread(step: Step, work: "_Rounds") -> Callable[..., Iterator[Any]]:
    """Return a function by which the engine's workers compute groups of shards."""
    shards = list(work.state["shards"])

    def spread(function: Callable[..., Any], groups: Iterable[Any], *shared: Any) -> Iterator[Any]:
        named = ([(shards[number], rows) for number, rows in group] for group in groups)
        return step.map(_of_shards, ((work.source, function, group, shared) for group in named))

    return spread


def _of_shards(snapshot: Snapshot, source: str, function: Callable[..., Any], group: Any, shared: Any) -> Any:
    """Compute a function of some rows of shards; each file stays open, so that it is verified once."""

    def opened() -> ShardVectors:
        return ShardVectors(snapshot.context.lake, source, "image")

    images = snapshot.memoized(f"{source}: images", opened)
    return function([(images[shard][:], rows) for shard, rows in group], device(), *shared)


def _rows_to_score(start: int, keep: int, rounds: int, done: int) -> int:
    """Return the number of rows that the rounds after the first `done` score; a set that stays is scored once."""
    leaving = -(-(start - keep) // rounds)
    return sum({max(keep, start - leaving * number) for number in range(done, rounds + 1)})


def _subset(step: Step) -> Version | None:
    of = _settings(step.asset.declared).of
    return None if of is None else newest_version(step.snapshot, step.asset.assets[of])


def _files(step: Step) -> "_Rounds":
    """Open the arrays of the rounds.

    Raises:
        LakeError: they belong to other rounds than the stored ones.
    """
    work = _Rounds(step)
    work.open()
    stored = step.stored("dynamic_rounds/{encoder}")
    # New rounds remove the state first and then replace the arrays: if the state is the same after opening them, the
    # arrays belong to it.
    if stored is None or not work.is_of(stored.provenance) or work.folder.read_state() != work.state:
        key = f"dynamic_rounds/{step.names['encoder']}"
        raise LakeError(
            f"{work.folder.path}: these are not the rows of the stored {key}. "
            f"Remedy: remove {step.context.lake.path(key)}, and materialize it again"
        )
    return work


def _round_bounds(tables: Tables) -> Bounds:
    settings: NormSimDynamicSettings = configured(tables.context.settings)[tables.asset.partition("/")[2]]
    return 0, settings.rounds + 1


def _norm_bounds(tables: Tables) -> Bounds:
    stored = tables.context.lake.stored(f"dynamic_rounds/{tables.asset.partition('/')[2]}")
    began = stored.summary["began_with"] if stored is not None else 0
    return 0, began**0.5 * (1 + COSINE_TOLERANCE)


@partitioned(
    key="norm_sim_dynamic/{encoder}",
    deps=["embeddings/{encoder}", "dynamic_rounds/{encoder}"],
    columns=[
        Column(
            name="norm_sim_dynamic",
            type=pa.int32(),
            sql_type="FLOAT",
            description="Round in which the row was dropped: 0 if it was not in the starting set, rounds + 1 if it "
            "stayed.",
            direction="larger",
            bounds=_round_bounds,
        ),
        Column(
            name="norm_sim_2_last",
            type=pa.float32(),
            description="NormSim_2 to the set of the last round that the row took part in.",
            direction=None,
            bounds=_norm_bounds,
        ),
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="norm_sim",
    kinds={"parquet"},
    description="NormSim_2-D by encoder `{encoder}`: the round in which a row was dropped (0: it was not in the "
    "starting set; rounds + 1: it stayed), and its NormSim_2 to the set of the last round that it took part in.",
    prepare=_files,
)
def norm_sim_dynamic(shard: Shard, work: "_Rounds") -> Result:
    """Read the rounds' result for one shard."""
    dropped, last = work.rows(shard.name)
    shard.step.progress(len(dropped), shard.name)
    result = shard.scores(norm_sim_dynamic=np.array(dropped), norm_sim_2_last=np.array(last))
    return Result(result.table, {**result.summary, **score_stats("norm_sim_2_last", last[dropped > 0])})


def _validate_recipes(settings: ProjectSettings) -> None:
    for encoder, chosen in configured(settings).items():
        field = f"scores.norm_sim_dynamic.{encoder}.of"
        require_recipe(settings, field, chosen.recipe)
        require_no_cycle(settings, field, f"norm_sim_dynamic/{encoder}", chosen.recipe)


NORM_SIM_DYNAMIC = ScoreKind(
    name="norm_sim_dynamic",
    asset=norm_sim_dynamic,
    settings=dict[Name, NormSimDynamicSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"encoder": encoder} for encoder in configured(settings)],
    upstream=lambda settings: (dynamic_rounds.declare(settings, encoder=e) for e in configured(settings)),
    validate=lambda settings: require_encoders(settings, "scores.norm_sim_dynamic", configured(settings)),
    validate_recipes=_validate_recipes,
    starts_from=lambda asset: _settings(asset).recipe,
    recorded=lambda settings, wanted: recorded_entries(
        "norm_sim_dynamic", configured(settings), wanted, lambda encoder: [f"norm_sim_dynamic/{encoder}"]
    ),
)


class _Rounds:
    """The files that the rounds work on: for each row the round in which it was dropped, and its score.

    Args:
        step: of the rounds, or of the score.

    Attributes:
        folder: their folder. Its state holds the provenance's digest; for each shard the place of its first row and
            the number of its rows; the rows of the pool, of the starting set, and those that stay; the complete rounds.
    """

    def __init__(self, step: Step) -> None:
        encoder = step.names["encoder"]
        self.lake = step.context.lake
        self.source = f"embeddings/{encoder}"
        self.settings = configured(step.context.settings)[encoder]
        self.folder = WorkFolder(self.lake, f"dynamic_rounds/{encoder}")

    @property
    def state(self) -> dict[str, Any]:
        """The state of the rounds; empty before `begin`."""
        return self.folder.state

    def is_of(self, provenance: Provenance) -> bool:
        """Check whether the files belong to rounds with this provenance."""
        return self.folder.is_of(provenance.digest())

    def begin(self, provenance: Provenance, subset: Version | None) -> None:
        """Create the files: mark the rows of the starting set.

        Raises:
            LakeError: the disk has no room for the files.
        """
        shards: dict[str, list[int]] = {}
        place = 0
        for shard in provenance.inputs:
            if "/" not in shard:  # the other input is the subset
                stored = self.lake.stored(self.source, shard)
                assert stored is not None
                shards[shard] = [place, stored.rows]
                place += stored.rows
        arrays = {name: (dtype, (max(place, 1),)) for name, dtype in _ARRAYS.items()}
        self.folder.begin({"provenance": provenance.digest(), "shards": shards, "done": []}, arrays)
        manifest = None if subset is None else Versions(self.lake, subset.recipe).verified_path(subset)
        with rows_of(self.lake, shards, manifest, {}, ["source_row"]) as (con, found):
            for shard in shards:
                starting = con.execute("SELECT source_row FROM wanted WHERE shard = ?", [shard]).fetchnumpy()
                rows = self.lake.read("raw_pool", shard, ["source_row"])["source_row"].to_numpy()
                dropped, _ = self.rows(shard)
                dropped[:] = np.isin(rows, starting["source_row"])
        pool_rows = found.rows if subset is None else subset.lineage["source"]["rows"]
        self.folder.save(
            pool_rows=pool_rows,
            began_with=sum(int(self.rows(shard)[0].sum()) for shard in shards),
            keep=int(pool_rows * Fraction(repr(self.settings.keep))),
        )

    def open(self) -> None:
        """Open the arrays, if they exist."""
        if self.state:
            for name, dtype in _ARRAYS.items():
                self.folder.array(name, dtype, mode="r+")

    def rows(self, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a shard's rounds of dropping, int32 `[n]`, and its scores, float32 `[n]`: views of the files."""
        start, rows = self.state["shards"][shard]
        dropped, score = (
            np.asarray(self.folder.array(name, dtype, mode="r+")[start : start + rows])
            for name, dtype in _ARRAYS.items()
        )
        return dropped, score

    def parts(self) -> list[Any]:
        """Return the rows as `selection.scores.norm_sim_dynamic` takes them."""
        from selection.scores.norm_sim_dynamic import Part

        images = ShardVectors(self.lake, self.source, "image")

        def part(shard: str) -> Part:
            def vectors() -> np.ndarray:
                return images[shard][:]

            def uids() -> tuple[np.ndarray, np.ndarray]:
                table = self.lake.read(self.source, shard, ["f0", "f1"])
                return table["f0"].to_numpy(), table["f1"].to_numpy()

            return Part(vectors, uids, *self.rows(shard))

        return [part(shard) for shard in self.state["shards"]]

    def done(self) -> list[Any]:
        """Return the complete rounds."""
        from selection.scores.norm_sim_dynamic import Round

        return [Round(*values) for values in self.state["done"]]

    def add(self, found: Sequence[Any]) -> None:
        """Record a complete round."""
        self.folder.save(done=[*self.state["done"], list(found)])


_ARRAYS = {"left.int32": np.int32, "score.float32": np.float32}
"""The arrays of the rounds: their dtypes by the names of their files."""
