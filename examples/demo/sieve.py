"""SIEVE on two shards of the demo's pool: `python -m examples.demo.sieve`, some minutes.

Captions come from the demo's captioner, vectors from the text tower of its encoder. Prints the AUC of SIEVE and
CLIPScore for each planted fault. Not part of `make demo`, because describing the pictures takes minutes.
"""

import argparse
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from assets.base.score_kind import Scores
from assets.settings import open_project
from dagster_project import console as terminal
from dagster_project.location import DEMO_CONFIG
from examples.demo.pool import make_pool, make_truth
from examples.demo.truth import auc
from resources.catalog.build import read_catalog

SHARDS = range(2)
CONFIG = DEMO_CONFIG.parent / "demo-sieve.yaml"


def separation(rows: pl.DataFrame, names: list[str]) -> Table:
    """Return a table of each score's AUC for each fault, and for each variant of a wrong attribute.

    Args:
        rows: Columns kind, variant, and the scores.
        names: Names of the scores.
    """
    clean = rows.filter(pl.col("kind") == "clean")
    table = Table(title="AUC: probability that a clean row scores above a faulty one")
    for column in ("fault", "rows", *names):
        table.add_column(column, justify="left" if column == "fault" else "right")
    faulty = rows.filter(pl.col("kind") != "clean")
    groups = {kind: faulty.filter(pl.col("kind") == kind) for kind in faulty["kind"].unique().sort()}
    wrong = groups["wrong_attribute"]
    groups |= {f"  {name}": wrong.filter(pl.col("variant") == name) for name in wrong["variant"].unique().sort()}
    for name, group in (groups | {"all faults": faulty}).items():
        values = [f"{auc(clean[score].to_numpy(), group[score].to_numpy()):.3f}" for score in names]
        table.add_row(name.replace("_", " "), f"{len(group):,}", *values)
    return table


def main() -> int:
    """Draw the shards, run the project, print the table and return the exit status."""
    parser = argparse.ArgumentParser(description="Run SIEVE on two shards of the demo's pool.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="a copy of it with other captioners or encoders")
    project = open_project(parser.parse_args().config)
    console = Console()
    pool = Path(project.settings.pool.path)
    missing = [number for number in SHARDS if not (pool / f"{number:05d}_stats.json").exists()]
    if missing:
        make_pool(pool, missing)
    make_truth(pool.parent / "truth.parquet", SHARDS)
    if status := terminal.run(project, console):
        return status
    names = [name for name in Scores(project.settings).by_name if name.startswith(("clip_score/", "sieve/"))]
    with read_catalog(project.catalog_path()) as con:
        rows = con.sql("FROM scores").pl().join(pl.read_parquet(pool.parent / "truth.parquet"), on="uid")
        example = con.sql(
            f"""SELECT caption, "{names[-1].replace("sieve", "sieve_caption", 1)}" AS described, "{names[-1]}" AS score
            FROM pool_scores USING SAMPLE reservoir(8 ROWS) REPEATABLE (1)"""
        ).pl()
    console.print(separation(rows, names))
    for row in example.iter_rows(named=True):
        console.print(f"{row['score']:.3f}  {row['caption']!r}  described as {row['described']!r}", highlight=False)
    return 0


if __name__ == "__main__":
    terminal.leave(main())
