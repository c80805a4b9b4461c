"""Checks that several assets share, each a function of the declared asset, as `checks=` takes them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared
from assets.base.checks import Check, Finding, Tables, not_compared
from core.uids import UID_DTYPE, first_places
from resources.lake.files import column_to_vectors

NORM_TOLERANCE = 0.01  # float16 of a unit vector is nearer than 0.001; the pool readers reject beyond this too
COSINE_TOLERANCE = 1e-3
ZERO_TOLERANCE = 1e-6  # of a float32 difference that is zero by its equation
COSINE_BOUNDS = (-1 - COSINE_TOLERANCE, 1 + COSINE_TOLERANCE)
CHUNK_ROWS = 16_384
EMBEDDINGS = "embeddings/"


def rows_aligned(asset: Declared) -> Check:
    """Check that the rows are those of `raw_pool` and of the embeddings that the asset reads, in the same order.

    Embeddings by an encoder with `of` have some of the rows of `raw_pool`, in its order.
    """
    embeddings = [dep.key for dep in asset.deps if dep.key.startswith(EMBEDDINGS)]
    others = ["raw_pool", *embeddings]

    def run(tables: Tables) -> Finding:
        own = uid_records(tables.read(columns=["f0", "f1"]))
        for other in others:
            theirs = uid_records(tables.read(other, ["f0", "f1"]))
            if asset.of is not None and other.startswith(EMBEDDINGS) != asset.key.startswith(EMBEDDINGS):
                # One of the two has the subset's rows, the other those of the pool.
                pool, some = (own, theirs) if other.startswith(EMBEDDINGS) else (theirs, own)
                places = first_places(pool, some)
                if len(places) != len(some) or (pool[places] != some).any():
                    why = f"the {len(some)} embedded rows are not among the {len(pool)} of the shard, in their order"
                    return Finding(False, {"rows": len(own)}, why)
                continue
            if len(own) != len(theirs):
                return Finding(False, {"rows": len(own)}, f"{len(own)} rows, and {other} has {len(theirs)}")
            wrong = np.flatnonzero(own != theirs)
            if len(wrong):
                where = f"row {wrong[0]} is another sample than in {other}"
                return Finding(False, {"rows": len(own), "rows_out_of_step": len(wrong)}, where)
        return Finding(True, {"rows": len(own)})

    text = f"Row for row the uids of {' and '.join(others)}."
    if asset.of is not None:
        text += f" The embeddings have only the rows of {asset.of}."
    return Check("rows_aligned", text, run)


def unit_norm(*columns: str) -> Callable[[Declared], Check]:
    """Check that embeddings are finite and of unit norm."""

    def run(tables: Tables) -> Finding:
        table = tables.read()
        if not table.num_rows:
            return not_compared("there are no rows")
        figures: dict[str, Any] = {}
        for column in columns:
            vectors = column_to_vectors(table[column])
            norms = np.empty(len(vectors), np.float32)
            for start in range(0, len(vectors), CHUNK_ROWS):
                wide = vectors[start : start + CHUNK_ROWS].astype(np.float32)
                norms[start : start + CHUNK_ROWS] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            off = np.abs(norms - 1)
            bad = np.flatnonzero(~(off <= NORM_TOLERANCE))
            if len(bad):
                why = f"{column}: {len(bad)} rows are not of unit norm, the first is row {bad[0]}: {norms[bad[0]]}"
                return Finding(False, {**figures, "bad_rows": len(bad)}, why)
            figures[f"{column}/largest_deviation"] = float(off.max(initial=0))
        return Finding(True, figures)

    text = f"Every {' and '.join(columns)} embedding is finite and its norm within {NORM_TOLERANCE} of 1."
    return lambda _: Check("unit_norm", text, run)


def within_bounds(asset: Declared) -> Check | None:
    """Check that every score is finite and within its column's bounds; rows without a value are skipped.

    Columns without bounds must be finite if they rank; None where there is nothing to check.
    """
    checked = [column for column in asset.columns if column.bounds is not None or column.direction is not None]

    def run(tables: Tables) -> Finding:
        table = tables.read()
        figures: dict[str, Any] = {}
        for column in checked:
            bounds = column.bounds if column.bounds is not None else (-np.inf, np.inf)
            low, high = bounds(tables) if callable(bounds) else bounds
            values = table[column.name].drop_null().to_numpy()
            bad = np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))
            if len(bad):
                wrong = "finite" if column.bounds is None else f"in [{low:g}, {high:g}]"
                why = f"{column.name}: {len(bad)} rows are not {wrong}, the first is row {bad[0]}: {values[bad[0]]}"
                return Finding(False, {"bad_rows": len(bad)}, why)
            if len(values):
                figures[f"{column.name}/min"] = values.min().item()
                figures[f"{column.name}/max"] = values.max().item()
        return Finding(True, figures) if figures else not_compared("no row has a value")

    stated = [
        f"{column.name} in [{column.bounds[0]:.4g}, {column.bounds[1]:.4g}]"
        for column in checked
        if isinstance(column.bounds, tuple)
    ]
    stated += [f"{column.name} within bounds that its inputs set" for column in checked if callable(column.bounds)]
    return Check("within_bounds", f"{', '.join(['Every value is finite', *stated])}.", run) if checked else None


def uid_records(table: pa.Table) -> np.ndarray:
    """Return f0 and f1 as one array of `UID_DTYPE` records `[n]`, which compare as the uids do."""
    uids = np.empty(table.num_rows, dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = table["f0"].to_numpy(), table["f1"].to_numpy()
    return uids
