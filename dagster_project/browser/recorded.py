"""A version's recorded steps, applied to a part of the pool: each becomes a predicate over one row.

Here: which rows of the part each step kept, as the record and the files beside it have it. Not here: steps whose limit
was changed (`trials`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from core.sql import quoted
from dagster_project.browser.members import listed
from resources.lake.versions import Version, Versions, set_file
from selection.recipes.execute import set_column
from selection.recipes.step_report import StepReport

Within = Callable[[Iterable[pa.Table]], pa.Table]
"""Returns the uids of some blocks that are in the part."""


@dataclass(frozen=True)
class Recorded:
    """The steps of a version, for rows of a part.

    Attributes:
        reports: as recorded; the predicates read columns of the pool, scores, and `sets`.
        sets: f0 and f1 of sets of uids, by name.
        known: number of the first steps whose verdict is known of every row. A later one that ranks by ranks or within
            strata, and is not the last, keeps the rows of the version alone.
    """

    reports: tuple[StepReport, ...]
    sets: Mapping[str, pa.Table]
    known: int


def recorded(versions: Versions, version: Version, within: Within) -> Recorded:
    """Read a version's steps, and the uids of the part that they refer to.

    Raises:
        DamagedError: a file of the version is missing or damaged.
    """
    lineage, reports = version.lineage, []
    named = [*([lineage["source"]["name"]] if lineage["source"]["kind"] != "pool" else []), *lineage.get("sets", {})]
    sets = {name: within(listed(versions, version, set_file(name))) for name in named}
    known = len(lineage["steps"])
    for step in lineage["steps"]:
        number, kind, file = step["step"], step["kind"], step.get("file")
        own = f'"step{number}_'  # begins the names of the columns that a step adds to the table
        step = {**step, "value": None if own in (step.get("value") or "") else step.get("value")}
        if own in step.get("predicate", own):
            name = f"rows of step {number}"
            by_file = file is not None and kind in ("deduplicate", "match_distribution", "balance")
            rows = listed(versions, version, file, kept=kind == "balance") if by_file else _kept(versions, version)
            sets[name] = within(rows)
            step["predicate"] = f"{'NOT ' if by_file and kind == 'deduplicate' else ''}{quoted(set_column(name))}"
            if not by_file and number < len(lineage["steps"]):
                known = min(known, number - 1)
        reports.append(_report(step))
    return Recorded(tuple(reports), sets, known)


def _kept(versions: Versions, version: Version) -> Iterable[pa.Table]:
    return listed(versions, version, "subset.npy")


def _report(step: Mapping[str, Any]) -> StepReport:
    given = {field.name: step[field.name] for field in fields(StepReport) if field.name in step}
    return StepReport(**{**given, "scores": tuple(given.get("scores") or ()), "summary": ()})
