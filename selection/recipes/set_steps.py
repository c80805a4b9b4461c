"""Steps that judge the selected set and not single rows: their models, the columns and the tables that they read.

Also what their execution returns, which is in `selection.recipes.matching` and `balancing`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from selection.recipes.model import BASIS, Model, part_of

FEATURES = "sparse_features/"
AUTOENCODER = "sparse_autoencoder/"
NEAREST = "nearest_target/"
CAPTION = "caption"


@dataclass(frozen=True)
class SelectedSet:
    """The result of a step.

    Attributes:
        relation: A view of the source with two more columns, as an SQL identifier.
        predicate: SQL over one row of it: whether the row stays.
        value: SQL over one row: what the step ranked it by.
        kept: Number of rows that stay.
        rows: Query of rows (f0, f1) and why they stayed.
        concepts: Query of the concepts, with their counts before and after.
        note: A remark for the reader.
    """

    relation: str
    predicate: str
    value: str
    kept: int
    rows: str
    concepts: str
    note: str | None


class MatchDistribution(Model):
    """Keep the set whose concepts are distributed as a target's (SDM, openreview cgmo3v18sx).

    Attributes:
        features: One or more `sparse_features/<encoder>`. With several, each encoder has an equal share of the target's
            distribution.
        target: The target set whose distribution is matched.
        quality: The score that is cut into thirds, low, middle and high, over the rows that entered; not read with
            `lambda` 1.
        trade_off: `lambda` in YAML: from 0 (quality alone) to 1 (concepts alone).
        fraction: Share of the rows before the first step, or, after a `within`, of the rows it kept.
        count: Number of rows.
        seed: Seed of the candidates.
        epsilon: Chance to miss the best row of a step: each step compares ceil(n / count · ln(1 / epsilon)) candidates.
    """

    yaml_name: ClassVar[str] = "match_distribution"

    features: tuple[str, ...] = Field(min_length=1)
    target: str = Field(min_length=1)
    quality: str | None = Field(default=None, min_length=1)
    trade_off: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False, alias="lambda")
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    epsilon: float = Field(default=0.1, gt=0, lt=1, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_encoder(cls, given: object) -> object:
        if isinstance(given, dict) and isinstance(given.get("features"), str):
            return {**given, "features": (given["features"],)}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._only_one("fraction", "count")
        if len(set(self.features)) < len(self.features):
            raise ValueError("features: an encoder is listed twice. Remedy: list each once")
        for name in self.features:
            if not name.startswith(FEATURES) or "/" in name.removeprefix(FEATURES):
                raise ValueError(f"features: {name} is not of the form {FEATURES}<encoder>. Remedy: correct the name")
        if self.quality is None and self.trade_off < 1:
            raise ValueError("quality: a score is needed. Remedy: set quality, or lambda: 1 to match concepts alone")
        return self

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders of the features."""
        return tuple(name.removeprefix(FEATURES) for name in self.features)

    @property
    def scores(self) -> tuple[str, ...]:
        """The score of quality, if one is read."""
        return () if self.quality is None or self.trade_off == 1 else (self.quality,)

    @property
    def label(self) -> str:
        """Description of the ranked value."""
        return f"gain in the match of {self.target}"

    @property
    def tables(self) -> tuple[str, ...]:
        """The assets with the target's distribution, one an encoder."""
        return tuple(target_concepts(encoder, self.target) for encoder in self.encoders)

    def columns(self) -> frozenset[str]:
        """Return the scores that the step reads."""
        read = [name for encoder in self.encoders for name in feature_columns(encoder)]
        return frozenset([*read, *self.scores])

    def wanted(self, basis: int) -> int:
        """Return the number of rows asked for: floor(basis · fraction), or the count."""
        return part_of(basis, self.fraction) if self.fraction is not None else int(self.count or 0)

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        limit = self.count if self.fraction is None else repr(self.fraction)
        counted = f", counted from {basis}" if self.fraction is not None and basis != BASIS else ""
        quality = f" with {1 - self.trade_off:g} of quality by {self.scores[0]}" if self.scores else ""
        changed = [
            f"{name} {getattr(self, name)!r}"
            for name in ("seed", "epsilon")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        what = f"match the concepts of {self.target} by {' and '.join(self.features)}{quality}"
        return ", ".join([f"keep {limit}{counted} to {what}", *changed])


class Balance(Model):
    """Cut common concepts to a cap; rare ones stay.

    Attributes:
        concepts: `caption` (the words of the caption), `nearest_target/<encoder>/<target>` (the class of the nearest
            target image), `sparse_features/<encoder>`, or any column: its value is one concept, a list several.
        words: The words of the caption that count; by default all.
        cap: Rows of a concept from which on it is cut.
        form: `sample`: a row stays with the chance 1 − Π (1 − cap / max(cap, rows of the concept)), by a keyed hash
            (MetaCLIP). `greedy`: rows with concepts below the cap are taken one after the other (CABS-DM).
        fraction: For `greedy`, the share of the rows before the first step, or, after a `within`, of the rows it kept.
        count: For `greedy`, the number of rows.
        seed: Seed of the hash.
    """

    yaml_name: ClassVar[str] = "balance"

    concepts: str = Field(min_length=1)
    words: tuple[str, ...] | None = Field(default=None, min_length=1)
    cap: int = Field(ge=1, strict=True)
    form: Literal["sample", "greedy"] = "sample"
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.form == "greedy":
            self._only_one("fraction", "count")
        elif self.fraction is not None or self.count is not None:
            raise ValueError("fraction and count belong to form: greedy. Remedy: leave them out, or set the form")
        if self.words is not None and self.concepts != CAPTION:
            raise ValueError(f"words are those of captions. Remedy: concepts: {CAPTION}, or leave words out")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """No score is ranked by."""
        return ()

    @property
    def label(self) -> str:
        """Description of the value."""
        return f"{'chance to stay' if self.form == 'sample' else 'gain'} by {self.concepts}"

    @property
    def tables(self) -> tuple[str, ...]:
        """The asset with the names of the concepts, if there is one."""
        if self.concepts.startswith(NEAREST):
            return ("target_embeddings/" + self.concepts.removeprefix(NEAREST),)
        return (AUTOENCODER + self.concepts.removeprefix(FEATURES),) if self.concepts.startswith(FEATURES) else ()

    def columns(self) -> frozenset[str]:
        """Return the columns that the step reads."""
        if self.concepts.startswith(FEATURES):
            return frozenset(feature_columns(self.concepts.removeprefix(FEATURES)))
        return frozenset([self.concepts])

    def wanted(self, basis: int) -> int | None:
        """Return the number of rows to take greedily: floor(basis · fraction), or the count; None for `sample`."""
        return part_of(basis, self.fraction) if self.fraction is not None else self.count

    def describe(self, basis: str) -> str:
        """Return the step in one line; `basis` describes the rows that a fraction refers to."""
        what = f"balance {self.concepts}" + (f" ({len(self.words)} words)" if self.words is not None else "")
        limit = f", at most {self.count if self.fraction is None else repr(self.fraction)}"
        counted = f", counted from {basis}" if self.fraction is not None and basis != BASIS else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{what} at {self.cap}{f'{limit} greedily{counted}' if self.form == 'greedy' else seed}"


def feature_columns(encoder: str) -> tuple[str, str]:
    """Return the names of the scores that hold an encoder's sparse features: the concepts, and their values."""
    return f"concepts/{encoder}", f"concept_values/{encoder}"


def target_concepts(encoder: str, target: str) -> str:
    """Return the key of the asset with a target's distribution over an encoder's concepts."""
    return f"target_concepts/{encoder}/{target}"
