"""The outcome of a pass as data: the JSON document of `run --json`, and the figures that the terminal prints too."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assets.base.context import Context
    from assets.graph import Graph
    from assets.subsets.subset import SubsetAsset


@dataclass
class Outcome:
    """What a pass over the graph did.

    Attributes:
        added: new shards.
        removed: shards that are gone from the pool.
        computed: for each asset that ran, its shards (none for an unpartitioned one).
        failures: for each asset that failed, the message.
        unfinished: for each asset whose run ended early, the number of shards that it did not come to.
        failed_shards: for each asset of which shards failed, those; they are among `computed` too.
        not_attempted: for each asset that could not be computed because another one failed, the key of that one. After
            the key, the reason in brackets, if the failed asset has a file.
        seconds: for each asset that ran or failed, how long it took.
        damaged: files that were found damaged, with the reason. They were set aside, and computed again where no
            failure says otherwise.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    computed: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)
    failed_shards: dict[str, list[str]] = field(default_factory=dict)
    not_attempted: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    damaged: dict[str, str] = field(default_factory=dict)


def joined(earlier: Outcome, later: Outcome, damaged: Mapping[str, str]) -> Outcome:
    """Return the outcome of a pass of several rounds: what all of them did, and what is wrong after the last one."""
    computed = {
        key: sorted({*earlier.computed.get(key, []), *later.computed.get(key, [])})
        for key in {**earlier.computed, **later.computed}
    }
    return replace(
        later,
        added=[*earlier.added, *(shard for shard in later.added if shard not in earlier.added)],
        removed=[*earlier.removed, *(shard for shard in later.removed if shard not in earlier.removed)],
        computed=computed,
        seconds={
            key: earlier.seconds.get(key, 0) + later.seconds.get(key, 0) for key in {**earlier.seconds, **later.seconds}
        },
        damaged=dict(damaged),
    )


@dataclass(frozen=True)
class PoolCounts:
    """What is in the pool.

    Attributes:
        rows: usable samples.
        rejects: rejected samples by reason, sorted by reason.
        notes: remarks on shards.
    """

    rows: int
    rejects: Mapping[str, int]
    notes: Sequence[str]

    @property
    def rejected(self) -> int:
        """Samples that were rejected."""
        return sum(self.rejects.values())

    @property
    def samples(self) -> int:
        """Samples seen."""
        return self.rows + self.rejected


def pool_counts(project: "Context") -> PoolCounts:
    """Return the rows, rejects and notes of the shards in the lake."""
    rows = 0
    reasons: dict[str, int] = {}
    notes: list[str] = []
    for shard in project.lake.shards("raw_pool"):
        stored = project.lake.stored("raw_pool", shard)
        if stored is None:
            continue
        rows += stored.rows
        notes += [f"shard {shard}: {note}" for note in stored.summary.get("notes", "").splitlines()]
        for name, count in stored.summary.items():
            if name.startswith("rejected/"):
                reason = name.removeprefix("rejected/")
                reasons[reason] = reasons.get(reason, 0) + count
    return PoolCounts(rows, dict(sorted(reasons.items())), notes)


def subset_warnings(lineage: Mapping[str, Any]) -> list[str]:
    """List the shards that a version of a subset is without, with the reason, and the steps with a note."""
    missing = [f"without shard {shard}: {reason}" for shard, reason in lineage["shards_missing"].items()]
    return missing + [f"step {step['step']}: {step['note']}" for step in lineage["steps"] if step.get("note")]


def document(
    project: "Context", graph: "Graph", outcome: Outcome, seconds: float, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Return the document that `run --json` prints; `docs/operations.md` describes its fields.

    Args:
        project: the opened project.
        graph: its assets.
        outcome: of the pass.
        seconds: how long the pass took.
        only: keys of the assets of the pass; by default all.
    """
    from assets.base.upstream_checks import FAILED, warning_text, warnings_of

    nodes = {node.key: node for node in graph.in_order if only is None or node.key in only}
    subsets = [subset for subset in graph.subsets if subset.key in nodes]
    checks = warnings_of(project.lake, nodes, nodes, project.lake.shards("raw_pool"))
    pool = pool_counts(project)
    return {
        "exit_status": 1 if outcome.failures else 0,
        "error": None,
        "project": project.settings.name,
        "config": str(project.config),
        "seconds": round(seconds, 3),
        "shards_added": outcome.added,
        "shards_removed": outcome.removed,
        "computed": _computed(project, outcome),
        **failures(outcome),
        "damaged": [{"file": path, "reason": reason} for path, reason in outcome.damaged.items()],
        "pool": {"samples": pool.samples, "rows": pool.rows, "rejects": dict(pool.rejects)},
        "subsets": [found for subset in subsets if (found := _subset(project, subset, outcome)) is not None],
        "warnings": [*pool.notes, *(warning_text(entry) for entry in checks if entry["result"] == FAILED)],
        "catalog": str(project.catalog_path()),
    }


def failures(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """Return the assets that failed or were not attempted, as JSON values."""
    return {
        "failed": [
            {"asset": key, "shards": outcome.failed_shards.get(key, []), "reason": reason}
            for key, reason in outcome.failures.items()
        ],
        "not_attempted": [{"asset": key, "needs": needed} for key, needed in outcome.not_attempted.items()],
    }


def _computed(project: "Context", outcome: Outcome) -> list[dict[str, Any]]:
    found = []
    for key, tried in outcome.computed.items():
        failed = outcome.failed_shards.get(key, [])
        shards = [shard for shard in tried if shard not in failed]
        if key in outcome.failures and not (failed and shards):
            continue
        records = (project.lake.stored(key, shard) for shard in (shards if tried else [None]))
        rows = [record.rows for record in records if record is not None]
        seconds = outcome.seconds.get(key)
        found.append(
            {
                "asset": key,
                "shards": shards,
                "rows": sum(rows) if rows else None,
                "seconds": None if seconds is None else round(seconds, 3),
            }
        )
    return found


def _subset(project: "Context", subset: "SubsetAsset", outcome: Outcome) -> dict[str, Any] | None:
    from resources.lake.versions import Versions

    version = Versions(project.lake, subset.recipe).current()
    if version is None:
        return None
    return {
        "recipe": subset.recipe,
        "version": version.name,
        "computed": subset.key in outcome.computed and subset.key not in outcome.failures,
        "rows": version.lineage["rows"],
        "samples": version.samples,
        "path": version.uids,
        "folder": version.folder,
        "warnings": subset_warnings(version.lineage),
    }
