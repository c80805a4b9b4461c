"""The coverage checks of what comes from elsewhere: how much of the pool do files know, and how much do they not?

Here: the checks. Over the pool they are looked at when the files are new and whenever somebody launches them; per shard
when the shard is joined.
"""

from pathlib import Path
from typing import Any

from assets.base.checks import Check, Finding, Tables
from resources.inputs.external import find, opened


def of_pool(field: str, name: str) -> Check:
    """Make the check of a score's files, or of a uid list, over the shards whose `raw_pool` is there.

    Args:
        field: of the YAML: `external_scores` or `external_uids`.
        name: the name there.
    """

    def look(tables: Tables) -> Finding:
        project = tables.project
        settings = getattr(project.settings, field)[name]
        there = set(project.lake.shards("raw_pool"))
        pool = [Path(project.lake.path("raw_pool", shard)) for shard in sorted(project.listing()) if shard in there]
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
            return Finding(True, figures)
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
        "The files have the uids of enough of the pool's rows, as far as they are in raw_pool by now. Tells too how "
        "many of the files' uids no row has.",
        look,
    )


def of_shard(name: str) -> Check:
    """Make the check of one shard of `external_scores/<name>`."""
    key = f"external_scores/{name}"

    def look(tables: Tables) -> Finding:
        settings = tables.project.settings.external_scores[name]
        table = tables.read(key, list(settings.columns))
        figures: dict[str, Any] = {"rows": table.num_rows}
        low = []
        for column in settings.columns:
            covered = table.num_rows - table[column].null_count
            share = covered / table.num_rows if table.num_rows else 1.0
            figures |= {f"{column}/covered": covered, f"{column}/coverage": share}
            if share < settings.minimum_coverage:
                low.append(f"{column}: {covered} of {table.num_rows} rows have a value, {share:.1%}")
        asked = f". Asked for: {settings.minimum_coverage:.1%} (external_scores.{name}.minimum_coverage)"
        return Finding(not low, figures, "; ".join(low) + asked if low else "")

    return Check("coverage", "Enough of the shard's rows have a value, in every column.", look, blocking=False)
