"""What `explain` shows of a step over concepts: those a row was selected for, and those that were saturated.

A concept is saturated when its share of the subset is at least its share of the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core import sql

_MOST = 4  # concepts of one kind

Features = tuple[str, str, str]
"""The key of sparse features, and the names of the scores with a row's concepts and their values."""


@dataclass(frozen=True)
class Judged:
    """What a step over concepts decides about the sample, as SQL.

    Attributes:
        decides: whether it stays.
        value: its value; NULL for a row that was not compared.
        kept: the text that explains why it stayed.
        dropped: the text that explains why it did not.
    """

    decides: str
    value: str
    kept: str
    dropped: str


def judge_concepts(
    step: Mapping[str, Any], rows: str, concepts: str, sample: str, features: Sequence["Features"]
) -> Judged:
    """Write what a step over concepts decides about the sample.

    Args:
        step: the step as recorded.
        rows: scan of its file of rows.
        concepts: scan of its file of concepts.
        sample: SQL over one row: whether it is the sample.
        features: those that the step reads and that still exist.
    """
    if step["kind"] == "balance":
        counts = _counts(rows, concepts, sample)
        decides = f"coalesce((SELECT kept FROM {rows} WHERE {sample}), false)"
        return Judged(decides, f"(SELECT value FROM {rows} WHERE {sample})", counts, counts)
    return Judged(
        f"EXISTS (SELECT 1 FROM {rows} WHERE {sample})",
        f"(SELECT gain FROM {rows} WHERE {sample})",
        selected_for(rows, concepts, sample),
        saturated(concepts, features),
    )


def _counts(rows: str, concepts: str, sample: str) -> str:
    """Write the text of the sample's rarest concepts, with the rows that have them before and after the step."""
    numbers = f"SELECT unnest(concepts) AS number FROM {rows} WHERE {sample}"
    shown = "format('{} ({:,} rows, {:,} after the step)', label, entered, selected)"
    return (
        f"SELECT coalesce(string_agg({shown}, ', ' ORDER BY entered, number), 'it has no concept') "
        f"FROM ({numbers}) JOIN {concepts} USING (number)"
    )


def features_of(record: Mapping[str, Any], step: Mapping[str, Any]) -> list[Features]:
    """Return the sparse features that a step of a version matches; none for other steps."""
    if step["kind"] != "match_distribution":
        return []
    listed = record["definition"]["steps"][step["step"] - 1][step["kind"]]["features"]
    encoders = [(key, key.partition("/")[2]) for key in ([listed] if isinstance(listed, str) else listed)]
    return [(key, f"concepts/{encoder}", f"concept_values/{encoder}") for key, encoder in encoders]


def selected_for(rows: str, concepts: str, sample: str) -> str:
    """Write the text of the concepts that added most when a row was selected; NULL for other rows.

    Args:
        rows: scan of the step's selected rows.
        concepts: scan of its concepts.
        sample: SQL over one row: whether it is the sample.
    """
    parts = f"SELECT unnest(concepts) AS number, unnest(parts) AS part FROM {rows} WHERE {sample}"
    gained = f"{_name()} || format(' (+{{:.2g}})', part)"
    return (
        f"SELECT 'selected for ' || string_agg({gained}, ', ' ORDER BY part DESC, number) "
        f"FROM ({parts}) JOIN {concepts} USING (number) WHERE part > 0"
    )


def saturated(concepts: str, features: Sequence[Features]) -> str:
    """Write the text of the row's concepts that the subset holds enough of, those with the largest values first.

    Args:
        concepts: scan of the step's concepts.
        features: those of which the row's columns exist.
    """
    if not features:
        return "NULL::VARCHAR"
    own = " UNION ALL ".join(
        f"SELECT {sql.text(key)} AS features, unnest({sql.quoted(index)}) AS concept, "
        f"unnest({sql.quoted(value)}) AS strength"
        for key, index, value in features
    )
    shares = f"{_name()} || format(' (target {{:.2f}} %, subset {{:.2f}} %)', 100 * target, 100 * selected)"
    full = _listed("already saturated", shares, "target > 0 AND selected >= target")
    absent = _listed("not in the target", _name(), "target = 0")
    neither = "'no concept is saturated; other rows gained more'"
    return (
        f"SELECT coalesce(nullif(concat_ws('; ', {full}, {absent}), ''), {neither}) "
        f"FROM ({own}) JOIN {concepts} USING (features, concept) WHERE strength > 0"
    )


def _listed(title: str, shown: str, which: str) -> str:
    """Write the text of the strongest concepts of one kind; NULL without any."""
    names = f"list({shown} ORDER BY strength DESC, number) FILTER (WHERE {which})"
    return f"{sql.text(f'{title}: ')} || array_to_string(({names})[:{_MOST}], ', ')"


def _name() -> str:
    return "trim(label || ' #' || concept)"
