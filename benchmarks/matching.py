"""Time and memory of distribution matching (SDM), and how both grow with the rows.

    python -m benchmarks.matching [--rows N ...] [--json PATH]

Features are synthetic, with common and rare concepts, and lie in mapped files as the step writes them. A fifth of the
rows is selected. Not here: computing features, and reading them from the lake (`--step` adds that: the step as a recipe
executes it, from a DuckDB table).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from benchmarks.scores import machine
from benchmarks.streaming import _peak_of_own_memory
from selection.recipes.distribution import Features, match_distribution, objective
from selection.recipes.execute import select
from selection.recipes.recipe import Recipe

ROWS = (125_000, 250_000, 500_000, 1_000_000)
K, CONCEPTS, FRACTION = 32, 8_192, 0.2
PART = 1 << 16


def measure(rows: Sequence[int] = ROWS, *, step: bool = False) -> dict[str, Any]:
    """Select from increasing numbers of rows.

    Args:
        rows: Numbers of rows, ascending.
        step: also time the whole step on the largest number.

    Returns:
        The machine, and by number of rows the seconds, the selected rows a second, and the peak of memory beyond the
        mapped features in MB; for the smallest number also `of_exact`, F over that of greedy selection that compares
        all rows.
    """
    found: dict[str, Any] = {"machine": machine(), "k": K, "concepts": CONCEPTS, "fraction": FRACTION}
    with tempfile.TemporaryDirectory() as folder:
        features = _features(Path(folder), max(rows))
        random = np.random.default_rng(1)
        target = random.permutation(1 / np.arange(1.0, CONCEPTS + 1))
        target /= target.sum()
        quality = random.integers(0, 3, max(rows))
        uids = random.integers(0, 1 << 63, (2, max(rows))).astype(np.uint64)
        for count in rows:
            part = Features(features.index[:count], features.value[:count])
            with _peak_of_own_memory() as peak:
                started = time.perf_counter()
                match_distribution(part, target, quality[:count], *uids[:, :count], count=int(count * FRACTION))
                taken = time.perf_counter() - started
            found |= {f"seconds_{count}": taken, f"selected_per_second_{count}": count * FRACTION / taken}
            found[f"peak_mb_{count}"] = peak[0]
        found["of_exact"] = _of_exact(features, target, quality, uids)
        if step:
            found[f"step_seconds_{max(rows)}"] = _step_seconds(features, target, quality, uids)
    return found


def _features(folder: Path, rows: int) -> Features:
    """Write features: concepts by a power law, each row's without repeats."""
    index = np.memmap(folder / "index", np.int32, mode="w+", shape=(rows, K))
    value = np.memmap(folder / "value", np.float16, mode="w+", shape=(rows, K))
    random = np.random.default_rng(0)
    for start in range(0, rows, PART):
        size = min(PART, rows - start)
        # A Gumbel number beside each weight would be exact and slow; K strata of concepts make rows without repeats.
        strata = (CONCEPTS // K) * random.random((size, K)) ** 3
        index[start : start + size] = strata.astype(np.int32) * K + np.arange(K)
        value[start : start + size] = random.random((size, K))
    return Features(index, value)


def _of_exact(features: Features, target: Any, quality: Any, uids: Any, rows: int = 5_000) -> float:
    """Return F of the stochastic selection over F of one that compares all rows at each step."""
    part = Features(features.index[:rows], features.value[:rows])
    values = []
    for epsilon in (0.1, 1e-300):
        found = match_distribution(
            part, target, quality[:rows], *uids[:, :rows], count=int(rows * FRACTION), epsilon=epsilon
        )
        values.append(objective(part, target, quality[:rows], found.rows, trade_off=0.5))
    return values[0] / values[1]


def _step_seconds(features: Features, target: Any, quality: Any, uids: Any) -> float:
    """Return the seconds of the step as a recipe executes it, from a table of rows, features and quality."""
    rows = len(features.index)
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as con:
        con.execute(f"SET temp_directory = '{folder}'")
        con.register("flat", {"i": features.index.reshape(-1), "v": features.value.reshape(-1).astype(np.float32)})
        con.register("rows", {"f0": uids[0], "f1": uids[1], "q": quality.astype(np.float64)})
        con.execute(
            f"""
            CREATE TEMP TABLE source AS SELECT f0, f1, '0' AS shard, 'k' AS key, q AS "q/b32", c.* FROM rows
            POSITIONAL JOIN (SELECT list(i ORDER BY n) AS "concepts/b32", list(v ORDER BY n) AS "concept_values/b32"
            FROM (SELECT *, row_number() OVER () - 1 AS n FROM flat) GROUP BY n // {K} ORDER BY n // {K}) AS c
            """
        )
        con.register(
            "target_concepts/b32/t",
            {"concept": np.arange(CONCEPTS), "label": np.array(["word"] * CONCEPTS, object), "share": target},
        )
        match = {"features": "sparse_features/b32", "target": "t", "quality": "q/b32", "count": int(rows * FRACTION)}
        started = time.perf_counter()
        select(con, "matched", Recipe.model_validate({"steps": [{"match_distribution": match}]}))
        return time.perf_counter() - started


def main() -> None:
    """Print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="N")
    parser.add_argument("--step", action="store_true", help="also time the whole step on the largest number")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    figures = measure(arguments.rows, step=arguments.step)
    for name, figure in figures.items():
        print(f"{name:32} {f'{figure:,.2f}' if isinstance(figure, float) else figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
