"""The funnel of a subset: how many rows entered each step of the recipe, and how many it kept."""

import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from assets.base.contact_sheets import escaped

LINE = 34  # characters that a subset's page shows in a window of 1,440 pixels
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
    """Return the funnel as a Markdown list in short lines, each with the kept rows' share of the source.

    Dagster's page wraps nothing, and cuts at the right.
    """
    return "\n".join(_listed(row) for row in funnel_rows(lineage))


def _listed(row: FunnelRow) -> str:
    lines = textwrap.wrap(row.step, LINE, break_long_words=False, break_on_hyphens=False)
    lines.append(f"{row.kept} of {row.entered}, {row.of_source}")
    if row.threshold:
        lines.append(f"threshold {row.threshold}")
    return "1. " + "  \n   ".join(map(escaped, lines))
