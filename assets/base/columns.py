"""Columns of asset tables: type, meaning, bounds and direction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

if TYPE_CHECKING:
    from assets.base.checks import Tables

Bounds = tuple[float, float]

IDENTITY = (
    pa.field("shard", pa.string(), nullable=False),
    pa.field("f0", pa.uint64(), nullable=False),
    pa.field("f1", pa.uint64(), nullable=False),
)
"""The first columns of every score table: the row's shard and uid."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a score asset.

    Attributes:
        name: its name in the asset's files.
        type: its Arrow type.
        description: its meaning, one sentence, with units.
        direction: whether a `larger` or a `smaller` value is better; None for a column that ranks nothing (a label, a
            standard error, an index).
        bounds: smallest and largest possible value, checked before a file is written; a function where they depend on
            other files; None for columns without an order.
        nullable: whether rows may have no value.
        sql_type: its type in the catalog; by default the one that follows from `type`.
        explains: which column of `explain` shows this one beside the scores of its asset: `nearest_target`,
            `best_caption` or `in_favour_of`.
    """

    name: str
    type: pa.DataType
    description: str
    direction: Literal["larger", "smaller"] | None
    bounds: "Bounds | Callable[[Tables], Bounds] | None"
    nullable: bool = False
    sql_type: str = ""
    explains: Literal["nearest_target", "best_caption", "in_favour_of"] | None = None

    def __post_init__(self) -> None:
        """Derive the catalog's type."""
        if not self.sql_type:
            object.__setattr__(self, "sql_type", _sql_type(self.type))

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers or truth values, and neither text nor lists."""
        return self.sql_type != "VARCHAR" and not self.sql_type.endswith("[]")


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_string(kind):
        return "VARCHAR"
    if pa.types.is_boolean(kind):
        return "BOOLEAN"
    return "BIGINT" if pa.types.is_integer(kind) else "FLOAT"


def score_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the Arrow schema of a score asset: identity, then the given columns."""
    return pa.schema([*IDENTITY, *(pa.field(c.name, c.type, nullable=c.nullable) for c in columns)])
