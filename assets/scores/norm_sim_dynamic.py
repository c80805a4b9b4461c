"""NormSim_2-D of an encoder (arXiv 2405.19547): `dynamic_rounds/<encoder>`, and `norm_sim_dynamic/<encoder>` from it.

The rounds depend on every row of the pool, so they are one asset without partitions. What they found of each row is
then told shard by shard, as a score like any other. Why two assets: `docs/decisions/0007-dynamic-norm-sim.md`.

A run works on files beside its result, `<lake>/dynamic_rounds/<encoder>/`: two arrays over all rows, and `state.json`,
which is replaced after every round. A run that is killed goes on behind the last round that stands there.
"""

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import device, figures, score_schema, score_table
from assets.base.selection_table import rows_of
from assets.base.unpartitioned import WholeAsset, up_to_date, whole_asset
from assets.project import Project
from assets.subsets.subset import SubsetAsset, newest
from resources.lake.files import LakeError, Provenance, column_to_vectors
from resources.lake.scratch import reserve
from resources.lake.versions import Versions

CODE_VERSION = "1"
SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32(), nullable=False),
        pa.field("entered", pa.int64(), nullable=False),
        pa.field("left", pa.int64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("tie_f0", pa.uint64(), nullable=True),
        pa.field("tie_f1", pa.uint64(), nullable=True),
    ]
)


def dynamic_rounds(project: Project, encoder: str, of: SubsetAsset | None) -> WholeAsset:
    """Make the asset `dynamic_rounds/<encoder>`; `of` is the subset that the rounds begin with, None for the pool."""
    key = f"dynamic_rounds/{encoder}"
    source = f"embeddings/{encoder}"
    settings = project.settings.norm_sim_dynamic[encoder]

    def provenance(redraw: bool) -> Provenance:
        del redraw  # the same rows leave in the same rounds
        inputs = _embedded(project, source)
        if not inputs:
            raise NotReady(f"no shard has {source}. Remedy: materialize it first")
        if of is not None:
            inputs[of.key] = newest(project, of).lineage["fingerprint"]
        parameters = {"keep": settings.keep, "rounds": settings.rounds, "of": settings.of}
        return Provenance(key, None, CODE_VERSION, parameters, inputs)

    def compute() -> Result:
        from selection.scores.norm_sim_dynamic import dynamic_rounds as prune

        work = _Work(project, encoder)
        wanted = provenance(False)
        if not work.is_of(wanted):
            work.begin(wanted, of)
        state = work.state
        for found in prune(
            work.parts(),
            keep=state["keep"],
            rounds=settings.rounds,
            device=device(),
            done=work.done(),
            on_rows=lambda rows: project.on_progress(key, "", rows),
        ):
            work.add(found)
        work.flush()
        columns = list(zip(*work.done(), strict=True)) or [()] * len(SCHEMA)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        began = state["began_with"]
        return Result(table, {"pool_rows": state["pool_rows"], "began_with": began, "kept": state["keep"]})

    return whole_asset(
        project,
        key=key,
        deps=(source, *([of.key] if of else [])),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="norm_sim",
        kinds={"pytorch", "parquet"},
        description=f"The rounds of NormSim_2-D by encoder `{encoder}`: {of.key if of else 'the pool'} prunes itself "
        f"to {settings.keep!r} of the pool in {settings.rounds} rounds, the rows that are least like the others in "
        "their image leaving first. A run that is killed goes on behind its last whole round.",
        columns=SCHEMA,
        pool="gpu",
    )


def norm_sim_dynamic(project: Project, encoder: str, rounds: WholeAsset) -> ShardAsset:
    """Make the asset `norm_sim_dynamic/<encoder>`; `rounds` is the encoder's `dynamic_rounds`."""
    key = f"norm_sim_dynamic/{encoder}"
    source = f"embeddings/{encoder}"

    def provenance(shard: str) -> Provenance:
        inputs = {source: input_fingerprint(project, source, shard), rounds.key: up_to_date(project, rounds)}
        return Provenance(key, shard, CODE_VERSION, {}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        work = _Work(project, encoder)
        work.open()
        stored = project.lake.stored(rounds.key)
        # Whoever begins anew removes the state first and then replaces the arrays: these are still those of the state.
        there = stored is not None and work.is_of(stored.provenance) and _Work(project, encoder).state == work.state

        def score(shard: str) -> Result:
            if not there:
                raise LakeError(
                    f"{work.folder}: not the rows that {rounds.key} tells of. "
                    f"Remedy: remove {project.lake.path(rounds.key)}, and materialize it again"
                )
            embeddings = project.lake.read(source, shard)
            left, last = work.rows(shard)
            table = score_table(shard, embeddings, norm_sim_dynamic=np.array(left), norm_sim_2_last=np.array(last))
            project.on_progress(key, shard, len(left))
            return Result(table, figures("norm_sim_dynamic", left) | figures("norm_sim_2_last", last[left > 0]))

        yield from each(score)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=(source, rounds.key),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="norm_sim",
        kinds={"parquet"},
        description=f"NormSim_2-D by encoder `{encoder}`: the round in which a row left (0: it was not among those "
        "that the rounds began with; one more than the number of rounds: it stayed), and its NormSim_2 to the set "
        "of the last round that it took part in.",
        columns=score_schema(norm_sim_dynamic=pa.int32(), norm_sim_2_last=pa.float32()),
    )


def _embedded(project: Project, source: str) -> dict[str, str]:
    """Give the fingerprints of the shards whose embeddings are those of the pool's rows."""
    found = {}
    for shard in sorted(project.listing()):
        pool, stored = project.lake.stored("raw_pool", shard), project.lake.stored(source, shard)
        if pool is not None and stored is not None and stored.provenance.inputs["raw_pool"] == pool.fingerprint:
            found[shard] = stored.fingerprint
    return found


class _Work:
    """The files that the rounds work on.

    Args:
        project: the project.
        encoder: name of the encoder.

    Attributes:
        folder: where they lie.
        state: what `state.json` says: the provenance's digest; for each shard the place of its first row and the
            number of its rows; the pool's rows, those that the rounds began with, and those that stay; the rounds done.
    """

    def __init__(self, project: Project, encoder: str) -> None:
        self.project = project
        self.source = f"embeddings/{encoder}"
        self.settings = project.settings.norm_sim_dynamic[encoder]
        self.folder = project.lake.local_root() / "dynamic_rounds" / encoder
        self._path = self.folder / "state.json"
        self.state: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._maps: list[np.memmap] = []

    def is_of(self, provenance: Provenance) -> bool:
        """Tell whether the files are of rounds with this provenance."""
        return self.state.get("provenance") == provenance.digest()

    def begin(self, provenance: Provenance, of: SubsetAsset | None) -> None:
        """Make the files anew: who is in.

        Raises:
            LakeError: embeddings are not those of the pool's rows, or there is no room for the files.
        """
        self._path.unlink(missing_ok=True)
        shards: dict[str, list[int]] = {}
        place = 0
        for shard in provenance.inputs:
            if of is None or shard != of.key:
                stored = self.project.lake.stored(self.source, shard)
                assert stored is not None
                shards[shard] = [place, stored.rows]
                place += stored.rows
        self.state = {"provenance": provenance.digest(), "shards": shards, "done": []}
        reserve(self.folder, dict.fromkeys(("left.int32", "score.float32"), 4 * max(place, 1)))
        current = Versions(self.project.lake, of.recipe).current() if of is not None else None
        manifest = current.manifest if current is not None else None
        with rows_of(self.project.lake, shards, manifest, {}, ["source_row"]) as (con, found):
            for shard in shards:
                begins = con.execute("SELECT source_row FROM wanted WHERE shard = ?", [shard]).fetchnumpy()[
                    "source_row"
                ]
                rows = self.project.lake.read("raw_pool", shard, ["source_row"])["source_row"].to_numpy()
                left, _ = self.rows(shard)
                left[:] = np.isin(rows, begins)
        self.state["pool_rows"] = found.rows if current is None else current.lineage["source"]["rows"]
        self.state["began_with"] = sum(int(self.rows(shard)[0].sum()) for shard in shards)
        self.state["keep"] = int(self.state["pool_rows"] * Fraction(repr(self.settings.keep)))
        self._write()

    def open(self) -> None:
        """Open the arrays, if they are there."""
        if not self._maps and self.state:
            places = (("left.int32", np.int32), ("score.float32", np.float32))
            self._maps = [np.memmap(self.folder / name, dtype, mode="r+") for name, dtype in places]

    def rows(self, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Give a shard's rounds of leaving, int32 `[n]`, and its scores, float32 `[n]`; what is written there stays."""
        self.open()
        start, rows = self.state["shards"][shard]
        left, score = (np.asarray(whole[start : start + rows]) for whole in self._maps)
        return left, score

    def parts(self) -> list[Any]:
        """Give the rows as `selection.scores.norm_sim_dynamic` takes them."""
        from selection.scores.norm_sim_dynamic import Part

        def part(shard: str) -> Part:
            def vectors() -> np.ndarray:
                return column_to_vectors(self.project.lake.read(self.source, shard)["image"])

            def uids() -> tuple[np.ndarray, np.ndarray]:
                table = self.project.lake.read(self.source, shard, ["f0", "f1"])
                return table["f0"].to_numpy(), table["f1"].to_numpy()

            return Part(vectors, uids, *self.rows(shard))

        return [part(shard) for shard in self.state["shards"]]

    def done(self) -> list[Any]:
        """Give the rounds that are done."""
        from selection.scores.norm_sim_dynamic import Round

        return [Round(*values) for values in self.state["done"]]

    def add(self, found: Sequence[Any]) -> None:
        """Keep a round that is done."""
        self.state["done"].append(list(found))
        self._write()

    def flush(self) -> None:
        """Let what was written to the arrays reach the disk."""
        for whole in self._maps:
            whole.flush()

    def _write(self) -> None:
        self.flush()
        with self.project.lake.replacing(str(self._path)) as temporary:
            temporary.write_text(json.dumps(self.state), encoding="utf-8")
