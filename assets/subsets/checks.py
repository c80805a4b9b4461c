"""Checks of a subset's version: its size follows from the recipe, and DataComp's array can be searched by bisection.

They run before a version is written, and again on its files in every run of the subset.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assets.base.checks import CheckFailed, asset_key, stops
from assets.base.upstream_checks import warning
from core.uids import UID_DTYPE
from resources.lake.files import Lake
from resources.lake.versions import Version, Versions
from selection.recipes.recipe import Recipe

DESCRIPTIONS = {
    "size": "Every step kept the number of rows its recipe asks for: floor(N × fraction) of the starting rows, or "
    "`count`, capped by what was left; `stratify` in each stratum; DataComp's rule keeps one more, and ties. The "
    "manifest has the rows of the last step, and the array has them too, or the drawn samples.",
    "uids_sorted_and_unique": "The `.npy` is `u8,u8`, sorted by (f0, f1), and has the manifest's uids, each once or as "
    "often as it was drawn.",
    "uids_unique_across_shards": "Every uid occurs once. Of repeated uids, the first row stays and the others are left "
    "out.",
}
BLOCKING = ("size", "uids_sorted_and_unique")


def specs(key: str) -> list[dg.AssetCheckSpec]:
    """Return the checks as Dagster declares them."""
    return [
        dg.AssetCheckSpec(name, asset=asset_key(key), description=text, blocking=name in BLOCKING)
        for name, text in DESCRIPTIONS.items()
    ]


def examine_subset(
    lineage: Mapping[str, Any], manifest: pa.Table, uids: np.ndarray, strata: Mapping[int, pa.Table]
) -> dict[str, dict[str, Any]]:
    """Run the checks; return the findings as JSON values, by the check's name.

    Args:
        lineage: the lineage record.
        manifest: f0 and f1 of the selected rows; where they were drawn, copies.
        uids: DataComp's array.
        strata: the table of strata of each `stratify` step, by its number.
    """
    duplicates = lineage["source"]["duplicates"]
    found = {
        "size": ({"rows": lineage["rows"]}, _size(lineage, manifest, uids, strata)),
        "uids_sorted_and_unique": ({"rows": len(uids)}, _order(manifest, uids)),
        "uids_unique_across_shards": (
            {"duplicates_left_out": duplicates},
            _repeated(duplicates),
        ),
    }
    return {
        name: {"passed": not why, "blocking": name in BLOCKING, "figures": figures, "why": why}
        for name, (figures, why) in found.items()
    }


def duplicate_warnings(key: str, duplicates: int) -> list[dict[str, Any]]:
    """Return the warning about rows that were left out because their uid is repeated, as `warnings_of` does."""
    return [warning(key, "uids_unique_across_shards", _repeated(duplicates))] if duplicates else []


def _repeated(duplicates: int) -> str:
    return f"{duplicates} rows have the uid of an earlier row and were left out" if duplicates else ""


def examine_before_the_record(lake: Lake, version: Version) -> None:
    """Run the checks of files that are about to become a version.

    Raises:
        CheckFailed: a blocking one failed.
    """
    findings = examine_stored(lake, version)
    if any(map(stops, findings.values())):
        raise CheckFailed(f"subset/{version.recipe}", None, findings)


def examine_stored(lake: Lake, version: Version) -> dict[str, dict[str, Any]]:
    """Run the checks of a version's files."""
    with open(lake.store.local(version.uids), "rb") as file:
        uids = np.lib.format.read_array(file, allow_pickle=False)
    columns = ("f0", "f1", "copies") if _drawn(version.lineage) else ("f0", "f1")
    manifest = Versions(lake, version.recipe).read_uids(version, columns=columns)
    strata = {}
    for step in version.lineage["steps"]:
        if step["kind"] == "stratify":
            with pq.ParquetFile(lake.store.local(f"{version.folder}/{step['file']}")) as file:
                strata[step["step"]] = file.read(columns=["basis", "entered"])
    return examine_subset(version.lineage, manifest, uids, strata)


def _drawn(lineage: Mapping[str, Any]) -> bool:
    steps = lineage["steps"]
    return bool(steps) and steps[-1]["kind"] == "soft_cap_sample"


def _size(lineage: Mapping[str, Any], manifest: pa.Table, uids: np.ndarray, strata: Mapping[int, pa.Table]) -> str:
    """Return what differs from the numbers of rows that the recipe asks for; empty if nothing does."""
    basis = entered = lineage["source"]["rows"]
    recipe = Recipe.model_validate(lineage["definition"])
    for step, report in zip(recipe.steps, lineage["steps"], strict=True):
        wanted = step.keep_top.wanted(basis) if step.keep_top is not None else None
        kept = report["kept"] if wanted is None else min(wanted, entered)
        if step.keep_top is not None and step.keep_top.rule == "datacomp":
            kept = max(kept, min(report["kept"], entered))  # all that are equal to the last one stay
        if step.stratify is not None:
            sizes = strata[report["step"]].to_pylist()
            kept = sum(min(step.stratify.wanted(size["basis"]), size["entered"]) for size in sizes)
        if (report["entered"], report["kept"]) != (entered, kept):
            return f"step {report['step']}: {report['kept']} of {report['entered']} rows kept, not {kept} of {entered}"
        entered = kept
        if step.kind == "within":
            basis = kept
    draw = recipe.steps[-1].soft_cap_sample if recipe.steps else None
    samples = entered if draw is None else draw.wanted(basis)
    counted = {
        "record": (lineage["rows"], entered),
        "manifest": (manifest.num_rows, entered),
        "array": (len(uids), samples),
    }
    wrong = [f"the {what} has {rows} rows, not {right}" for what, (rows, right) in counted.items() if rows != right]
    return ", ".join(wrong)


def _order(manifest: pa.Table, uids: np.ndarray) -> str:
    """Return how DataComp's array differs from the manifest in order; empty if it does not."""
    if uids.dtype != UID_DTYPE:
        return f"its dtype is {uids.dtype}, not u8,u8"
    f0, f1 = uids["f0"], uids["f1"]
    listed = [manifest["f0"].to_numpy(), manifest["f1"].to_numpy()]
    rising = (f0[1:] > f0[:-1]) | ((f0[1:] == f0[:-1]) & (f1[1:] > f1[:-1]))
    if "copies" in manifest.column_names:
        rising |= (f0[1:] == f0[:-1]) & (f1[1:] == f1[:-1])
        listed = [np.repeat(words, manifest["copies"].to_numpy()) for words in listed]
    if not rising.all():
        return f"row {int(np.flatnonzero(~rising)[0]) + 1} is not above the row before it"
    if len(uids) != len(listed[0]) or (f0 != listed[0]).any() or (f1 != listed[1]).any():
        return "its uids are not the manifest's"
    return ""
