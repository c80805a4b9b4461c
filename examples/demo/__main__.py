"""`make demo`: draw a pool, select from it, let two more shards arrive, select again, and print the truth."""

from pathlib import Path

import polars as pl
from rich.console import Console

from assets.base.context import Context
from assets.settings import open_project
from dagster_project import console as terminal
from dagster_project.interrupts import Interrupts, run_interruptible
from dagster_project.location import DEMO_CONFIG
from examples.demo.pool import make_pool, make_targets, make_truth
from examples.demo.truth import truth_table
from resources.catalog.build import read_catalog
from resources.lake.versions import Versions

FIRST, ALL = range(6), range(8)


def main(interrupts: Interrupts) -> int:
    """Run the demo and return the exit status."""
    console = Console()
    project = open_project(DEMO_CONFIG)
    pool = Path(project.settings.pool.path)
    truth = pool.parent / "truth.parquet"

    console.rule("Six shards of drawn pictures, with faults planted in them")
    _draw_missing(pool, FIRST)
    if not (pool.parent / "targets").exists():
        make_targets(pool.parent / "targets")
    status = terminal.run(project, console, interrupts=interrupts)

    console.rule("Two more shards arrive")
    _draw_missing(pool, ALL)
    make_truth(truth, ALL)
    status = max(status, terminal.run(project, console, interrupts=interrupts))

    console.rule("How the scores and recipes handled the planted faults")
    for table in truth_table(pl.read_parquet(truth), _scores(project), _subsets(project)):
        console.print(table)
    uid = _scores(project).sort("neg_clip_loss")["uid"][0]
    console.print(
        "Next: `make ui` opens Dagster on these results. Ask why a sample was dropped:\n"
        f"  .venv/bin/clip-select explain --demo --uid {uid}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return status


def _draw_missing(pool: Path, shards: range) -> None:
    """Draw only missing shards: a shard that is written again is read again."""
    missing = [number for number in shards if not (pool / f"{number:05d}_stats.json").exists()]
    if missing:
        make_pool(pool, missing)


def _scores(project: Context) -> pl.DataFrame:
    with read_catalog(project.catalog_path()) as con:
        return con.sql(
            """
            SELECT uid, "clip_score/tiny" AS clip_score, "neg_clip_loss/tiny" AS neg_clip_loss,
                   "norm_sim_inf/tiny/festive" AS norm_sim_inf
            FROM scores
            """
        ).pl()


def _subsets(project: Context) -> dict[str, set[str]]:
    subsets = {}
    for recipe in project.settings.recipes:
        version = Versions(project.lake, recipe).current()
        if version is not None:
            subsets[recipe] = set(pl.read_parquet(version.manifest, columns=["uid"])["uid"])
    return subsets


if __name__ == "__main__":
    terminal.leave(run_interruptible(main, "make demo"))
