"""Speed of the search for near duplicates, and growth of its memory with the rows.

    python -m benchmarks.near_duplicates [--device cuda] [--rows N ...] [--json PATH]

Rows are synthetic and lie in a file, in order. Not here: ordering and gathering them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.scores import _beside, best_product, machine
from benchmarks.streaming import _peak_of_own_memory
from selection.scores.near_duplicates import nearest_before

ROWS = (25_000, 50_000, 100_000)
WIDTH = 512
PART = 16_384


def measure(rows: Sequence[int] = ROWS, *, device: str = "cpu") -> dict[str, Any]:
    """Search files with increasing numbers of rows.

    Args:
        rows: Rows of the files, ascending.
        device: Device of the search.

    Returns:
        The machine, the width, and by number of rows seconds, pairs a second, and the peak of memory beyond the mapped
        file in MB; on CPU also `of_product`, the seconds of the fastest library's product of as many multiply-adds
        over the search's.
    """
    where = torch.device(device)
    found: dict[str, Any] = {"machine": machine() | {"device": str(where)}, "width": WIDTH}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors"
        vectors = np.memmap(path, np.float16, mode="w+", shape=(max(rows), WIDTH))
        for start in range(0, len(vectors), PART):
            vectors[start : start + PART] = _unit(len(vectors[start : start + PART]), seed=start).numpy()
        vectors.flush()
        for count in [min(2_000, rows[0]), *rows]:  # the first one warms up
            stored = np.memmap(path, np.float16, mode="r", shape=(count, WIDTH))
            with _peak_of_own_memory() as peak:
                start = time.perf_counter()
                for _ in nearest_before(stored, device=where):
                    pass
                taken = time.perf_counter() - start
            pairs = count * (count - 1) / 2
            found |= {f"seconds_{count}": taken, f"pairs_per_second_{count}": pairs / taken}
            found[f"peak_mb_{count}"] = peak[0]
    if where.type == "cpu":
        found["of_product"] = _of_product()
    return found


def _of_product(rows: int = PART, repeats: int = 3) -> float:
    """Return the median of a bare product's seconds over those of a search with as many multiply-adds."""
    stored = _unit(rows, seed=1)
    left, right = stored[: rows // 2].float(), stored.float()
    _, bare = best_product((left, right), repeats=1)
    return _beside(bare, lambda: list(nearest_before(stored.numpy(), device=_CPU)), repeats)[1]


_CPU = torch.device("cpu")


def _unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1).half()


def main() -> None:
    """Print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    figures = measure(arguments.rows, device=arguments.device)
    for name, figure in figures.items():
        print(f"{name:32} {f'{figure:,.2f}' if isinstance(figure, float) else figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
