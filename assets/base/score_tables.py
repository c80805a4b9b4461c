"""What the score assets share: reading embeddings in chunks, and a score table with its figures.

Here: nothing that computes a score; `selection` does that.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from assets.project import Project
from resources.lake.files import column_to_vectors

if TYPE_CHECKING:
    import torch

CHUNK_ROWS = 16_384
IDENTITY = [
    pa.field("shard", pa.string(), nullable=False),
    pa.field("f0", pa.uint64(), nullable=False),
    pa.field("f1", pa.uint64(), nullable=False),
]
BARS = "▁▂▃▄▅▆▇█"


def score_schema(**columns: pa.DataType) -> pa.Schema:
    """Give the schema of a score asset: the sample's identity and the given columns."""
    return pa.schema([*IDENTITY, *(pa.field(n, t, nullable=False) for n, t in columns.items())])


def device() -> "torch.device":
    """Give the device that scores are computed on: a GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_tensor(vectors: np.ndarray) -> "torch.Tensor":
    """Copy vectors out of the memory map onto the device."""
    import torch

    return torch.from_numpy(np.array(vectors)).to(device())


def embedding_chunks(
    project: Project, asset: str, embeddings: pa.Table, *columns: str
) -> Iterator[tuple[slice, list["torch.Tensor"]]]:
    """Give a shard's embeddings chunk by chunk on the device, as `[rows, d]` tensors, one a column.

    Args:
        project: is told of the rows that are through, under the name `asset`.
        asset: key of the asset that works on them.
        embeddings: a shard's table of `embeddings/<encoder>`, with its `shard` in the schema's metadata.
        columns: `image`, `text` or both.
    """
    import torch

    from selection.similarity.streaming import resident

    vectors = [column_to_vectors(embeddings[column]) for column in columns]

    def read(rows: slice) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(v[rows])) for v in vectors]

    for rows, parts in resident(embeddings.num_rows, CHUNK_ROWS, device(), read):
        yield rows, parts
        project.on_progress(asset, "", rows.stop - rows.start)


def score_table(shard: str, embeddings: pa.Table, **columns: np.ndarray) -> pa.Table:
    """Put a shard's scores beside the identity of its rows.

    Raises:
        ValueError: a floating-point score is not finite; NaN is allowed in standard errors alone.
    """
    for name, values in columns.items():
        if values.dtype.kind == "f" and not name.endswith("_stderr") and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} of shard {shard}: row {row} is {values[row]}")
    return pa.table(
        {
            "shard": pa.array([shard] * embeddings.num_rows, pa.string()),
            "f0": embeddings["f0"],
            "f1": embeddings["f1"],
            **{name: pa.array(values) for name, values in columns.items()},
        }
    )


def figures(name: str, values: np.ndarray) -> dict[str, float | str]:
    """Give the figures of a score that the UI shows: mean, spread, range and a small histogram in text."""
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
