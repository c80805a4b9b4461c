"""Two-stage selection (30 %, then 20 %) from Parquet to manifest and `.npy`, and the same query by hand in DuckDB.

python -m benchmarks.selecting [--rows 10000000 30000000 100000000] [--shard-rows 100000] [--json PATH]

Both read the same files and write the same rows: a manifest with values and ranks, sorted by uid, and DataComp's array.
The outputs are compared. The query by hand checks nothing; the project compares every score file with its shard and
leaves out repeated uids. Each runs in a separate process with the same memory limit for DuckDB.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assets.base.selection_table import CachedTable, open_selection
from assets.subsets.lineage import recorded_steps
from assets.subsets.subset import manifest
from resources.catalog.build import build_catalog, read_catalog
from resources.catalog.scores import CatalogColumn, CatalogScore
from resources.lake.files import LOOKED_UP, Lake, write_parquet
from resources.lake.versions import Versions, write_selection
from resources.pools.base import RAW_POOL_SCHEMA, REJECTS_SCHEMA
from selection.recipes.recipe import Recipe

RECIPES = 10
EXPLAINED = 5
NEG, NEAR = "neg_clip_loss/b32", "norm_sim_inf/b32/imagenet"
SCORES = {NEG: ("neg_clip_loss/b32", "neg_clip_loss"), NEAR: ("norm_sim/b32/imagenet", "norm_sim_inf")}
RECIPE = Recipe.model_validate(
    {"steps": [{"keep_top": {"score": NEG, "fraction": 0.3}}, {"keep_top": {"score": NEAR, "fraction": 0.2}}]}
)


def measure(rows: int = 2_000_000, shard_rows: int = 100_000, *, several: bool = True) -> dict[str, Any]:
    """Time both over synthetic rows, and `explain`; optionally several recipes in one process."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_lake(root / "lake", rows, shard_rows)
        hand = _apart(_by_hand, root / "lake", root / "hand")
        ours = _apart(_ours, root / "lake", root / "ours")
        for file in ("manifest.parquet", "subset.npy"):
            if not _same(root / "hand" / file, root / "ours" / file):
                raise AssertionError(f"{file}: the two ways chose different rows")
        many = _apart(_many, root / "lake", root / "many") if several else None
        _apart(_version, root / "lake", root / "version")
        explain = _apart(_explain, root / "lake", root / "explain")
    return {
        "rows": rows,
        "shards": -(-rows // shard_rows),
        "by_hand_s": hand["seconds"],
        "by_hand_cpu_s": hand["cpu"],
        "by_hand_peak_gb": hand["gb"],
        "seconds": ours["seconds"],
        "cpu_s": ours["cpu"],
        "peak_gb": ours["gb"],
        "time_of_by_hand": ours["seconds"] / hand["seconds"],
        "cpu_of_by_hand": ours["cpu"] / hand["cpu"],
        **({f"{RECIPES}_recipes_of_one": many["seconds"] / ours["seconds"]} if many else {}),
        "explain_s": explain["seconds"] / EXPLAINED,
        "explain_cpu_s": explain["cpu"] / EXPLAINED,
    }


def _ours(lake: Path, out: Path) -> None:
    with open_selection(Lake(str(lake)), "two_stages", RECIPE, SCORES, _shards(lake), {}) as (selection, _):
        write_selection(manifest(selection), out / "manifest.parquet", out / "subset.npy")


def _many(lake: Path, out: Path) -> None:
    """Select by RECIPES recipes one after another, as a run of several subsets does."""
    shared, shards = CachedTable(), _shards(lake)
    for _ in range(RECIPES):
        with open_selection(Lake(str(lake)), "two_stages", RECIPE, SCORES, shards, {}, shared) as (selection, _):
            write_selection(manifest(selection), out / "manifest.parquet", out / "subset.npy")
    shared.close()


def _version(lake: Path, _: Path) -> None:
    """Write the selection as a version of a subset, and the catalog."""
    with open_selection(Lake(str(lake)), "two_stages", RECIPE, SCORES, _shards(lake), {}) as (selection, duplicates):
        record = {
            "recipe": "two_stages",
            "created": "2026-01-01T00:00:00Z",
            "definition": RECIPE.definition(),
            "source": {"kind": "pool", "name": "pool", "rows": selection.source_rows, "duplicates": duplicates},
            "sets": {},
            "steps": recorded_steps(selection),
            "rows": selection.rows,
            "shards": _shards(lake),
            "shards_missing": {},
            "fingerprint": "",
        }
        Versions(Lake(str(lake)), "two_stages").write(manifest(selection), record, lambda _: None)
    scores = [CatalogScore(asset, (CatalogColumn(column, name),)) for name, (asset, column) in SCORES.items()]
    build_catalog(Lake(str(lake)), lake / "catalog.duckdb", scores=scores, targets=[], recipes=["two_stages"])


def _explain(lake: Path, _: Path) -> None:
    """Explain EXPLAINED samples, opening the catalog for each, as the command line does."""
    shards = list(_shards(lake))
    for number in range(EXPLAINED):
        file = lake / "raw_pool" / f"{shards[number * len(shards) // EXPLAINED]}.parquet"
        row = pq.ParquetFile(file).read_row_group(0, columns=["f0", "f1"]).slice(17, 1).to_pylist()[0]
        with read_catalog(lake / "catalog.duckdb") as con:
            explained = con.execute("FROM explain(?)", [f"{row['f0']:016x}{row['f1']:016x}"]).fetchall()
        if len(explained) != len(RECIPE.steps) + 1:
            raise AssertionError(explained)


def _shards(lake: Path) -> dict[str, dict[str, str]]:
    """List the shards, each with empty fingerprints, which are not used here."""
    read = dict.fromkeys(("raw_pool", *(asset for asset, _ in SCORES.values())), "")
    return {path.stem: read for path in sorted((lake / "raw_pool").glob("*.parquet"))}


def _by_hand(lake: Path, out: Path) -> None:
    """Select by one query that relies on aligned files: join by position, rank by sorting."""
    files = {
        name: f"read_parquet('{lake}/{folder}/*.parquet')"
        for name, folder in (("pool", "raw_pool"), ("neg", SCORES[NEG][0]), ("near", SCORES[NEAR][0]))
    }
    with duckdb.connect() as con:
        con.execute("SET temp_directory = ?", [str(out)])
        con.execute("SET memory_limit = ?", ["2GB"])
        con.execute("SET enable_progress_bar = false")
        ((rows,),) = con.execute(f"SELECT count(*) FROM {files['pool']}").fetchall()
        con.execute(
            f"""
            COPY (
                WITH first AS (
                    SELECT *, row_number() OVER () AS step1_rank FROM (
                        SELECT pool.f0, pool.f1, pool.shard, pool.key, neg.neg_clip_loss::DOUBLE AS step1_value,
                            near.norm_sim_inf::DOUBLE AS step2_value
                        FROM {files["pool"]} AS pool POSITIONAL JOIN {files["neg"]} AS neg
                            POSITIONAL JOIN {files["near"]} AS near
                        ORDER BY step1_value DESC, pool.f0, pool.f1 LIMIT {rows * 3 // 10})
                ),
                second AS (
                    SELECT *, row_number() OVER () AS step2_rank
                    FROM (FROM first ORDER BY step2_value DESC, f0, f1 LIMIT {rows // 5})
                )
                SELECT format('{{:016x}}{{:016x}}', f0, f1) AS uid, f0, f1, shard, key, step1_value, step1_rank,
                    step2_value, step2_rank
                FROM second ORDER BY f0, f1
            ) TO '{out}/manifest.parquet' (COMPRESSION zstd)
            """
        )
        words = con.execute(f"SELECT f0, f1 FROM '{out}/manifest.parquet'").fetchnumpy()
    subset = np.empty(len(words["f0"]), dtype="u8,u8")
    subset["f0"], subset["f1"] = words["f0"], words["f1"]
    np.save(out / "subset.npy", subset)


def _write_lake(lake: Path, rows: int, shard_rows: int) -> None:
    """Write random uids, as of sha256, and scores in no order; other columns are empty."""
    generator = np.random.default_rng(0)
    for folder in ("raw_pool", "rejects", *(asset for asset, _ in SCORES.values())):
        (lake / folder).mkdir(parents=True)
    for number, start in enumerate(range(0, rows, shard_rows)):
        n, shard = min(shard_rows, rows - start), f"{number:08d}"
        f0, f1 = generator.integers(0, 2**64, (2, n), dtype=np.uint64)
        identity = {"shard": pa.array([shard] * n), "f0": f0, "f1": f1}
        keys = {"key": [f"{shard}{place:04d}" for place in range(n)]}
        _write(lake, "raw_pool", shard, _with_nulls(RAW_POOL_SCHEMA, identity | keys))
        _write(lake, "rejects", shard, _with_nulls(REJECTS_SCHEMA, {"shard": [shard], "key": [f"{shard}{n:04d}"]}))
        for asset, column in SCORES.values():
            scores = generator.standard_normal(n, dtype=np.float32)
            _write(lake, asset, shard, identity | {column: scores})


def _with_nulls(schema: pa.Schema, columns: dict[str, Any]) -> dict[str, Any]:
    rows = len(columns["shard"])
    return {field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in schema}


def _write(lake: Path, asset: str, shard: str, columns: dict[str, Any]) -> None:
    write_parquet(pa.table(columns), lake / asset / f"{shard}.parquet", looked_up=LOOKED_UP.get(asset))


def _same(a: Path, b: Path) -> bool:
    if a.suffix == ".npy":
        return bool((np.load(a) == np.load(b)).all())
    names = pq.read_schema(a).names
    return names == pq.read_schema(b).names and all(
        pq.read_table(a, columns=[name])[name].equals(pq.read_table(b, columns=[name])[name]) for name in names
    )


def _apart(work: Callable[[Path, Path], None], lake: Path, out: Path) -> dict[str, float]:
    """Run a task in a separate process, so that its peak memory is its own; return seconds and gigabytes."""
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(work, lake, out, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    finally:
        process.join()
    return found


def _timed(work: Callable[[Path, Path], None], lake: Path, out: Path, told: Any) -> None:
    with duckdb.connect() as con:  # a first connection sets DuckDB up
        con.execute("SELECT 1").fetchall()
    started, cpu_before = time.perf_counter(), time.process_time()
    work(lake, out)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told.send({"seconds": seconds, "cpu": cpu, "gb": peak / 1e6})


def main() -> None:
    """Measure at each size, print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000, 30_000_000, 100_000_000])
    parser.add_argument("--shard-rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    found = []
    for rows in arguments.rows:
        found.append(measure(rows, arguments.shard_rows, several=rows <= 10_000_000))
        print("  ".join(f"{name} {round(figure, 3):,}" for name, figure in found[-1].items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
