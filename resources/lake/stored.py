"""The record of a file of the lake: its provenance, its fingerprint, and statistics of its content.

Not here: where a file keeps it (`resources.lake.sealed`), nor the files (`resources.lake.files`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from core.hashing import digest


@dataclass(frozen=True)
class Provenance:
    """The origin of a file. Two files with equal provenance hold the same rows.

    Attributes:
        asset: key of the asset, such as `neg_clip_loss/b32`.
        shard: name of the shard, or None for an asset that is not partitioned.
        code_version: version of the code that computes the asset.
        parameters: settings that the result depends on, JSON values only.
        inputs: fingerprint of everything read, by name.
    """

    asset: str
    shard: str | None
    code_version: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the provenance as JSON values."""
        return {
            "asset": self.asset,
            "shard": self.shard,
            "code_version": self.code_version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }

    def digest(self) -> str:
        """Return the SHA-256 of the provenance."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest(self.as_dict())


@dataclass(frozen=True)
class Stored:
    """The record of one file of the lake.

    Attributes:
        provenance: the file's provenance.
        fingerprint: identifies the content for assets that read it: the provenance's digest, or a digest of the
            content where the asset passed one (so that a source that was touched but not changed stops there).
        rows: number of rows.
        summary: statistics of the content, such as rejects by reason. The same inputs give the same summary.
    """

    provenance: Provenance
    fingerprint: str
    rows: int
    summary: dict[str, Any]

    def is_from(self, provenance: Provenance) -> bool:
        """Return whether a run with this provenance would write the same file."""
        wanted = provenance.digest()
        return self.fingerprint == wanted or self.provenance.digest() == wanted


def as_record(stored: Stored) -> dict[str, Any]:
    """Return a record as JSON values."""
    return {
        "provenance": stored.provenance.as_dict(),
        "fingerprint": stored.fingerprint,
        "rows": stored.rows,
        "summary": stored.summary,
    }


def from_record(record: Mapping[str, Any]) -> Stored:
    """Return the record in JSON values.

    Raises:
        KeyError, TypeError: it is no record.
    """
    return Stored(
        provenance=Provenance(**record["provenance"]),
        fingerprint=record["fingerprint"],
        rows=record["rows"],
        summary=record["summary"],
    )
