"""What computing an asset yields: tables, or the reason why there are none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


class NotReady(Exception):  # noqa: N818 - a passing state, not an error
    """An input of the asset is missing or out of date; the message names it and the remedy."""


class NotAttempted(Exception):  # noqa: N818 - says nothing about the shard itself
    """The step ended before it came to a shard; the message states why."""


@dataclass(frozen=True)
class Result:
    """A computed table.

    Attributes:
        table: the rows.
        summary: statistics about them, JSON values; the same inputs give the same summary.
        content: a digest of the content, for assets whose fingerprint is their content and not their provenance.
        beside: further tables of the same shard, by asset key; they are written before `table`.
    """

    table: pa.Table
    summary: Mapping[str, Any] = field(default_factory=dict)
    content: str | None = None
    beside: Mapping[str, pa.Table] = field(default_factory=dict)


Outcome = Result | Exception
"""A shard's result, or the error that it ended with."""
