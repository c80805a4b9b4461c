"""Tensors from stored vectors, and score tables with their statistics.

Here: nothing that computes a score; `selection` does that.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from assets.base.standard_checks import uid_records
from core.uids import first_places
from resources.lake.sealed import Vectors

if TYPE_CHECKING:
    import torch

CHUNK_ROWS = 16_384
BARS = "▁▂▃▄▅▆▇█"


def device() -> "torch.device":
    """Return the device that scores are computed on: a GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """Return the kind of processor that scores are computed on; scores of two kinds can differ in the last bits."""
    from selection.similarity.reduction import processor as kind

    return kind(device())


def to_tensor(vectors: np.ndarray) -> "torch.Tensor":
    """Copy vectors out of the memory map onto the device."""
    import torch

    return torch.from_numpy(np.array(vectors)).to(device())


def chunks(vectors: Sequence[np.ndarray | Vectors]) -> Iterator[tuple[slice, list["torch.Tensor"]]]:
    """Yield arrays of n rows chunk by chunk on the device; the next chunk is fetched while the caller computes.

    Args:
        vectors: `[n, d]` each; `Vectors` are verified chunk by chunk.

    Yields:
        The rows, and a `[rows, d]` tensor of each array.
    """
    import torch

    from selection.similarity.streaming import resident

    def read(rows: slice) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(v[rows])) for v in vectors]

    yield from resident(len(vectors[0]), CHUNK_ROWS, device(), read)


def score_table(shard: str, identity: pa.Table, **columns: np.ndarray) -> pa.Table:
    """Return a shard's scores beside the identity of its rows.

    Args:
        shard: its name.
        identity: a table with f0 and f1 of its n rows.
        columns: `[n]` values by name.

    Raises:
        ValueError: a floating-point score is not finite; only standard errors may be NaN.
    """
    for name, values in columns.items():
        if values.dtype.kind == "f" and not name.endswith("_stderr") and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} of shard {shard}: row {row} is {values[row]}")
    return pa.table(
        {
            "shard": pa.array([shard] * identity.num_rows, pa.string()),
            "f0": identity["f0"],
            "f1": identity["f1"],
            **{name: pa.array(values) for name, values in columns.items()},
        }
    )


def in_pool_order(shard: str, table: pa.Table, pool: pa.Table) -> pa.Table:
    """Return scores of some of a shard's rows as a table of all its rows, without values for the others.

    Args:
        shard: its name.
        table: their scores beside shard, f0 and f1, in the order of `pool`, each uid once.
        pool: a table with f0 and f1 of all rows.
    """
    places = first_places(uid_records(pool), uid_records(table))
    row = np.full(pool.num_rows, -1)
    row[places] = np.arange(table.num_rows)
    values = table.drop_columns(["shard", "f0", "f1"]).take(pa.array(row, mask=row < 0))
    identity = {"shard": pa.array([shard] * pool.num_rows, pa.string()), "f0": pool["f0"], "f1": pool["f1"]}
    return pa.table({**identity, **{name: values[name] for name in values.column_names}})


def score_stats(name: str, values: np.ndarray) -> dict[str, float | str]:
    """Return mean, spread, range and a small text histogram of a score, by names that the UI shows."""
    if not len(values):
        return {}
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    counts, _ = np.histogram(wide, bins=32, range=(low, high if high > low else low + 1))
    heights = np.ceil(counts / counts.max() * len(BARS)).astype(int)
    bars = "".join(" " if h == 0 else BARS[h - 1] for h in heights)
    return {
        f"{name}/mean": float(wide.mean()),
        f"{name}/std": float(wide.std()),
        f"{name}/min": low,
        f"{name}/max": high,
        f"{name}/histogram": f"{low:.3f} {bars} {high:.3f}",
    }
