"""The funnel of a subset: how many rows entered each step of the recipe, and how many it kept."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

COLUMNS = ("step", "entered", "kept", "of source", "threshold")


class FunnelRow(NamedTuple):
    """A step of a funnel as text, in the order of `COLUMNS`."""

    step: str
    entered: str
    kept: str
    of_source: str
    threshold: str


def funnel_rows(lineage: Mapping[str, Any], threshold_format: str = ".6g") -> list[FunnelRow]:
    """Return one row for each step of a lineage record.

    Args:
        lineage: The record.
        threshold_format: Format of a threshold; a step without one has empty text.
    """
    return [
        FunnelRow(
            step["text"],
            f"{step['entered']:,}",
            f"{step['kept']:,}",
            f"{step['kept'] / lineage['source']['rows']:.1%}",
            "" if step["threshold"] is None else format(step["threshold"], threshold_format),
        )
        for step in lineage["steps"]
    ]


def funnel_markdown(lineage: Mapping[str, Any]) -> str:
    """Return the funnel as a Markdown list: Dagster's page wraps a list, and cuts a table at the right."""
    return "\n".join(_listed(row) for row in funnel_rows(lineage))


def _listed(row: FunnelRow) -> str:
    step = re.sub(r"([\\`*_\[\]<>|])", r"\\\1", row.step)
    threshold = f", threshold {row.threshold}" if row.threshold else ""
    return f"1. {step}: {row.kept} of {row.entered}, {row.of_source} of the source{threshold}"
