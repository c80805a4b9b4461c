"""Recipes: the model of what a user writes, and the checks that need no data.

Here belongs what a recipe may say and which columns it needs. Running one is `selection.selecting`.
"""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple, Self

import duckdb
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

POOL = "pool"
UID_LIST_ENDINGS = (".npy", ".txt")


class Columns(NamedTuple):
    """The columns that a recipe reads, sorted: those of the pool, and scores by their recipe name."""

    pool: tuple[str, ...]
    scores: tuple[str, ...]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeepTop(_Model):
    """Keep the rows with the largest values of a score; exactly one of the limits is given.

    Attributes:
        score: The score's name, such as `neg_clip_loss/b32`.
        fraction: Share of the rows that the recipe began with, above 0 and at most 1.
        count: Number of rows.
        threshold: Smallest value that is kept.
    """

    score: str = Field(min_length=1)
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    count: int | None = Field(default=None, gt=0, strict=True)
    threshold: float | None = Field(default=None, allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [n for n in ("fraction", "count", "threshold") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"keep_top needs exactly one of fraction, count, threshold; found {found}")
        return self

    def wanted(self, pool_rows: int) -> int | None:
        """Tell how many rows the step may keep.

        The fraction is taken as the number that was written (0.29 is 29/100, not the nearest
        binary fraction), so floor(100 * 0.29) is 29.

        Args:
            pool_rows: Number of rows that the recipe began with.

        Returns:
            floor(pool_rows * fraction), or the count; None for a threshold.
        """
        if self.fraction is not None:
            return int(pool_rows * Fraction(repr(self.fraction)))
        return self.count


class Step(_Model):
    """One step: a `where` (a DuckDB predicate) or a `keep_top`."""

    where: str | None = None
    keep_top: KeepTop | None = None

    @field_validator("where")
    @classmethod
    def _readable(cls, where: str | None) -> str | None:
        if where is not None:
            predicate_columns(where)
        return where

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.where is None) == (self.keep_top is None):
            raise ValueError("a step is exactly one of where, keep_top")
        return self

    @property
    def kind(self) -> str:
        """`where` or `keep_top`."""
        return "where" if self.where is not None else "keep_top"

    @property
    def text(self) -> str:
        """The step in one line, as a person would say it."""
        if self.keep_top is None:
            return f"where {self.where}"
        top = self.keep_top
        if top.fraction is not None:
            return f"keep the top {top.fraction!r} of the pool by {top.score}"
        if top.count is not None:
            return f"keep the top {top.count} by {top.score}"
        return f"keep {top.score} >= {top.threshold!r}"

    def columns(self) -> frozenset[str]:
        """Name every column that the step reads."""
        if self.keep_top is not None:
            return frozenset([self.keep_top.score])
        return predicate_columns(self.where or "")


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
        if self.source == POOL:
            return "pool"
        return "uids" if self.source.endswith(UID_LIST_ENDINGS) else "recipe"

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


def check_recipes(recipes: Mapping[str, Recipe], *, scores: Collection[str], pool_columns: Collection[str]) -> None:
    """Check what one recipe alone can't know: other recipes, scores and columns of the pool.

    Args:
        recipes: The recipes by name.
        scores: Names of the scores that the project has.
        pool_columns: Names of the columns that the pool has.

    Raises:
        ValueError: One message with a line for each unknown recipe, score or column, for each circle
            of recipes that begin with one another, and for each name that stands for something else.
    """
    problems = []
    for name, recipe in recipes.items():
        if name == POOL or name.endswith(UID_LIST_ENDINGS):
            problems.append(f"recipe {name}: another recipe's from could not name it; call it otherwise")
        if recipe.source_kind == "recipe" and recipe.source not in recipes:
            problems.append(
                f"recipe {name}, from: {_unknown('recipe', recipe.source, [POOL, *recipes])}; "
                f"the path of a uid list ends in {' or '.join(UID_LIST_ENDINGS)}"
            )
        for number, step in enumerate(recipe.steps, start=1):
            unknown = step.columns() - set(scores) - set(pool_columns)
            for column in sorted(unknown):
                known = [*scores, *pool_columns]
                what = "score" if step.keep_top or "/" in column else "column"
                problems.append(f"recipe {name}, step {number} ({step.text}): {_unknown(what, column, known)}")
    for circle in _circles(recipes):
        problems.append(f"recipes begin with one another: {' from '.join(circle)}")
    if problems:
        raise ValueError("\n".join(problems))


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    by_fold = {candidate.casefold(): candidate for candidate in known}
    close = [by_fold[c] for c in difflib.get_close_matches(name.casefold(), by_fold, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return f"there is no {what} {name!r}; {hint}"


def _circles(recipes: Mapping[str, Recipe]) -> list[tuple[str, ...]]:
    """Find each circle once, from its first name in the alphabet back to that name."""
    circles = set()
    for start in recipes:
        chain = [start]
        while (following := recipes[chain[-1]].source) in recipes and following not in chain:
            chain.append(following)
        if following == start and start == min(chain):
            circles.add((*chain, start))
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
