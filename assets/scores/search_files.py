"""The work files of a search for near duplicates, and the comparison of two blocks of rows that workers do.

Here: which rows are compared, in which order, and the state of an interrupted search. Not here: the assets
(`assets.scores.near_duplicates`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from assets.base.context import Snapshot
from assets.base.score_tables import CHUNK_ROWS, device
from assets.base.selection_table import rows_of
from core.uids import format_uids
from resources.lake.files import Lake, LakeError, Provenance
from resources.lake.gather import ShardVectors
from resources.lake.scratch import Arrays, WorkFolder, shared_file
from resources.lake.versions import Version, Versions

if TYPE_CHECKING:
    from selection.scores.near_duplicates import Nearest, Pair

WINDOW_BYTES = 2 << 30  # of embeddings that are gathered at a time; they are written in any order


def compare_pair(snapshot: Snapshot, location: str, shape: tuple[int, int], pair: "Pair") -> "Nearest":
    """Compare a block of rows of a search with earlier ones; its vectors are at a location."""
    from selection.scores.near_duplicates import compare

    def opened() -> np.memmap:
        return np.memmap(shared_file(snapshot.context.lake, location), np.float16, "r", shape=shape)

    return compare(snapshot.memoized(f"vectors at {location}", opened), pair, device=device())


class SearchFiles:
    """The files that a search works on. A row's place is its position in the pool, its rank that in the order, from 0.

    The array `rank` has −1 for a row that is not compared, and −2 − r for one whose uid is that of the row of rank r.

    Args:
        lake: the lake.
        encoder: name of the encoder.
        search: digest of the search's provenance.
        of: the subset whose rows are compared, as the settings name it.
        best: name of the score that orders rows.
        place: its asset and column.

    Attributes:
        folder: their folder. Its state holds, for each shard, the place of its first row and the number of its rows;
            the number of places and of compared rows; the embeddings' width; the numbers of rows gathered and done.
    """

    def __init__(
        self, lake: Lake, encoder: str, search: str, *, of: str | None, best: str, place: tuple[str, str]
    ) -> None:
        self.lake = lake
        self.source = f"embeddings/{encoder}"
        self._images = ShardVectors(lake, self.source, "image")
        self.of, self.best, self.place = of, best, place
        self.folder = WorkFolder(lake, f"duplicate_search/{encoder}/{search[:16]}")

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
        scores = {"best": self.place}
        with rows_of(lake, shards, manifest, scores, ["file_row_number"]) as (con, found):
            self._check_scores(con)
            starts = pa.table({"shard": list(shards), "start": [start for start, _ in shards.values()]})
            con.register("starts", starts)
            ((rows,),) = con.execute("SELECT count(*) FROM wanted").fetchall()
            if not rows:
                raise ValueError(
                    f"{self.of or 'the pool'} has no row in the {len(shards)} shards that have both "
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
                f"{self.best} is {'NULL' if best is None else best} for uid {uid} ({count} such rows in all), "
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
