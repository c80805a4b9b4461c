"""The steps of a recipe: the model of what a user writes, and how each is said in words.

Here belongs what one step may say and which columns it reads. What a recipe is, and what it may name, is in
`selection.recipes.recipe`; carrying a step out is `selection.recipes.execute`.
"""

from fractions import Fraction
from math import isfinite
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from selection.recipes.predicates import predicate_columns

POOL = "pool"
BASIS = "the pool"  # what fractions count from, in words, before a `within`
UID, IMAGE, DIGEST = "uid", "image", "sha256"
LIKENESS = "near_duplicate/"


class Model(BaseModel):
    """What all parts of a recipe share: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Ranking(Model):
    """What rows are ranked by: one score, or several combined.

    Attributes:
        score: The score's name, such as `neg_clip_loss/b32`.
        rank_sum: Names of scores whose ranks are added; the smallest sums stay. A rank is 1 + the number of rows that
            entered the step with a larger value, so equal values have equal ranks.
        weighted: Names of scores with their weights. Each score is brought to one scale over the rows that entered the
            step, as `normalise` says, then multiplied and added.
        normalise: `rank` (n - rank) / (n - 1), `min_max` (x - min) / (max - min), or `z_score` (x - mean) / standard
            deviation (of the population).
    """

    called: ClassVar[str] = "a ranking"

    score: str | None = Field(default=None, min_length=1)
    rank_sum: tuple[str, ...] | None = None
    weighted: dict[str, float] | None = None
    normalise: Literal["rank", "min_max", "z_score"] | None = None

    @model_validator(mode="after")
    def _one_value(self) -> Self:
        given = self._only_one("score", "rank_sum", "weighted")
        if self.score is None and (len(self.scores) < 2 or len(set(self.scores)) < len(self.scores)):
            raise ValueError(f"{given} combines two or more different scores")
        if self.weighted is not None and not all(weight and isfinite(weight) for weight in self.weighted.values()):
            raise ValueError("weighted: a weight is a finite number other than 0")
        if (self.weighted is None) != (self.normalise is None):
            raise ValueError("weighted and normalise (rank, min_max or z_score) are given together or not at all")
        return self

    def _only_one(self, *names: str) -> str:
        """Name the one of some fields that is given.

        Raises:
            ValueError: none of them is, or several are.
        """
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"{self.called} needs exactly one of {', '.join(names)}; found {found}")
        return given[0]

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that are ranked by."""
        if self.score is not None:
            return (self.score,)
        return self.rank_sum if self.rank_sum is not None else tuple(self.weighted or ())

    @property
    def label(self) -> str:
        """What is ranked by, in words."""
        if self.score is not None:
            return self.score
        if self.weighted is None:
            return f"rank_sum of {' and '.join(self.scores)}"
        return f"{' + '.join(f'{weight!r} {name}' for name, weight in self.weighted.items())} ({self.normalise})"


class KeepTop(Ranking):
    """Keep the rows with the largest values; exactly one of the limits is given.

    Attributes:
        fraction: Share of the rows that the recipe began with, or, after a `within`, of the rows within; above 0 and
            at most 1.
        count: Number of rows.
        threshold: Smallest value that is kept.
        rule: What a fraction f of N rows keeps: `exact` floor(N·f) rows, ties broken by uid; `datacomp` every row that
            is at least the value at place int(N·f), counted from 0, of the values sorted downwards, as DataComp's
            baselines do: one row more, and all that are equal to it.
    """

    called: ClassVar[str] = "keep_top"

    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    threshold: float | None = Field(default=None, allow_inf_nan=False, strict=True)
    rule: Literal["exact", "datacomp"] = "exact"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        self._only_one("fraction", "count", "threshold")
        if self.rule == "datacomp" and self.fraction is None:
            raise ValueError("rule datacomp says what a fraction keeps; give fraction")
        if self.rank_sum is not None and self.threshold is not None:
            raise ValueError("a sum of ranks has no threshold that means anything; give fraction or count")
        return self

    def wanted(self, basis: int) -> int | None:
        """Tell how many rows the step may keep.

        Args:
            basis: Number of rows that a fraction counts from.

        Returns:
            floor(basis · fraction), or the count; None for a threshold. For the rule `datacomp`, how many there
            are if no others are equal to the last; it multiplies in binary, as its code does.
        """
        if self.fraction is not None and self.rule == "datacomp":
            return int(basis * self.fraction) + 1
        if self.fraction is not None:
            return part_of(basis, self.fraction)
        return self.count

    def said(self, basis: str) -> str:
        """Say the step in one line."""
        if self.fraction is not None and self.rule == "datacomp":
            return f"keep {self.label} >= its value behind the top {self.fraction!r} of {basis}"
        if self.fraction is not None:
            return f"keep the top {self.fraction!r} of {basis} by {self.label}"
        if self.count is not None:
            return f"keep the top {self.count} by {self.label}"
        return f"keep {self.label} >= {self.threshold!r}"


class _Limited(Ranking):
    """A ranking with a share of the rows, or their number; exactly one of both is given."""

    fraction: float | None = None
    count: int | None = Field(default=None, gt=0, strict=True)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        self._only_one("fraction", "count")
        return self

    def wanted(self, basis: int) -> int:
        """Tell how many of `basis` rows are asked for: floor(basis · fraction), or the count."""
        if self.fraction is not None:
            return part_of(basis, self.fraction)
        assert self.count is not None
        return self.count


class Stratify(_Limited):
    """Keep the rows with the largest values of each stratum, the rows that are equal in a column.

    Attributes:
        by: A column of the pool or a score. Rows without a value are a stratum of their own.
        fraction: Share of the stratum's rows among those that the recipe began with, or, after a `within`, of those
            within: floor(N·f) rows.
        count: Number of rows of each stratum.
    """

    called: ClassVar[str] = "stratify"

    by: str = Field(min_length=1)
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)

    def said(self, basis: str) -> str:
        """Say the step in one line."""
        limit = self.count if self.fraction is None else repr(self.fraction)
        counted = f", counted from {basis}" if self.fraction is not None and basis != BASIS else ""
        return f"keep the top {limit} of each {self.by} by {self.label}{counted}"


class Deduplicate(Model):
    """Keep one of the rows that are alike.

    Attributes:
        by: What is alike: `image` (equal sha256 of its bytes), any other column of the pool or score whose values are
            equal, `uid`, or, with `above`, a score that tells a row's likeness to the most similar better row.
        best: The score by which the best of equals stays; the smaller uid wins a tie, and where there is no score.
        above: A row whose `by` is larger is dropped.
    """

    by: str = Field(min_length=1)
    best: str | None = Field(default=None, min_length=1)
    above: float | None = Field(default=None, allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.above is not None and self.best is not None:
            raise ValueError(f"best: which of two rows is the better one, {self.by} has decided. Remedy: leave it out")
        if self.above is not None and self.column == DIGEST:
            raise ValueError(f"above: {self.by} is no number. Remedy: leave it out, or by: near_duplicate/<encoder>")
        if self.above is None and self.by.startswith(LIKENESS):
            raise ValueError(f"{self.by} tells how alike rows are. Remedy: above, the largest value that stays")
        if self.by == UID and (self.above is not None or self.best is not None):
            raise ValueError("by uid: copies of a uid are one sample. Remedy: leave best and above out")
        return self

    @property
    def column(self) -> str | None:
        """The column that is compared; None for the uid, which no two rows share."""
        return {UID: None, IMAGE: DIGEST}.get(self.by, self.by)

    @property
    def equal(self) -> str | None:
        """The column whose equal values make rows alike, if that is what does."""
        return self.column if self.above is None else None

    def said(self) -> str:
        """Say the step in one line."""
        if self.above is not None:
            return f"drop rows whose {self.by} is above {self.above!r}"
        return f"keep one row of each {self.by}" + (f", the best by {self.best}" if self.best is not None else "")


class SoftCapSample(_Limited):
    """Draw samples by their score, each time it is drawn the less likely (soft cap sampling, arXiv 2503.08805).

    In each round a batch is drawn without replacement with probabilities softmax((value - penalty · times drawn) /
    temperature). So a sample may be drawn in several rounds, and the subset's `.npy` has it as often.

    Attributes:
        fraction: Number of draws as a share of the rows that the recipe began with, or, after a `within`, of the rows
            within; it may be above 1.
        count: Number of draws.
        batch: Draws of a round; the last round has what is left.
        penalty: What each draw takes from a sample's value.
        temperature: Of the softmax.
        seed: Of the draws.
    """

    called: ClassVar[str] = "soft_cap_sample"

    fraction: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    batch: int = Field(default=100_000, gt=0, strict=True)
    penalty: float = Field(default=0.15, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)

    @model_validator(mode="after")
    def _has_a_softmax(self) -> Self:
        if self.rank_sum is not None:
            raise ValueError("rank_sum: ranks have no softmax that means anything; give score or weighted")
        return self

    def said(self, basis: str) -> str:
        """Say the step in one line."""
        draws = f"{self.count}" if self.fraction is None else f"{self.fraction!r} of {basis}"
        fields = type(self).model_fields
        others = {name: getattr(self, name) for name in ("batch", "temperature", "seed")}
        said = [f"{name} {value!r}" for name, value in others.items() if value != fields[name].default]
        return ", ".join([f"draw {draws} by {self.label}", f"{self.penalty!r} less likely each time", *said])


class Step(Model):
    """One step of exactly one kind.

    Attributes:
        where: A DuckDB predicate: the rows for which it is true stay.
        keep_top: The rows with the largest values stay.
        within: The rows of that set stay, and later fractions count from them, as if the recipe had begun there.
        union: Rows of the pool that are in that set come (back) in, whatever dropped them.
        intersect: The rows of that set stay.
        except_: `except` in YAML: the rows of that set are dropped.
        stratify: The rows with the largest values of each stratum stay.
        deduplicate: One of the rows that are alike stays.
        soft_cap_sample: Rows are drawn, some of them several times; only the last step may be of this kind.
        report: Columns that are summed up over the rows that entered, that stayed, and that were dropped.

    A set is the name of another recipe, or the path of a uid list.
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
        """The other recipe or uid list that the step names, if it is of such a kind."""
        return next(
            (name for name in (self.within, self.union, self.intersect, self.except_) if name is not None), None
        )

    @property
    def text(self) -> str:
        """The step in one line, as a person would say it."""
        return self.said(BASIS)

    def said(self, basis: str) -> str:
        """Say the step in one line, with what a fraction counts from."""
        if self.set_name is not None:
            return _SAID[self.kind].format(self.set_name)
        if self.deduplicate is not None:
            return self.deduplicate.said()
        ranked = self.keep_top or self.stratify or self.soft_cap_sample
        return ranked.said(basis) if ranked is not None else f"where {self.where}"

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that the step ranks by."""
        ranked = self.keep_top or self.stratify or self.soft_cap_sample
        return ranked.scores if ranked is not None else ()

    @property
    def numbers(self) -> frozenset[str]:
        """Name the columns that the step reads as numbers."""
        like = self.deduplicate
        compared = () if like is None else (like.best, like.by if like.above is not None else None)
        return frozenset(name for name in (*self.scores, *compared) if name is not None)

    def columns(self) -> frozenset[str]:
        """Name every column that the step reads."""
        names = {*self.report, *self.scores}
        if self.stratify is not None:
            names.add(self.stratify.by)
        if self.deduplicate is not None:
            names.update(name for name in (self.deduplicate.column, self.deduplicate.best) if name is not None)
        return frozenset(names) | (predicate_columns(self.where) if self.where is not None else frozenset())


_SAID = {
    "within": "within {}",
    "union": "add the rows of {}",
    "intersect": "keep the rows of {}",
    "except": "drop the rows of {}",
}
_FIELDS = tuple(name for name in Step.model_fields if name != "report")
KINDS = tuple(name.rstrip("_") for name in _FIELDS)


def part_of(rows: int, fraction: float) -> int:
    """Give floor(rows · fraction), the fraction taken as the number that was written.

    0.29 is 29/100 and not the nearest binary fraction, so 0.29 of 100 rows are 29.
    """
    return int(rows * Fraction(repr(fraction)))
