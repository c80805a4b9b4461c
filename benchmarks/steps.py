"""The cost of each kind of step, relative to a `keep_top` over the same rows.

python -m benchmarks.steps [--rows 10000000] [--json PATH]

Rows are synthetic, in a DuckDB table like the one that steps read; `selecting` measures joining files to that table and
writing the result. Each step runs in a separate process, with DuckDB's memory limited as in a run.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from selection.recipes.execute import select
from selection.recipes.recipe import Recipe

SCORE, OTHER = "clip_score/b32", "neg_clip_loss/b32"
STEPS: Mapping[str, dict[str, Any]] = {
    "keep_top": {"keep_top": {"score": SCORE, "fraction": 0.3}},
    "rank_sum": {"keep_top": {"rank_sum": [SCORE, OTHER], "fraction": 0.3}},
    "deduplicate": {"deduplicate": {"by": "image", "best": SCORE}},
    "stratify": {"stratify": {"by": "language/facts", "score": SCORE, "fraction": 0.3}},
    "stratify_many": {"stratify": {"by": "cluster/b32/imagenet", "score": SCORE, "fraction": 0.3}},
    "soft_cap_sample": {"soft_cap_sample": {"score": SCORE, "fraction": 0.2, "temperature": 0.1}},
    "report": {"keep_top": {"score": SCORE, "fraction": 0.3}, "report": [OTHER, "language/facts"]},
}


def measure(rows: int) -> dict[str, Any]:
    """Time every step over `rows` rows: a tenth are copies, there are 40 languages and up to 100,000 clusters."""
    found: dict[str, Any] = {"rows": rows}
    context = multiprocessing.get_context("spawn")
    for name in STEPS:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_timed, args=(name, rows, theirs))
        process.start()
        theirs.close()
        try:
            seconds, before, after = ours.recv()
        finally:
            process.join()
        found[f"{name}_s"], found[f"{name}_peak_gb"] = seconds, after
        found[f"{name}_of_keep_top"] = seconds / found["keep_top_s"]
        found.setdefault("table_peak_gb", before)
    return found


def _timed(name: str, rows: int, told: Any) -> None:
    with tempfile.TemporaryDirectory() as spill, duckdb.connect() as con:
        con.execute("SET temp_directory = ?", [spill])
        con.execute("SET memory_limit = ?", ["2GB"])
        con.execute("SET enable_progress_bar = false")
        con.execute(
            f"""
            CREATE TEMP TABLE source AS SELECT hash(i, 1) AS f0, i::UBIGINT AS f1, '' AS shard, '' AS key,
                sha256((i % {rows * 9 // 10})::VARCHAR) AS sha256, (hash(i, 2) % 40)::VARCHAR AS "language/facts",
                (hash(i, 3) % 100000)::BIGINT AS "cluster/b32/imagenet",
                (hash(i, 4) / 1.8446744073709552e19)::FLOAT AS "{SCORE}",
                (hash(i, 5) / 1.8446744073709552e19)::FLOAT AS "{OTHER}"
            FROM range({rows}) t(i)
            """
        ).fetchall()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        start = time.perf_counter()
        select(con, name, Recipe.model_validate({"steps": [STEPS[name]]}))
        told.send((time.perf_counter() - start, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def main() -> None:
    """Measure, print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    found = measure(arguments.rows)
    for name, figure in found.items():
        print(f"{name:32} {f'{figure:,.2f}' if isinstance(figure, float) else figure}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
