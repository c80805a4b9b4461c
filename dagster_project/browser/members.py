"""Rows of a part of the pool that are in lists of uids: versions, and the sets and files beside them.

Lists may hold as many uids as the pool, so they are read in blocks; the rows of the part are in memory.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.uids import subset_words
from dagster_project.browser.parts import Part
from dagster_project.browser.queries import POOL, Place, Table
from resources.lake.versions import Version, Versions

BLOCK = 1 << 21
"""Uids that are read at once."""
NO_ROWS = pa.schema(
    [("f0", pa.uint64()), ("f1", pa.uint64()), ("shard", pa.int32()), ("row", pa.int32())]
).empty_table()


def rows_of(table: Table, part: Part) -> pa.Table:
    """Read the rows of a part: f0, f1, `shard` (its number in the part), and `row` (its number in the shard)."""
    read = []
    for number, shard in enumerate(part.shards):
        uids = table.context.lake.read(POOL, shard, ["f0", "f1"])
        columns = {"shard": np.full(len(uids), number, np.int32), "row": np.arange(len(uids), dtype=np.int32)}
        read.append(pa.table({"f0": uids["f0"], "f1": uids["f1"], **columns}))
    return pa.concat_tables([NO_ROWS, *read])


def listed(versions: Versions, version: Version, file: str, *, kept: bool = False) -> Iterator[pa.Table]:
    """Yield f0 and f1 of a version's file in blocks; with `kept` those of the rows that its column `kept` is true of.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    path = versions.verified_path(version, file)
    if file.endswith(".npy"):
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
        for first in range(0, len(uids), BLOCK):
            yield pa.table(dict(zip(("f0", "f1"), subset_words(uids[first : first + BLOCK]), strict=True)))
        return
    with pq.ParquetFile(path) as opened:
        for batch in opened.iter_batches(BLOCK, columns=["f0", "f1", *(["kept"] if kept else [])]):
            block = pa.table(batch)
            yield block.filter(block["kept"]).select(["f0", "f1"]) if kept else block


def among(table: Table, rows: pa.Table, blocks: Iterable[pa.Table]) -> pa.Table:
    """Return f0 and f1 of the uids in these blocks that are in `rows`, each once."""
    query = "SELECT f0, f1 FROM listed SEMI JOIN rows USING (f0, f1)"
    found = [table.run(query, {"listed": block, "rows": rows}) for block in blocks]
    return pa.concat_tables([NO_ROWS.select(["f0", "f1"]), *found]).group_by(["f0", "f1"]).aggregate([])


def some_places(table: Table, part: Part, rows: pa.Table, uids: pa.Table, count: int) -> list[Place]:
    """Return the places of some uids, in random order, the same in every call."""
    found = table.run(
        "SELECT min({'shard': shard, 'row': row}) AS place FROM rows SEMI JOIN "
        f"(FROM uids ORDER BY hash(f0, f1, 0) LIMIT {count:d}) USING (f0, f1) "
        "GROUP BY f0, f1 ORDER BY hash(f0, f1, 0)",
        {"rows": rows, "uids": uids},
    )
    return [Place(part.shards[place["shard"]], place["row"]) for place in found["place"].to_pylist()]


def count_by_shard(table: Table, part: Part, rows: pa.Table, uids: pa.Table) -> list[int]:
    """Return how many rows of each shard of the part have one of these uids."""
    query = "SELECT shard, count(*) AS n FROM rows SEMI JOIN uids USING (f0, f1) GROUP BY shard"
    found = table.run(query, {"rows": rows, "uids": uids}).to_pydict()
    counts = dict(zip(found["shard"], found["n"], strict=True))
    return [counts.get(number, 0) for number in range(len(part.shards))]
