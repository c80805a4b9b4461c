"""Recipes: the model of what a user writes, and the checks that need no data.

Here belongs what a recipe may say and which columns it needs. Running one is `selection.selecting`.
"""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from functools import cache
from math import isfinite
from typing import Any, Literal, NamedTuple, Self

import duckdb
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

POOL = "pool"
UID_LIST_ENDINGS = (".npy", ".txt")
UID_LIST_ASSETS = "external_uids/"


class Columns(NamedTuple):
    """The columns that a recipe reads, sorted: those of the pool, and scores by their recipe name."""

    pool: tuple[str, ...]
    scores: tuple[str, ...]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeepTop(_Model):
    """Keep the rows with the largest values of one score, or of several combined; exactly one of the limits is given.

    Attributes:
        score: The score's name, such as `neg_clip_loss/b32`.
        rank_sum: Names of scores whose ranks are added; the smallest sums stay. A rank is 1 + the number of rows that
            entered the step with a larger value, so equal values have equal ranks.
        weighted: Names of scores with their weights. Each score is brought to one scale over the rows that entered the
            step, as `normalise` says, then multiplied and added.
        normalise: `rank` (n - rank) / (n - 1), `min_max` (x - min) / (max - min), or `z_score` (x - mean) / standard
            deviation (of the population).
        fraction: Share of the rows that the recipe began with, or, after a `within`, of the rows within; above 0 and
            at most 1.
        count: Number of rows.
        threshold: Smallest value that is kept.
        rule: What a fraction f of N rows keeps: `exact` floor(N·f) rows, ties broken by uid; `datacomp` every row that
            is at least the value at place int(N·f), counted from 0, of the values sorted downwards, as DataComp's
            baselines do: one row more, and all that are equal to it.
    """

    score: str | None = Field(default=None, min_length=1)
    rank_sum: tuple[str, ...] | None = None
    weighted: dict[str, float] | None = None
    normalise: Literal["rank", "min_max", "z_score"] | None = None
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    threshold: float | None = Field(default=None, allow_inf_nan=False, strict=True)
    rule: Literal["exact", "datacomp"] = "exact"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [n for n in ("fraction", "count", "threshold") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"keep_top needs exactly one of fraction, count, threshold; found {found}")
        if self.rule == "datacomp" and self.fraction is None:
            raise ValueError("rule datacomp says what a fraction keeps; give fraction")
        return self

    @model_validator(mode="after")
    def _one_value(self) -> Self:
        given = [n for n in ("score", "rank_sum", "weighted") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"keep_top needs exactly one of score, rank_sum, weighted; found {found}")
        if self.score is None and (len(self.scores) < 2 or len(set(self.scores)) < len(self.scores)):
            raise ValueError(f"{given[0]} combines two or more different scores")
        if self.weighted is not None and not all(weight and isfinite(weight) for weight in self.weighted.values()):
            raise ValueError("weighted: a weight is a finite number other than 0")
        if (self.weighted is None) != (self.normalise is None):
            raise ValueError("weighted and normalise (rank, min_max or z_score) are given together or not at all")
        if self.rank_sum is not None and self.threshold is not None:
            raise ValueError("a sum of ranks has no threshold that means anything; give fraction or count")
        return self

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

    def wanted(self, pool_rows: int) -> int | None:
        """Tell how many rows the step may keep.

        The fraction is taken as the number that was written (0.29 is 29/100, not the nearest
        binary fraction), so floor(100 * 0.29) is 29. The rule `datacomp` multiplies in binary, as its code does.

        Args:
            pool_rows: Number of rows that the recipe began with.

        Returns:
            floor(pool_rows * fraction), or the count; None for a threshold. For the rule `datacomp`, how many there
            are if no others are equal to the last.
        """
        if self.fraction is not None and self.rule == "datacomp":
            return int(pool_rows * self.fraction) + 1
        if self.fraction is not None:
            return int(pool_rows * Fraction(repr(self.fraction)))
        return self.count


class Step(_Model):
    """One step of exactly one kind.

    Attributes:
        where: A DuckDB predicate: the rows for which it is true stay.
        keep_top: The rows with the largest values stay.
        within: The rows of that set stay, and later fractions count from them, as if the recipe had begun there.
        union: Rows of the pool that are in that set come (back) in, whatever dropped them.
        intersect: The rows of that set stay.
        except_: `except` in YAML: the rows of that set are dropped.

    A set is the name of another recipe, or the path of a uid list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    where: str | None = None
    keep_top: KeepTop | None = None
    within: str | None = None
    union: str | None = None
    intersect: str | None = None
    except_: str | None = Field(default=None, alias="except")

    @field_validator("where")
    @classmethod
    def _readable(cls, where: str | None) -> str | None:
        if where is not None:
            predicate_columns(where)
        return where

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is exactly one of {', '.join(KINDS)}; found {' and '.join(given) or 'none'}")
        if self.set_name in ("", POOL):
            raise ValueError(f"{self.kind}: name another recipe, or a uid list")
        return self

    @property
    def kind(self) -> str:
        """The step's name in YAML."""
        return next(name.rstrip("_") for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def set_name(self) -> str | None:
        """The other recipe or uid list that the step names, if it is of such a kind."""
        return next(
            (name for name in (self.within, self.union, self.intersect, self.except_) if name is not None), None
        )

    @property
    def text(self) -> str:
        """The step in one line, as a person would say it."""
        return self.said("the pool")

    def said(self, basis: str) -> str:
        """Say the step in one line, with what a fraction counts from."""
        if self.set_name is not None:
            return _SAID[self.kind].format(self.set_name)
        if self.keep_top is None:
            return f"where {self.where}"
        top = self.keep_top
        if top.fraction is not None and top.rule == "datacomp":
            return f"keep {top.label} >= its value behind the top {top.fraction!r} of {basis}"
        if top.fraction is not None:
            return f"keep the top {top.fraction!r} of {basis} by {top.label}"
        if top.count is not None:
            return f"keep the top {top.count} by {top.label}"
        return f"keep {top.label} >= {top.threshold!r}"

    def columns(self) -> frozenset[str]:
        """Name every column that the step reads."""
        if self.keep_top is not None:
            return frozenset(self.keep_top.scores)
        return predicate_columns(self.where) if self.where is not None else frozenset()


_SAID = {
    "within": "within {}",
    "union": "add the rows of {}",
    "intersect": "keep the rows of {}",
    "except": "drop the rows of {}",
}
KINDS = ("where", "keep_top", *_SAID)


def set_kind(name: str) -> str:
    """Tell what a recipe's `from`, or a step's set, is: `pool`, `uids` (a uid list) or `recipe`."""
    if name == POOL:
        return "pool"
    return "uids" if name.endswith(UID_LIST_ENDINGS) or is_uid_list_asset(name) else "recipe"


def is_uid_list_asset(name: str) -> bool:
    """Tell whether a uid list is named by its asset, `external_uids/<name>`, and not by its path."""
    return name.startswith(UID_LIST_ASSETS) and not name.endswith(UID_LIST_ENDINGS)


class Recipe(_Model):
    """How a subset is chosen.

    Attributes:
        source: `from` in YAML: `pool`, the name of another recipe, or the path of a uid list that
            ends in .npy (DataComp's array) or .txt (one uid a line).
        steps: What is done, in order.
        description: For the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str = Field(default=POOL, alias="from", min_length=1)
    steps: tuple[Step, ...]
    description: str = ""

    @property
    def source_kind(self) -> str:
        """`pool`, `uids` (a uid list) or `recipe`."""
        return set_kind(self.source)

    @property
    def sets(self) -> tuple[str, ...]:
        """Name every recipe and uid list that the recipe reads, `from` first, each once."""
        named = [self.source, *(step.set_name for step in self.steps)]
        return tuple(dict.fromkeys(name for name in named if name is not None and name != POOL))

    @property
    def recipes(self) -> tuple[str, ...]:
        """Name the recipes that this one rests on."""
        return tuple(name for name in self.sets if set_kind(name) == "recipe")

    def columns(self) -> Columns:
        """Name the columns that the recipe reads; a score is a name with a slash in it."""
        names = sorted(set().union(*(step.columns() for step in self.steps)))
        return Columns(
            pool=tuple(name for name in names if "/" not in name),
            scores=tuple(name for name in names if "/" in name),
        )

    def definition(self) -> dict[str, Any]:
        """Give the recipe as the YAML says it, in JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"from": self.source}


@cache
def predicate_columns(predicate: str) -> frozenset[str]:
    """Find the columns that a predicate reads, by DuckDB's own parser.

    Args:
        predicate: A DuckDB expression over one row, such as `least(width, height) >= 200`.

    Returns:
        The names, as written.

    Raises:
        ValueError: The text is not one such expression, or what it says of a row depends on more than
            that row: a subquery, an aggregate, a window, a parameter, `*`, the clock or chance.
    """
    # The brackets keep "a GROUP BY b" out, the bare form keeps "a) OR (b" out.
    tree = _parse(predicate, f"SELECT 1 WHERE (\n{predicate}\n)")
    _parse(predicate, f"SELECT 1 WHERE {predicate}")
    return frozenset(_walk(predicate, tree, frozenset()))


def check_recipes(
    recipes: Mapping[str, Recipe],
    *,
    scores: Collection[str],
    pool_columns: Collection[str],
    uid_lists: Collection[str] = (),
) -> None:
    """Check what one recipe alone can't know: other recipes, scores and columns of the pool.

    Args:
        recipes: The recipes by name.
        scores: Names of the scores that the project has.
        pool_columns: Names of the columns that the pool has.
        uid_lists: Names of the uid lists that are assets, such as `external_uids/dfn`.

    Raises:
        ValueError: One message with a line for each unknown recipe, uid list, score or column, for each circle
            of recipes that rest on one another, and for each name that stands for something else.
    """
    problems = []
    for name, recipe in recipes.items():
        if name == POOL or name.endswith(UID_LIST_ENDINGS):
            problems.append(f"recipe {name}: another recipe's from could not name it; call it otherwise")
        problems += _unknown_set(f"recipe {name}, from", recipe.source, [POOL, *recipes], uid_lists)
        for number, step in enumerate(recipe.steps, start=1):
            if step.set_name is not None:
                where = f"recipe {name}, step {number} ({step.text})"
                problems += _unknown_set(where, step.set_name, recipes, uid_lists)
            unknown = step.columns() - set(scores) - set(pool_columns)
            for column in sorted(unknown):
                known = [*scores, *pool_columns]
                what = "score" if step.keep_top or "/" in column else "column"
                problems.append(f"recipe {name}, step {number} ({step.text}): {_unknown(what, column, known)}")
    for circle in _circles(recipes):
        problems.append(f"recipes rest on one another: {' on '.join(circle)}")
    if problems:
        raise ValueError("\n".join(problems))


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    by_fold = {candidate.casefold(): candidate for candidate in known}
    close = [by_fold[c] for c in difflib.get_close_matches(name.casefold(), by_fold, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return f"there is no {what} {name!r}; {hint}"


def _unknown_set(where: str, name: str, recipes: Collection[str], uid_lists: Collection[str]) -> list[str]:
    if is_uid_list_asset(name):
        return [] if name in uid_lists else [f"{where}: {_unknown('uid list', name, uid_lists)}"]
    if set_kind(name) != "recipe" or name in recipes:
        return []
    ends = f"the path of a uid list ends in {' or '.join(UID_LIST_ENDINGS)}"
    return [f"{where}: {_unknown('recipe', name, recipes)}; {ends}"]


def _circles(recipes: Mapping[str, Recipe]) -> list[tuple[str, ...]]:
    """Find each circle once, from its first name in the alphabet back to that name."""
    circles = set()

    def follow(chain: tuple[str, ...]) -> None:
        for name in recipes[chain[-1]].recipes:
            if name == chain[0]:
                circles.add((*chain, name))
            elif name in recipes and name > chain[0] and name not in chain:
                follow((*chain, name))

    for start in recipes:
        follow((start,))
    return sorted(circles)


_REFUSED = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a column by its number",
    "STAR": "*",
    "DEFAULT": "DEFAULT",
}


def _parse(predicate: str, sql: str) -> dict[str, Any]:
    with duckdb.connect() as con:
        ((text,),) = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    parsed = json.loads(text)
    if parsed["error"]:
        raise ValueError(f"where: {predicate!r} is no DuckDB predicate: {parsed['error_message']}")
    if len(parsed["statements"]) != 1:
        raise ValueError(f"where: {predicate!r} is more than one statement")
    return parsed["statements"][0]["node"]["where_clause"]


def _walk(predicate: str, node: Any, bound: frozenset[str]) -> Iterator[str]:
    """Yield the columns under a node of DuckDB's tree; `bound` are a lambda's own names."""
    if isinstance(node, list):
        for child in node:
            yield from _walk(predicate, child, bound)
        return
    if not isinstance(node, dict):
        return
    kind = node.get("class")
    if kind in _REFUSED:
        raise _refused(predicate, _REFUSED[kind])
    if kind == "COLUMN_REF":
        path = node["column_names"]
        if path[0] in bound:
            return
        if len(path) > 1:
            raise _refused(predicate, f'{".".join(path)}: write a score as "{"/".join(path)}"')
        yield path[0]
        return
    if kind == "LAMBDA":
        if node["syntax_type"] != "LAMBDA_KEYWORD":
            raise _refused(predicate, "->: write json_extract(a, b), or lambda x: ...")
        bound |= set(_walk(predicate, node["lhs"], frozenset()))
        node = node["expr"]
    if kind == "FUNCTION":
        path = node["qualified_name"]["path"]
        if len(path) > 1:
            raise _refused(predicate, f"{'.'.join(path)}(): write {path[-1]}({path[0]})")
        if node["function_name"].casefold() not in _row_functions():
            what = "which is unknown, an aggregate, or depends on the clock or on chance"
            raise _refused(predicate, f"the function {node['function_name']}, {what}")
    for child in node.values() if kind != "LAMBDA" else [node]:
        yield from _walk(predicate, child, bound)


@cache
def _row_functions() -> frozenset[str]:
    """Name DuckDB's functions whose value depends on their arguments alone."""
    with duckdb.connect() as con:
        rows = con.execute(
            """
            SELECT lower(function_name) FROM duckdb_functions() GROUP BY ALL
            HAVING bool_and(
                (function_type = 'scalar' AND stability = 'CONSISTENT')
                OR (function_type = 'macro'
                    AND NOT regexp_matches(macro_definition, '(?i)current_|select')))
            """
        ).fetchall()
    return frozenset(name for (name,) in rows)


def _refused(predicate: str, what: str) -> ValueError:
    return ValueError(
        f"where: {predicate!r} uses {what}. A predicate may use a row's own columns and functions of them."
    )
