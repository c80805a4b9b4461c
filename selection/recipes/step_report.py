"""The result of one step of a recipe, as it is recorded."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """The result of one step.

    Attributes:
        step: Its number, from 1.
        kind: As in the recipe: `where`, `keep_top`, `union`, ...
        text: The step in one line.
        entered: Rows that reached the step.
        kept: Rows that are selected after it.
        predicate: The step as SQL over one row's f0, f1 and columns.
        joined: Rows that a `union` added.
        set: The recipe or uid list that the step refers to.
        score: Label of the ranking; for a single score, its name.
        scores: The scores that the ranking uses.
        value: The ranked value, as SQL over one row's columns: a finite float64.
        wanted: Rows that the fraction or count asks for.
        threshold: The smallest value that was kept; for `threshold`, the limit in the recipe; for `above`, the
            largest value that may stay.
        tie_uid: The largest uid that was kept, where rows at the threshold were partly kept.
        by: The column that `deduplicate` or `stratify` groups by.
        groups: Number of strata, or of groups of duplicates.
        samples: Number of draws of `soft_cap_sample`.
        note: A remark for the reader.
        summary: Rows of the table that the step's `report` asks for (`selection.recipes.summaries`).
    """

    step: int
    kind: str
    text: str
    entered: int
    kept: int
    predicate: str
    joined: int = 0
    set: str | None = None
    score: str | None = None
    scores: tuple[str, ...] = ()
    value: str | None = None
    wanted: int | None = None
    threshold: float | None = None
    tie_uid: str | None = None
    by: str | None = None
    groups: int | None = None
    samples: int | None = None
    note: str | None = None
    summary: tuple[dict[str, Any], ...] = ()

    @property
    def left(self) -> int:
        """Rows that the step dropped."""
        return self.entered + self.joined - self.kept

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; floats round-trip exactly."""
        return {**asdict(self), "scores": list(self.scores), "summary": list(self.summary), "left": self.left}
