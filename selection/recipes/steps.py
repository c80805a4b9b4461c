"""The steps of a recipe: their models, the columns they read, and their descriptions.

The recipe is in `selection.recipes.recipe`, the execution of a step in `selection.recipes.execute`.
"""

from math import isfinite
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from selection.recipes.model import BASIS, POOL, Model, part_of
from selection.recipes.predicates import predicate_columns
from selection.recipes.set_steps import Balance, MatchDistribution

UID, IMAGE, DIGEST = "uid", "image", "sha256"
LIKENESS = "near_duplicate/"


class Ranking(Model):
    """The value that rows are ranked by: one score, or several combined.

    Attributes:
        score: The score's name, such as `neg_clip_loss/b32`.
        rank_sum: Names of scores whose ranks are added; the smallest sums stay. A rank is 1 + the number of rows that
            entered the step with a larger value, so equal values have equal ranks.
        weighted: Names of scores with their weights. Each score is normalised over the rows that entered the step,
            multiplied by its weight, and added.
        normalise: `rank` (n - rank) / (n - 1), `min_max` (x - min) / (max - min), or `z_score` (x - mean) / standard
            deviation (of the population), or `none`, the score itself.
    """

    yaml_name: ClassVar[str] = "a ranking"

    score: str | None = Field(default=None, min_length=1)
    rank_sum: tuple[str, ...] | None = None
    weighted: dict[str, float] | None = None
    normalise: Literal["rank", "min_max", "z_score", "none"] | None = None

    @model_validator(mode="after")
    def _one_value(self) -> Self:
        given = self._only_one("score", "rank_sum", "weighted")
        if self.score is None and (len(self.scores) < 2 or len(set(self.scores)) < len(self.scores)):
            raise ValueError(f"{given} combines two or more different scores")
        if self.weighted is not None and not all(weight and isfinite(weight) for weight in self.weighted.values()):
            raise ValueError("weighted: a weight is a finite number other than 0")
        if (self.weighted is None) != (self.normalise is None):
            raise ValueError("weighted and normalise (rank, min_max, z_score or none) are given together or not at all")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores in the ranking."""
        if self.score is not None:
            return (self.score,)
        return self.rank_sum if self.rank_sum is not None else tuple(self.weighted or ())

    @property
    def label(self) -> str:
        """Description of the ranked value; for a single score, its name."""
        if self.score is not None:
            return self.score
        if self.weighted is None:
            return f"rank_sum of {' and '.join(self.scores)}"
        return f"{' + '.join(f'{weight!r} {name}' for name, weight in self.weighted.items())} ({self.normalise})"


class KeepTop(Ranking):
    """Keep the rows with the largest values; exactly one limit is set.

    Attributes:
        fraction: Share of the rows before the first step, or, after a `within`, of the rows it kept; above 0 and at
            most 1.
        count: Number of rows.
        threshold: Smallest value that is kept.
        rule: How a fraction f of N rows is cut. `exact`: floor(N·f) rows, ties broken by uid. `datacomp`: every row
            at or above the value at place int(N·f), from 0, in falling order, as in DataComp's baselines: one row
            more, and all equal to it.
    """

    yaml_name: ClassVar[str] = "keep_top"

    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    threshold: float | None = Field(default=None, allow_inf_nan=False, strict=True)
    rule: Literal["exact", "datacomp"] = "exact"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        self._only_one("fraction", "count", "threshold")
        if self.rule == "datacomp" and self.fraction is None:
            raise ValueError("rule datacomp applies to a fraction only. Remedy: set fraction, or leave rule out")
        if self.rank_sum is not None and self.threshold is not None:
            raise ValueError("rank_sum has no meaningful threshold. Remedy: set fraction or count")
        return self

    def wanted(self, basis: int) -> int | None:
        """Return the number of rows to keep.

        Args:
            basis: Number of rows that a fraction refers to.

        Returns:
            floor(basis · fraction), or the count; None for a threshold. For the rule `datacomp`, the number without
            ties; it multiplies in binary, as DataComp's code does.
        """
        if self.fraction is not None and self.rule == "datacomp":
            return int(basis * self.fraction) + 1
        if self.fraction is not None:
            return part_of(basis, self.fraction)
        return self.count

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        if self.fraction is not None and self.rule == "datacomp":
            return f"keep {self.label} >= its value behind the top {self.fraction!r} of {basis}"
        if self.fraction is not None:
            return f"keep the top {self.fraction!r} of {basis} by {self.label}"
        if self.count is not None:
            return f"keep the top {self.count} by {self.label}"
        return f"keep {self.label} >= {self.threshold!r}"


class _Limited(Ranking):
    """A ranking limited by a fraction or a count; exactly one is set."""

    fraction: float | None = None
    count: int | None = Field(default=None, gt=0, strict=True)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        self._only_one("fraction", "count")
        return self

    def wanted(self, basis: int) -> int:
        """Return the number of rows asked for: floor(basis · fraction), or the count."""
        if self.fraction is not None:
            return part_of(basis, self.fraction)
        assert self.count is not None
        return self.count


class Stratify(_Limited):
    """Keep the rows with the largest values of each stratum; a stratum is the rows with one value of a column.

    Attributes:
        by: A column of the pool or a score. Rows without a value are a stratum of their own.
        fraction: Keep floor(N·f) rows of each stratum; N counts its rows before the first step, or, after a `within`,
            those it kept.
        count: Number of rows of each stratum.
    """

    yaml_name: ClassVar[str] = "stratify"

    by: str = Field(min_length=1)
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        limit = self.count if self.fraction is None else repr(self.fraction)
        counted = f", counted from {basis}" if self.fraction is not None and basis != BASIS else ""
        return f"keep the top {limit} of each {self.by} by {self.label}{counted}"


class Deduplicate(Model):
    """Keep one of several duplicates.

    Attributes:
        by: `image` (equal sha256 of its bytes), `uid`, any column of the pool or score (equal values), or, with
            `above`, a score that holds a row's similarity to the most similar better row.
        best: The score that decides which of equal rows stays; the smaller uid wins ties, and wins without a score.
        above: Rows whose `by` is larger are dropped.
    """

    by: str = Field(min_length=1)
    best: str | None = Field(default=None, min_length=1)
    above: float | None = Field(default=None, allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.above is not None and self.best is not None:
            raise ValueError(f"best: {self.by} has decided already which row is better. Remedy: leave best out")
        if self.above is not None and self.column == DIGEST:
            raise ValueError(
                f"above: {self.by} is no number. Remedy: leave above out, or set by: near_duplicate/<encoder>"
            )
        if self.above is None and self.by.startswith(LIKENESS):
            raise ValueError(f"{self.by} is a similarity. Remedy: set above, the largest value that stays")
        if self.by == UID and (self.above is not None or self.best is not None):
            raise ValueError("by uid: copies of a uid are one sample. Remedy: leave best and above out")
        return self

    @property
    def column(self) -> str | None:
        """The compared column; None for the uid, which no two rows share."""
        return {UID: None, IMAGE: DIGEST}.get(self.by, self.by)

    @property
    def equal(self) -> str | None:
        """The column whose equal values make rows duplicates; None with `above` or by uid."""
        return self.column if self.above is None else None

    def describe(self) -> str:
        """Return the step in one line."""
        if self.above is not None:
            return f"drop rows whose {self.by} is above {self.above!r}"
        return f"keep one row of each {self.by}" + (f", the best by {self.best}" if self.best is not None else "")


class SoftCapSample(_Limited):
    """Draw samples by their score; every draw makes a sample less likely (soft cap sampling, arXiv 2503.08805).

    Each round draws a batch without replacement with probabilities softmax((value - penalty · earlier draws) /
    temperature). A sample that is drawn in several rounds is in the subset's `.npy` as many times.

    Attributes:
        fraction: Number of draws as a share of the rows before the first step, or, after a `within`, of the rows it
            kept; it may be above 1.
        count: Number of draws.
        batch: Draws of a round; the last round may have fewer.
        penalty: Subtracted from a sample's value for each earlier draw.
        temperature: Temperature of the softmax.
        seed: Seed of the draws.
    """

    yaml_name: ClassVar[str] = "soft_cap_sample"

    fraction: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    batch: int = Field(default=100_000, gt=0, strict=True)
    penalty: float = Field(default=0.15, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)

    @model_validator(mode="after")
    def _has_a_softmax(self) -> Self:
        if self.rank_sum is not None:
            raise ValueError("rank_sum: ranks have no meaningful softmax. Remedy: set score or weighted")
        return self

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        draws = f"{self.count}" if self.fraction is None else f"{self.fraction!r} of {basis}"
        fields = type(self).model_fields
        others = {name: getattr(self, name) for name in ("batch", "temperature", "seed")}
        changed = [f"{name} {value!r}" for name, value in others.items() if value != fields[name].default]
        return ", ".join([f"draw {draws} by {self.label}", f"{self.penalty!r} less likely each time", *changed])


class Step(Model):
    """One step of exactly one kind.

    Attributes:
        where: Keep the rows for which a DuckDB predicate is true.
        keep_top: Keep the rows with the largest values.
        within: Keep the rows of a set; later fractions refer to them.
        union: Add the rows of a set, also those that an earlier step dropped.
        intersect: Keep the rows of a set.
        except_: `except` in YAML: drop the rows of a set.
        stratify: Keep the rows with the largest values of each stratum.
        deduplicate: Keep one of several duplicates.
        soft_cap_sample: Draw rows, some of them several times; only as the last step.
        match_distribution: Keep the set whose concepts are distributed as a target's.
        balance: Cut common concepts to a cap.
        report: Columns to summarise over the rows that entered, stayed and were dropped.

    A set is another recipe, or a uid list by its path or asset.
    """

    where: str | None = None
    keep_top: KeepTop | None = None
    within: str | None = None
    union: str | None = None
    intersect: str | None = None
    except_: str | None = Field(default=None, alias="except")
    stratify: Stratify | None = None
    deduplicate: Deduplicate | None = None
    soft_cap_sample: SoftCapSample | None = None
    match_distribution: MatchDistribution | None = None
    balance: Balance | None = None
    report: tuple[str, ...] = ()

    @field_validator("where")
    @classmethod
    def _readable(cls, where: str | None) -> str | None:
        if where is not None:
            predicate_columns(where)
        return where

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in _FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is exactly one of {', '.join(KINDS)}; found {' and '.join(given) or 'none'}")
        if self.set_name in ("", POOL):
            raise ValueError(f"{self.kind}: name another recipe, or a uid list")
        return self

    @property
    def kind(self) -> str:
        """The step's name in YAML."""
        return next(name.rstrip("_") for name in _FIELDS if getattr(self, name) is not None)

    @property
    def set_name(self) -> str | None:
        """The recipe or uid list that the step refers to, if any."""
        return next(
            (name for name in (self.within, self.union, self.intersect, self.except_) if name is not None), None
        )

    @property
    def text(self) -> str:
        """The step in one line."""
        return self.describe(BASIS)

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        if self.set_name is not None:
            return _SET_TEXT[self.kind].format(self.set_name)
        if self.deduplicate is not None:
            return self.deduplicate.describe()
        ranked = self.keep_top or self.stratify or self.soft_cap_sample or self._set_step
        return ranked.describe(basis) if ranked is not None else f"where {self.where}"

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores in the step's ranking."""
        ranked = self.keep_top or self.stratify or self.soft_cap_sample or self._set_step
        return ranked.scores if ranked is not None else ()

    @property
    def numbers(self) -> frozenset[str]:
        """The columns that the step reads as numbers."""
        like = self.deduplicate
        compared = () if like is None else (like.best, like.by if like.above is not None else None)
        return frozenset(name for name in (*self.scores, *compared) if name is not None)

    @property
    def tables(self) -> tuple[str, ...]:
        """The unpartitioned assets that the step reads."""
        return () if (judged := self._set_step) is None else judged.tables

    @property
    def _set_step(self) -> MatchDistribution | Balance | None:
        return self.match_distribution or self.balance

    def columns(self) -> frozenset[str]:
        """Return every column that the step reads."""
        names = {*self.report, *self.scores}
        if self._set_step is not None:
            names.update(self._set_step.columns())
        if self.stratify is not None:
            names.add(self.stratify.by)
        if self.deduplicate is not None:
            names.update(name for name in (self.deduplicate.column, self.deduplicate.best) if name is not None)
        return frozenset(names) | (predicate_columns(self.where) if self.where is not None else frozenset())


_SET_TEXT = {
    "within": "within {}",
    "union": "add the rows of {}",
    "intersect": "keep the rows of {}",
    "except": "drop the rows of {}",
}
_FIELDS = tuple(name for name in Step.model_fields if name != "report")
KINDS = tuple(name.rstrip("_") for name in _FIELDS)
