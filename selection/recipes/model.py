"""The base of all parts of a recipe, and what their fractions refer to."""

from fractions import Fraction
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

POOL = "pool"
BASIS = "the pool"  # describes the rows that fractions refer to, before a `within`


class Model(BaseModel):
    """Base of all parts of a recipe: immutable; an unknown field is an error.

    Attributes:
        yaml_name: The part's name in YAML, for messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    yaml_name: ClassVar[str] = ""

    def _only_one(self, *names: str) -> str:
        """Return the one field of `names` that is set.

        Raises:
            ValueError: none is set, or several are.
        """
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"{self.yaml_name} needs exactly one of {', '.join(names)}; found {found}")
        return given[0]


def part_of(rows: int, fraction: float) -> int:
    """Return floor(rows · fraction), with the fraction as written in decimal.

    0.29 counts as 29/100 and not as the nearest binary fraction, so 0.29 of 100 rows is 29.
    """
    return int(rows * Fraction(repr(fraction)))
