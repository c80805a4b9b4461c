"""Recipes: the model of what a user writes, and the checks that need no data.

Here belongs what a recipe is and what it may name. Its steps are in `selection.recipes.steps`; running one is
`selection.recipes.execute`.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from selection.recipes.steps import POOL, Model, Step

UID_LIST_ENDINGS = (".npy", ".txt")
UID_LIST_ASSETS = "external_uids/"


class Columns(NamedTuple):
    """The columns that a recipe reads, sorted: those of the pool, and scores by their recipe name."""

    pool: tuple[str, ...]
    scores: tuple[str, ...]


def set_kind(name: str) -> str:
    """Tell what a recipe's `from`, or a step's set, is: `pool`, `uids` (a uid list) or `recipe`."""
    if name == POOL:
        return "pool"
    return "uids" if name.endswith(UID_LIST_ENDINGS) or is_uid_list_asset(name) else "recipe"


def is_uid_list_asset(name: str) -> bool:
    """Tell whether a uid list is named by its asset, `external_uids/<name>`, and not by its path."""
    return name.startswith(UID_LIST_ASSETS) and not name.endswith(UID_LIST_ENDINGS)


class Recipe(Model):
    """How a subset is chosen.

    Attributes:
        source: `from` in YAML: `pool`, the name of another recipe, or the path of a uid list that
            ends in .npy (DataComp's array) or .txt (one uid a line).
        steps: What is done, in order.
        description: For the reader.
    """

    source: str = Field(default=POOL, alias="from", min_length=1)
    steps: tuple[Step, ...]
    description: str = ""

    @model_validator(mode="after")
    def _draws_at_last(self) -> Self:
        for number, step in enumerate(self.steps[:-1], start=1):
            if step.soft_cap_sample is not None:
                raise ValueError(
                    f"step {number} draws samples, some of them several times, which no later step could know of. "
                    "Remedy: soft_cap_sample as the last step"
                )
        return self

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


def check_recipes(
    recipes: Mapping[str, Recipe],
    *,
    scores: Collection[str],
    pool_columns: Collection[str],
    uid_lists: Collection[str] = (),
    texts: Collection[str] = (),
) -> None:
    """Check what one recipe alone can't know: other recipes, scores and columns of the pool.

    Args:
        recipes: The recipes by name.
        scores: Names of the scores that the project has.
        pool_columns: Names of the columns that the pool has.
        uid_lists: Names of the uid lists that are assets, such as `external_uids/dfn`.
        texts: Those of the scores and columns whose values are no numbers.

    Raises:
        ValueError: One message with a line for each unknown recipe, uid list, score or column, for each text that is
            ranked, for each circle of recipes that rest on one another, and for each name that stands for something
            else.
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
            for column in sorted(step.numbers.intersection(texts)):
                where = f"recipe {name}, step {number} ({step.text})"
                problems.append(f"{where}: {column} holds texts, which have no rank. Remedy: a score of numbers")
            unknown = step.columns() - set(scores) - set(pool_columns)
            for column in sorted(unknown):
                known = [*scores, *pool_columns]
                what = "score" if column in step.scores or "/" in column else "column"
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
