"""The coverage checks of imported scores and uid lists: how much of the pool the files cover.

Over the whole pool they run when the files are new and on demand; per shard when the shard is joined.
"""

from pathlib import Path
from typing import Any

from assets.base.asset import Declared
from assets.base.checks import Check, Finding, Tables, not_compared
from resources.inputs.external import find, opened


def pool_coverage(field: str, name: str) -> Check:
    """Check a score's files, or a uid list, against the shards whose `raw_pool` is there.

    Args:
        field: of the YAML: `external_scores` or `external_uids`.
        name: the name there.
    """

    def run(tables: Tables) -> Finding:
        lake = tables.context.lake
        settings = getattr(tables.context.settings, field)[name]
        there = set(lake.shards("raw_pool"))
        pool = [Path(lake.path("raw_pool", shard)) for shard in sorted(tables.snapshot.listing) if shard in there]
        with opened(find(settings.files), uid=settings.uid) as table:
            found = table.coverage(pool)
        figures: dict[str, Any] = {
            "shards": found.shards,
            "rows": found.rows,
            "covered": found.covered,
            "uids": found.uids,
            "uids_unknown": found.unknown,
        }
        if not found.rows:
            return not_compared("raw_pool has no rows yet", figures)
        share = figures["coverage"] = found.covered / found.rows
        if found.covered and share >= settings.minimum_coverage:
            return Finding(True, figures)
        return Finding(
            False,
            figures,
            f"{found.covered} of {found.rows} rows of the pool are covered, {share:.1%}; asked for: "
            f"{settings.minimum_coverage:.1%}, and one row at least. Of {found.uids} uids the pool has no row for "
            f"{found.unknown}. Remedy: other files, or a lower {field}.{name}.minimum_coverage",
        )

    return Check(
        "pool_coverage",
        "The files have the uids of enough of the pool's rows, as far as they are in raw_pool by now. Also counts the "
        "files' uids that no row has.",
        run,
    )


def shard_coverage(asset: Declared) -> Check:
    """Check that enough rows of a shard have a value, in every column of `external_scores/<name>`."""
    name = asset.names["name"]
    settings = asset.settings.external_scores[name]

    def run(tables: Tables) -> Finding:
        table = tables.read(columns=list(settings.columns))
        if not table.num_rows:
            return not_compared("there are no rows", {"rows": 0})
        figures: dict[str, Any] = {"rows": table.num_rows}
        low = []
        for column in settings.columns:
            covered = table.num_rows - table[column].null_count
            share = covered / table.num_rows
            figures |= {f"{column}/covered": covered, f"{column}/coverage": share}
            if share < settings.minimum_coverage:
                low.append(f"{column}: {covered} of {table.num_rows} rows have a value, {share:.1%}")
        asked = f". Asked for: {settings.minimum_coverage:.1%} (external_scores.{name}.minimum_coverage)"
        return Finding(not low, figures, "; ".join(low) + asked if low else "")

    return Check("coverage", "Enough of the shard's rows have a value, in every column.", run, blocking=False)
