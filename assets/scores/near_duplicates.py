"""Near duplicates by an encoder: `duplicate_search/<encoder>`, and `near_duplicates/<encoder>` from it.

How alike a row is to a better one depends on every better row, so the search is one asset without partitions. What it
found of each row is then told shard by shard, as a score like any other; as with NormSim_2-D
(`docs/decisions/0007-dynamic-norm-sim.md`).

A search works on files beside its result: arrays over all rows, and `state.json`, which is replaced after every block.
A run that is killed goes on behind the last block that stands there. Each provenance has a folder of its own,
`<lake>/duplicate_search/<encoder>/<16 digits>/`, so a score reads the search that its provenance names, whatever is
searched meanwhile.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, each, input_fingerprint, once, sharded_asset
from assets.base.score_tables import CHUNK_ROWS, IDENTITY, device, figures
from assets.base.selection_table import rows_of
from assets.base.unpartitioned import WholeAsset, up_to_date, whole_asset
from assets.project import Project
from assets.subsets.subset import SubsetAsset, newest, shard_inputs
from core.hashing import digest
from core.uids import format_uids
from resources.lake.files import LakeError, Provenance, column_to_vectors
from resources.lake.scratch import reserve
from resources.lake.versions import Versions

CODE_VERSION = "2"
WINDOW_BYTES = 2 << 30  # of embeddings that are gathered at a time; they are written in any order
LIMITS = tuple(percent / 100 for percent in range(100))
SEARCH = pa.schema(
    [pa.field("limit", pa.float64(), nullable=False), pa.field("above", pa.int64(), nullable=False)],
)
SCHEMA = pa.schema(
    [
        *IDENTITY,
        pa.field("near_duplicate", pa.float32(), nullable=True),
        pa.field("near_duplicate_of", pa.string(), nullable=True),
    ]
)


def duplicate_search(
    project: Project, encoder: str, of: SubsetAsset | None, best: ShardAsset, sharded: Mapping[str, ShardAsset]
) -> WholeAsset:
    """Make the asset `duplicate_search/<encoder>`.

    Args:
        project: the project.
        encoder: the encoder's name.
        of: the subset whose rows are compared, None for the pool.
        best: the asset of the score that says which of two rows is the better.
        sharded: the project's assets of shards, by key.
    """
    key = f"duplicate_search/{encoder}"
    source = f"embeddings/{encoder}"
    settings = project.settings.near_duplicates[encoder]

    def provenance(redraw: bool) -> Provenance:
        del redraw  # the same rows are as alike as before
        return once(project, f"{key} wanted", look)

    def look() -> Provenance:
        found = {}
        begin = {}
        with project.at_rest():
            for shard in sorted(project.listing()):
                with contextlib.suppress(NotReady):
                    found[shard] = shard_inputs(project, shard, [source, best.key], sharded)
            if of is not None:
                begin[of.key] = newest(project, of).lineage["fingerprint"]
        if not found:
            raise NotReady(f"no shard has both {source} and {best.key}, up to date. Remedy: materialize them first")
        inputs = {shard: read[source] for shard, read in found.items()}
        inputs[best.key] = digest({shard: read[best.key] for shard, read in found.items()})
        return Provenance(key, None, CODE_VERSION, {"of": settings.of, "best": settings.best}, inputs | begin)

    def compute() -> Result:
        from selection.scores.near_duplicates import nearest_before

        wanted = provenance(False)
        work = _Work(project, encoder, wanted.digest())
        if not work.is_there():
            stored = project.lake.stored(key)
            work.remove_others(stored.fingerprint if stored is not None else "")
            work.begin(wanted, of)
        if not work.is_done():
            for at, value, better in nearest_before(work.vectors(), device=device(), done=work.state["done"]):
                work.add(at, value, better)
                project.on_progress(key, "", len(value))
        rising = np.sort(work.value)
        above = len(rising) - np.searchsorted(rising, np.array(LIMITS), side="right")
        work.tidy()
        return Result(
            pa.table([pa.array(LIMITS), pa.array(above)], schema=SEARCH),
            {"rows_compared": len(rising), **{f"above/{limit}": int(above[LIMITS.index(limit)]) for limit in _TOLD}},
        )

    return whole_asset(
        project,
        key=key,
        deps=(source, best.key, *([of.key] if of is not None else [])),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="near_duplicates",
        kinds={"pytorch", "parquet"},
        description=f"Compares each image of {of.key if of is not None else 'the pool'}, by encoder `{encoder}`, with "
        f"all that have a better `{settings.best}`. Its rows say how many images are more alike to a better one than "
        "each limit. A run that is killed goes on behind its last whole block.",
        columns=SEARCH,
        pool="gpu",
    )


_TOLD = (0.9, 0.95, 0.99)


def near_duplicates(project: Project, encoder: str, search: WholeAsset) -> ShardAsset:
    """Make the asset `near_duplicates/<encoder>`; `search` is the encoder's `duplicate_search`."""
    key = f"near_duplicates/{encoder}"
    source = f"embeddings/{encoder}"
    named: dict[str, str] = {}  # the search that a shard's provenance names, which is the one to read

    def provenance(shard: str) -> Provenance:
        found = up_to_date(project, search)
        stored = project.lake.stored(search.key)
        if stored is None or shard not in stored.provenance.inputs:
            raise NotReady(f"{search.key} was made without shard {shard}. Remedy: materialize what it reads first")
        inputs = {source: input_fingerprint(project, source, shard), search.key: found}
        named[shard] = found
        return Provenance(key, shard, CODE_VERSION, {}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        searches = {found: _Work(project, encoder, found) for found in {named[shard] for shard in shards}}

        def score(shard: str) -> Result:
            work = searches[named[shard]]
            if not work.is_there() or not work.is_done():
                raise LakeError(
                    f"{work.folder}: not the rows that {search.key} tells of. "
                    f"Remedy: remove {project.lake.path(search.key)}, and materialize it again"
                )
            pool = project.lake.read(source, shard, ["f0", "f1"])
            value, better = work.rows(shard)
            table = pa.table(
                [
                    pa.array([shard] * len(value), pa.string()),
                    pool["f0"],
                    pool["f1"],
                    pa.array(value, from_pandas=True),
                    pa.array(better, pa.string()),
                ],
                schema=SCHEMA,
            )
            project.on_progress(key, shard, len(value))
            compared = value[~np.isnan(value)]
            return Result(table, {"rows_compared": len(compared), **figures("near_duplicate", compared)})

        yield from each(score)(shards)

    return sharded_asset(
        project,
        key=key,
        deps=(source, search.key),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="near_duplicates",
        kinds={"parquet"},
        description=f"Near duplicates by encoder `{encoder}`: the largest cosine of a row's image and that of a row "
        f"with a better `{project.settings.near_duplicates[encoder].best}` (-1 for the best), and the uid of that row. "
        "NULL for rows that `of` leaves out. Smaller is better.",
        columns=SCHEMA,
    )


class _Work:
    """The files that a search works on. A row's place is that in the pool, its rank that in the order, 0 the best.

    The file `rank` has −1 for a row that is not compared, and −2 − r for one whose uid is that of the row of rank r.

    Args:
        project: the project.
        encoder: name of the encoder.
        search: digest of the search's provenance.

    Attributes:
        folder: where they lie.
        state: what `state.json` says: for each shard the place of its first row and the number of its rows; how many
            places there are, and how many rows are compared; the embeddings' width and of how many rows they are
            gathered; how many rows are done.
    """

    def __init__(self, project: Project, encoder: str, search: str) -> None:
        self.project = project
        self.source = f"embeddings/{encoder}"
        self.settings = project.settings.near_duplicates[encoder]
        self.folder = project.lake.local_root() / "duplicate_search" / encoder / search[:16]
        self._path = self.folder / "state.json"
        self.state: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def is_there(self) -> bool:
        """Tell whether the search has begun, and none of its files is gone."""
        if not self.state:
            return False
        names = set(self._shapes()) - ({"vectors"} if self.is_done() else set())
        return all((self.folder / name).exists() for name in names)

    def is_done(self) -> bool:
        """Tell whether all rows are compared."""
        return bool(self.state["done"] == self.state["rows"])

    def remove_others(self, stored: str) -> None:
        """Remove what other searches left, but for the one whose result is stored: scores may be reading that."""
        for folder in self.folder.parent.glob("*/"):
            if folder.name not in (self.folder.name, stored[:16]):
                shutil.rmtree(folder)

    def begin(self, provenance: Provenance, of: SubsetAsset | None) -> None:
        """Make the files anew: which rows are compared, and in which order.

        Raises:
            ValueError: a row has no score to order it by, or there is no row.
            LakeError: there is no room for the files.
        """
        self._path.unlink(missing_ok=True)
        lake = self.project.lake
        shards: dict[str, list[int]] = {}
        places = 0
        for shard in provenance.inputs:
            if "/" not in shard:  # the others are the score and the subset
                stored = lake.stored(self.source, shard)
                assert stored is not None
                shards[shard] = [places, stored.rows]
                places += stored.rows
        current = Versions(lake, of.recipe).current() if of is not None else None
        manifest = current.manifest if current is not None else None
        scores = {"best": self.project.settings.score_columns[self.settings.best]}
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
            width = lake.read(self.source, next(iter(shards)), ["image"])["image"].type.list_size
            self.state = {"shards": shards, "places": places, "rows": rows, "width": width, "gathered": 0, "done": 0}
            sizes = {name: math.prod(shape) * np.dtype(kind).itemsize for name, (kind, shape) in self._shapes().items()}
            reserve(self.folder, sizes)
            rank, uid = self._map("rank", "r+"), self._map("uid", "r+")
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
        for array in (rank, uid):
            array.flush()
        self._write()

    def vectors(self) -> np.memmap:
        """Give the embeddings in order, float16 `[n, d]`; each window of them is gathered once.

        Raises:
            LakeError: one is not finite.
        """
        size = max(1, WINDOW_BYTES // (2 * self.state["width"]))
        for start in range(self.state["gathered"], self.state["rows"], size):
            stop = min(start + size, self.state["rows"])
            self._gather(start, stop)
            self.state["gathered"] = stop
            self._write()
        return self._map("vectors", "r")

    def _gather(self, start: int, stop: int) -> None:
        """Gather the embeddings of ranks from `start` to before `stop`, going through the shards once."""
        found = self._map("vectors", "r+")
        for shard in self.state["shards"]:
            image = column_to_vectors(self.project.lake.read(self.source, shard, ["image"])["image"])
            rank = self._ranks(shard)
            inside = np.flatnonzero((rank >= start) & (rank < stop))
            for at in range(0, len(inside), CHUNK_ROWS):
                some = inside[at : at + CHUNK_ROWS]
                vectors = image[some]
                wrong = np.flatnonzero(~np.isfinite(vectors.sum(1, dtype=np.float32)))
                for row in wrong[:1]:
                    (uid,) = self._uids(rank[some[row : row + 1]])
                    raise LakeError(
                        f"{self.project.lake.path(self.source, shard)}: the image embedding of uid {uid} holds NaN or "
                        f"infinity. Remedy: mend what it is made from, and materialize {self.source} of shard {shard}"
                    )
                found[rank[some]] = vectors
        found.flush()

    def add(self, at: slice, value: np.ndarray, better: np.ndarray) -> None:
        """Keep what was found of some rows."""
        for name, found in (("value", value), ("better", better)):
            kept = self._map(name, "r+")
            kept[at] = found
            kept.flush()
        self.state["done"] = at.stop
        self._write()

    def tidy(self) -> None:
        """Remove what only the search itself needs."""
        (self.folder / "vectors").unlink(missing_ok=True)

    @property
    def value(self) -> np.ndarray:
        """What was found of the rows, float32 `[n]`, in order."""
        return self._map("value", "r")

    def rows(self, shard: str) -> tuple[np.ndarray, list[str | None]]:
        """Give a shard's values, float32 `[n]`, NaN for a row that was not compared, and uids of the better rows.

        All rows with one uid are given the same: a recipe that sees fewer shards may choose from another one of them.
        """
        rank = self._ranks(shard)
        rank = np.where(rank < -1, -2 - rank, rank)
        compared = np.flatnonzero(rank >= 0)
        value = np.full(len(rank), np.nan, np.float32)
        value[compared] = self.value[rank[compared]]
        better = self._map("better", "r")[rank[compared]]
        named = better >= 0
        uids: list[str | None] = [None] * len(rank)
        for row, uid in zip(compared[named].tolist(), self._uids(better[named]), strict=True):
            uids[row] = uid
        return value, uids

    def _uids(self, ranks: np.ndarray) -> list[str]:
        words = np.asarray(self._map("uid", "r")[ranks])
        return format_uids(words[:, 0], words[:, 1])

    def _ranks(self, shard: str) -> np.ndarray:
        start, rows = self.state["shards"][shard]
        return np.asarray(self._map("rank", "r")[start : start + rows])

    def _check_scores(self, con: Any) -> None:
        unusable = "NOT coalesce(isfinite(best::DOUBLE), false)"
        wrong = con.execute(
            f"SELECT f0, f1, best, count(*) OVER () FROM wanted WHERE {unusable} ORDER BY f0, f1 LIMIT 1"
        ).fetchall()
        for f0, f1, best, count in wrong:
            (uid,) = format_uids(np.array([f0], np.uint64), np.array([f1], np.uint64))
            raise ValueError(
                f"{self.settings.best} is {'NULL' if best is None else best} for uid {uid} ({count} such rows in all), "
                "so it can't be told whether it is better than others. Remedy: another score for `best`, or `of` a "
                "subset whose rows all have one"
            )

    def _map(self, name: str, mode: Literal["r", "r+"]) -> np.memmap:
        dtype, shape = self._shapes()[name]
        return np.memmap(self.folder / name, dtype, mode=mode, shape=shape)

    def _shapes(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {
            "rank": (np.int64, (self.state["places"],)),
            "uid": (np.uint64, (self.state["rows"], 2)),
            "value": (np.float32, (self.state["rows"],)),
            "better": (np.int64, (self.state["rows"],)),
            "vectors": (np.float16, (self.state["rows"], self.state["width"])),
        }

    def _write(self) -> None:
        with self.project.lake.replacing(str(self._path)) as temporary:
            temporary.write_text(json.dumps(self.state), encoding="utf-8")
