"""The recipe that a user writes, and the checks that need no data.

Here: the model of a recipe and the names it may use. Its steps are in `selection.recipes.steps`, their execution in
`selection.recipes.execute`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from core.names import suggestion
from selection.recipes.model import POOL, Model
from selection.recipes.steps import Step

UID_LIST_ENDINGS = (".npy", ".txt")
UID_LIST_ASSETS = "external_uids/"


class Columns(NamedTuple):
    """The columns that a recipe reads, sorted: columns of the pool, and scores by their name in recipes."""

    pool: tuple[str, ...]
    scores: tuple[str, ...]


def set_kind(name: str) -> str:
    """Return the kind of a recipe's `from` or a step's set: `pool`, `uids` (a uid list) or `recipe`."""
    if name == POOL:
        return "pool"
    return "uids" if name.endswith(UID_LIST_ENDINGS) or is_uid_list_asset(name) else "recipe"


def is_uid_list_asset(name: str) -> bool:
    """Check whether a uid list is an asset, `external_uids/<name>`, and not a path."""
    return name.startswith(UID_LIST_ASSETS) and not name.endswith(UID_LIST_ENDINGS)


class Recipe(Model):
    """How a subset is selected.

    Attributes:
        source: `from` in YAML: `pool`, the name of another recipe, or the path of a uid list that
            ends in .npy (DataComp's array) or .txt (one uid a line).
        steps: The steps in order.
        description: A remark for the reader.
    """

    source: str = Field(default=POOL, alias="from", min_length=1)
    steps: tuple[Step, ...]
    description: str = ""

    @model_validator(mode="after")
    def _draws_at_last(self) -> Self:
        for number, step in enumerate(self.steps[:-1], start=1):
            if step.soft_cap_sample is not None:
                raise ValueError(
                    f"step {number} draws rows several times, and no later step can read that. "
                    "Remedy: make soft_cap_sample the last step"
                )
        return self

    @property
    def source_kind(self) -> str:
        """`pool`, `uids` (a uid list) or `recipe`."""
        return set_kind(self.source)

    @property
    def sets(self) -> tuple[str, ...]:
        """Every recipe and uid list that the recipe reads, `from` first, each once."""
        named = [self.source, *(step.set_name for step in self.steps)]
        return tuple(dict.fromkeys(name for name in named if name is not None and name != POOL))

    @property
    def tables(self) -> tuple[str, ...]:
        """The unpartitioned assets that the steps read, each once."""
        return tuple(dict.fromkeys(table for step in self.steps for table in step.tables))

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that this one reads."""
        return tuple(name for name in self.sets if set_kind(name) == "recipe")

    def columns(self) -> Columns:
        """Return the columns that the recipe reads; a name with a slash is a score."""
        names = sorted(set().union(*(step.columns() for step in self.steps)))
        return Columns(
            pool=tuple(name for name in names if "/" not in name),
            scores=tuple(name for name in names if "/" in name),
        )

    def definition(self) -> dict[str, Any]:
        """Return the recipe as in YAML, in JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"from": self.source}


def check_recipes(
    recipes: Mapping[str, Recipe],
    *,
    scores: Collection[str],
    pool_columns: Collection[str],
    uid_lists: Collection[str] = (),
    texts: Collection[str] = (),
    tables: Collection[str] = (),
) -> None:
    """Check the recipes of a project against each other, its scores and the columns of its pool.

    Args:
        recipes: The recipes by name.
        scores: Names of the project's scores.
        pool_columns: Names of the pool's columns.
        uid_lists: Names of the uid lists that are assets, such as `external_uids/dfn`.
        texts: The scores and columns that hold text or lists.
        tables: Keys of the unpartitioned assets that steps may read, such as `target_concepts/b32/imagenet`.

    Raises:
        ValueError: One message with a line for each unknown recipe, uid list, score, column or table, each ranking by
            text, each cycle of recipes, and each recipe whose name `from` would read as something else.
    """
    problems = []
    for name, recipe in recipes.items():
        if name == POOL or name.endswith(UID_LIST_ENDINGS):
            problems.append(f"recipe {name}: from would not read this name as a recipe. Remedy: rename the recipe")
        problems += _unknown_set(f"recipe {name}, from", recipe.source, [POOL, *recipes], uid_lists)
        for number, step in enumerate(recipe.steps, start=1):
            if step.set_name is not None:
                where = f"recipe {name}, step {number} ({step.text})"
                problems += _unknown_set(where, step.set_name, recipes, uid_lists)
            for column in sorted(step.numbers.intersection(texts)):
                where = f"recipe {name}, step {number} ({step.text})"
                problems.append(
                    f"{where}: {column} holds text or lists, which have no rank. Remedy: use a numeric score"
                )
            for table in step.tables:
                if table not in tables:
                    where = f"recipe {name}, step {number} ({step.text})"
                    asset = table.partition("/")[0]
                    problems.append(f"{where}: {_unknown(asset, table, tables)}")
            unknown = step.columns() - set(scores) - set(pool_columns)
            for column in sorted(unknown):
                known = [*scores, *pool_columns]
                what = "score" if column in step.scores or "/" in column else "column"
                problems.append(f"recipe {name}, step {number} ({step.text}): {_unknown(what, column, known)}")
    for cycle in _cycles(recipes):
        problems.append(f"recipes depend on each other: {' on '.join(cycle)}")
    if problems:
        raise ValueError("\n".join(problems))


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    return f"there is no {what} {name!r}; {suggestion(name, known)}"


def _unknown_set(where: str, name: str, recipes: Collection[str], uid_lists: Collection[str]) -> list[str]:
    if is_uid_list_asset(name):
        return [] if name in uid_lists else [f"{where}: {_unknown('uid list', name, uid_lists)}"]
    if set_kind(name) != "recipe" or name in recipes:
        return []
    ends = f"the path of a uid list ends in {' or '.join(UID_LIST_ENDINGS)}"
    return [f"{where}: {_unknown('recipe', name, recipes)}; {ends}"]


def _cycles(recipes: Mapping[str, Recipe]) -> list[tuple[str, ...]]:
    """Return each cycle once, from its first name in the alphabet back to that name."""
    cycles = set()

    def follow(chain: tuple[str, ...]) -> None:
        for name in recipes[chain[-1]].recipes:
            if name == chain[0]:
                cycles.add((*chain, name))
            # A cycle is followed from its first name only, so that it is found once.
            elif name in recipes and name > chain[0] and name not in chain:
                follow((*chain, name))

    for start in recipes:
        follow((start,))
    return sorted(cycles)
