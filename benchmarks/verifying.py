"""The cost of verifying checksums: negCLIPLoss and reading of stored embeddings, with checksums and without.

python -m benchmarks.verifying [--rows 8192] [--negatives 8192] [--json PATH]

Both files hold the same rows; one has no checksums, as from before they existed, so that the same code verifies
nothing. Measurements alternate, and the smallest of each kind counts. More negatives lower the share of the checksums.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import selection
from assets.base.score_tables import chunks, device
from resources.lake.files import Lake, Provenance, vectors_to_column

WIDTH = 512
ASSET, REPEATS = "embeddings/b32", 5


def measure(rows: int = 8_192, negatives: int = 8_192) -> dict[str, Any]:
    """Return seconds and ratios of one shard of `rows` rows against one draw of `negatives` rows."""
    rng = np.random.default_rng(0)

    def unit(count: int) -> np.ndarray:
        vectors = rng.standard_normal((count, WIDTH), np.float32)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    table = pa.table({side: vectors_to_column(unit(rows)) for side in ("image", "text")})
    drawn = [torch.from_numpy(unit(negatives)[None]).to(device()) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(folder)
        lake.write(table, Provenance(ASSET, "sealed", "1"))
        with pa.ipc.new_file(lake.path(ASSET, "plain"), table.schema) as writer:
            writer.write_table(table)

        def score(shard: str) -> None:
            vectors = lake.vectors(ASSET, shard, columns=["image", "text"])
            for _, (image, text) in chunks(vectors):
                selection.neg_clip_loss(image, text, *drawn, temperature=0.01)[0].cpu()

        def read(shard: str) -> None:
            for vectors in lake.vectors(ASSET, shard, columns=["image", "text"]):
                np.array(vectors[:])

        found: dict[str, Any] = {"rows": rows, "negatives": negatives, "megabytes": table.nbytes / 1e6}
        for name, act in (("neg_clip_loss", score), ("read", read)):
            plain, sealed = _alternating(act)
            found |= {f"{name}_s": plain, f"{name}_verified_s": sealed, f"{name}_verified_of_plain": sealed / plain}
    verifying = found["read_verified_s"] - found["read_s"]
    return found | {
        "verified_gb_per_s": table.nbytes / 1e9 / verifying,
        "verifying_of_neg_clip_loss": verifying / found["neg_clip_loss_s"],
    }


def _alternating(act: Callable[[str], None]) -> tuple[float, float]:
    seconds: dict[str, list[float]] = {"plain": [], "sealed": []}
    for _ in range(REPEATS):
        for shard, taken in seconds.items():
            started = time.perf_counter()
            act(shard)
            taken.append(time.perf_counter() - started)
    return min(seconds["plain"]), min(seconds["sealed"])


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8_192)
    parser.add_argument("--negatives", type=int, default=8_192)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.negatives)
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
